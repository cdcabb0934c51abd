"""Lines for a person, which outlive whoever reads them."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path


class Log:
    """Lines for a person. Silent on all ranks but the first; goes on when nobody reads any more (a closed pipe)."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = self.quiet_by_rank = quiet
        self.terminal = bool(
            sys.stderr is not None and sys.stderr.isatty() and sys.stdout is not None and sys.stdout.isatty()
        )

    def __call__(self, line: str = "") -> None:
        if self.quiet or sys.stdout is None:
            return
        try:
            if self.terminal:
                from tqdm import tqdm

                tqdm.write(line)
            else:
                print(line, flush=True)
        except (BrokenPipeError, ValueError, OSError):
            # the reader went away; the run is worth more than its messages
            self.quiet = True
            with Path(os.devnull).open("w") as null, contextlib.suppress(OSError):
                os.dup2(null.fileno(), 1)
