"""Turns errors that a user can correct into one line on stderr and an exit code. Every command runs inside `explained`."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dali_pipeline.errors import UserError
from dali_pipeline.words import to_stderr
from train.disk.atomic import WriteError
from train.machine.distributed import OtherProcessFailed
from train.machine.signals import Interrupted
from train.screen.log import Log
from train.screen.streams import say_error, share_a_reader
from train.step.meter import NonFiniteLoss

__all__ = ["Outcome", "UserError", "explained"]

# "out of memory" in the words of allocators other than torch's own for CUDA
_NO_MEMORY = ("can't allocate memory", "ALLOC_FAILED", "cudaErrorMemoryAllocation", "bad_alloc", "out of memory")
_REMEDY = "; make room or choose another run.dir=, then continue with --resume"
_REMEDY_OF_FILES = "; make room or write into another folder"  # of commands that train nothing


@dataclass
class Outcome:
    """The process's exit code."""

    code: int = 0


@contextmanager
def explained(
    log: Log, *, out_of_memory: str, place: str | None = None, reads_files: bool = False
) -> Iterator[Outcome]:
    """Runs the block. An error that a user can correct becomes one line on stderr and sets `Outcome.code`; any other error is
    raised on.

    `out_of_memory` says which keys to lower where memory does not suffice; `place` names what was being written where the
    error does not. With `reads_files`, any error about a named file counts as one that the user can correct. An error that
    all processes of a run raise alike is printed by the first one only.
    """
    outcome = Outcome()
    remedy = _REMEDY_OF_FILES if reads_files else _REMEDY

    def end(code: int, *lines: str) -> None:
        outcome.code = code
        say_error(*lines)

    try:
        yield outcome
    except NonFiniteLoss as error:
        if log.quiet_by_rank:
            outcome.code = error.exit_code
        else:
            end(error.exit_code, *str(error).split("\n"))
    except UserError as error:
        end(error.exit_code, *str(error).split("\n"))
    except Interrupted as error:
        outcome.code = error.code
        line = (
            f"{error}: stopped after a whole step; the run folder is good, continue with --resume"
            if error.saved
            else f"{error}: stopped, nothing was trained since the last checkpoint"
        )
        log(line)
        if not log.quiet_by_rank and not share_a_reader():  # Ctrl-C ends a `| tee` too
            to_stderr(line)
    except KeyboardInterrupt:
        end(130, "interrupted")
    except OtherProcessFailed as error:
        outcome.code = error.exit_code
    except WriteError as error:
        end(1, f"{error.filename}: cannot be written: {error.strerror}; what was saved before is intact{remedy}")
    except (MemoryError, torch.OutOfMemoryError) as error:
        end(1, _out_of_memory(out_of_memory, error))
    except RuntimeError as error:
        if any(words in str(error) for words in _NO_MEMORY):
            end(1, _out_of_memory(out_of_memory, error))
        else:
            raise
    except BrokenPipeError:
        end(1, "standard output: nobody reads it any more")
    except OSError as error:
        if reads_files and error.filename is not None:
            end(1, f"{error.filename}: {error.strerror}")
            return
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        where = error.filename or place or "the run folder"
        end(1, f"{where}: {error.strerror}; what was saved before is intact{remedy}")


def _out_of_memory(advice: str, error: BaseException) -> str:
    return f"out of memory{advice} ({(str(error).strip() or 'MemoryError').splitlines()[0]})"
