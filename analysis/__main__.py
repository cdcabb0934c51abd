"""python -m analysis runs/NAME"""

from __future__ import annotations

import sys

from analysis.report import analyse, main

__all__ = ["analyse", "main"]

if __name__ == "__main__":
    sys.exit(main())
