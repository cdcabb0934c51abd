"""What a training shows to a person: lines, a progress bar, times, the summary."""
