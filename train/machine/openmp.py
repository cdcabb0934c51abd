"""How OpenMP's threads wait for each other, which is decided before torch is imported. Imports no torch."""

from __future__ import annotations

import os
import sys

CHOSEN_BY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # any of them says how the user wants it


def wait_passively() -> None:
    """Let the threads of torch's OpenMP sleep while they wait for each other, unless the user has chosen otherwise. To be called
    by a command before it imports torch, as OpenMP reads the variable once; afterwards it does nothing.

    By default they keep their processors busy for some time, and where other programs want those, the thread that is waited for
    does not run meanwhile: docs/throughput.md has the figures.
    """
    if "torch" not in sys.modules and not any(os.environ.get(name) for name in CHOSEN_BY):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
