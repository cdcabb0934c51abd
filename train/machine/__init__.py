"""What a training stands on: device and precision, the process group, signals, and the facts of the machine."""
