"""What a run leaves on the disk: atomic files, sealed checkpoints, the run folder, and how to go on from it."""
