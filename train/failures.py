"""Failures that a user can do something about, as one line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dali_pipeline.datasets import DataError
from dali_pipeline.loader import BackendError
from train.checkpoint import CheckpointError, WriteError
from train.config import Config, ConfigError
from train.distributed import GroupError, OtherProcessFailed, from_environment, is_lost
from train.lr_finder import RangeTestError
from train.progress import NonFiniteLoss
from train.record import Log, RunFolderError
from train.runtime import RuntimeUnavailable
from train.signals import Interrupted

UNUSABLE = (
    ConfigError,
    DataError,
    BackendError,
    CheckpointError,
    RuntimeUnavailable,
    RunFolderError,
    RangeTestError,
    GroupError,
)
# how allocators other than torch's own for CUDA say it
_NO_MEMORY = ("can't allocate memory", "ALLOC_FAILED", "cudaErrorMemoryAllocation", "bad_alloc", "out of memory")
_REMEDY = "; make room or choose another run.dir=, then continue with --resume"


@dataclass
class Outcome:
    """The process's exit code."""

    code: int = 0


@contextmanager
def explained(config: Config, log: Log) -> Iterator[Outcome]:
    """Runs the block; what a user can mend ends as one line on stderr and in `Outcome.code`, anything else as it is.

    What all processes of a run raise alike is said by the one that may log.
    """
    outcome = Outcome()

    def end(code: int, message: str) -> None:
        outcome.code = code
        with contextlib.suppress(OSError, ValueError):  # nobody may be there to read it
            print("error:", " ".join(message.split("\n")), file=sys.stderr, flush=True)

    try:
        yield outcome
    except UNUSABLE as error:
        end(2, str(error))
    except NonFiniteLoss as error:
        if log.quiet_by_rank:
            outcome.code = 3
        else:
            end(3, str(error))
    except Interrupted as error:
        outcome.code = error.code
        log(
            f"{error}: stopped after a whole step; the run folder is good, continue with --resume"
            if error.saved
            else f"{error}: stopped, nothing was trained since the last checkpoint"
        )
    except KeyboardInterrupt:
        end(130, "interrupted")
    except OtherProcessFailed:
        outcome.code = 1
    except WriteError as error:
        end(1, f"{error.filename}: cannot be written: {error.strerror}; what was saved before is intact{_REMEDY}")
    except (MemoryError, torch.OutOfMemoryError) as error:
        end(1, _out_of_memory(config, str(error)))
    except RuntimeError as error:
        if any(words in str(error) for words in _NO_MEMORY):
            end(1, _out_of_memory(config, str(error)))
        elif from_environment().world_size > 1 and is_lost(error):
            rank = os.environ.get("RANK", "0")
            end(1, f"process {rank} lost the others ({_first_line(error)}); continue from last.pt with --resume")
        else:
            raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        where = error.filename or config.run.dir or "the run folder"
        end(1, f"{where}: {error.strerror}; what was saved before is intact{_REMEDY}")


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _out_of_memory(config: Config, message: str) -> str:
    train = config.train
    return (
        f"out of memory at train.batch_size={train.batch_size}, train.eval_batch_size={train.eval_batch_size}, "
        f"net.width={config.net.width}: lower one of them; nothing was changed by itself "
        f"({(message.strip() or 'MemoryError').splitlines()[0]})"
    )
