"""`whole.py MODULE ARGUMENTS`: a command of the project on the stand-in, which computes nothing: what decides is answered.

Weights count as finite and the sums of an evaluation are ones; everything else is the program that a user starts.
"""

from __future__ import annotations

import importlib
import sys

import inside

from train.step.trainer import Trainer

if __name__ == "__main__":
    inside.answer_evaluations()
    Trainer.finite = lambda self: True
    command = sys.argv.pop(1)
    sys.exit(importlib.import_module(command).main())
