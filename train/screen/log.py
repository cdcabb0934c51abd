"""Lines for a person, which outlive whoever reads them."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path


class Log:
    """Lines for a person. Silent on all ranks but the first; goes on when nobody reads any more (a closed pipe).

    With `owns_process`, standard output then leads nowhere, so that no library's print fails at the process's end either.
    """

    def __init__(self, quiet: bool = False, *, owns_process: bool = True) -> None:
        self.quiet = self.quiet_by_rank = quiet
        self._owns_process = owns_process
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
            if not self._owns_process:
                return
            with Path(os.devnull).open("w") as null, contextlib.suppress(OSError):
                os.dup2(null.fileno(), 1)
