"""The arithmetic of a training: a step, an evaluation, the schedule, the range test. A step is one update of the weights."""
