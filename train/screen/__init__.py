"""What a person sees of a training: lines, a progress bar, the clock, the summary."""
