"""The arithmetic of a training: one step, one evaluation, the schedule, the range test."""
