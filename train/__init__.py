"""Training: `python -m train --config configs/onecycle.yaml`."""
