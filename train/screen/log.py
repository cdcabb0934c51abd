"""Lines for a person. A reader that goes away does not stop the run."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path


class Log:
    """Prints lines on the first rank and nothing on the others. A closed pipe (nobody reads any more) is no error.

    With `owns_process` a closed standard output is replaced by the null device, so that prints of libraries do not fail either.
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
            # nobody reads any more; the run goes on without its messages
            self.quiet = True
            if not self._owns_process:
                return
            with Path(os.devnull).open("w") as null, contextlib.suppress(OSError):
                os.dup2(null.fileno(), 1)
