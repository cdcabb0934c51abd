"""Pictures and tables of a finished run: `python -m analysis runs/NAME`."""
