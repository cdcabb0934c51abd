"""The files of a run: atomic writes, checkpoints with a checksum, the run folder, and resuming from it."""
