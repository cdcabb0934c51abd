"""Lines for a person. Neither a reader that goes away nor a character that cannot be written stops the run."""

from __future__ import annotations

import sys

from dali_pipeline.words import encodable, printable
from train.screen.streams import to_nowhere


class Log:
    """Prints lines on the first rank and nothing on the others. A closed pipe (nobody reads any more) is no error. Control
    characters, and what the stream's encoding lacks, are printed as escapes.

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
            shown = encodable(printable(line), sys.stdout)
            if self.terminal:
                from tqdm import tqdm

                tqdm.write(shown)
            else:
                print(shown, flush=True)
        except (ValueError, OSError):
            # nobody reads any more; the run goes on without its messages
            self.quiet = True
            if self._owns_process:
                to_nowhere(1)
