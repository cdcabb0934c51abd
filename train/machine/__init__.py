"""The machine that a training runs on: device and precision, the process group, signals, and facts for environment.json."""
