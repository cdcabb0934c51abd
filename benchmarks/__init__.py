"""Measurements: `python benchmarks/throughput.py`, `python benchmarks/accuracy.py`."""
