"""Failures that a user can do something about, as one line and an exit code."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dali_pipeline.datasets import DataError
from dali_pipeline.loader import BackendError
from train.checkpoint import CheckpointError
from train.config import Config, ConfigError
from train.lr_finder import RangeTestError
from train.progress import NonFiniteLoss
from train.record import Log, RunFolderError
from train.runtime import RuntimeUnavailable
from train.signals import Interrupted

UNUSABLE = (ConfigError, DataError, BackendError, CheckpointError, RuntimeUnavailable, RunFolderError, RangeTestError)


@dataclass
class Outcome:
    """The process's exit code."""

    code: int = 0


@contextmanager
def explained(config: Config, log: Log) -> Iterator[Outcome]:
    """Runs the block; what a user can mend ends as one line on stderr and in `Outcome.code`, anything else as it is."""
    outcome = Outcome()

    def end(code: int, message: str) -> None:
        outcome.code = code
        print(f"error: {message}", file=sys.stderr, flush=True)

    try:
        yield outcome
    except UNUSABLE as error:
        end(2, str(error))
    except NonFiniteLoss as error:
        end(3, str(error))
    except Interrupted as error:
        outcome.code = error.code
        log(f"{error}: stopped after a whole step; the run folder is good, continue with --resume")
    except KeyboardInterrupt:
        end(130, "interrupted before the first checkpoint; nothing to resume")
    except torch.OutOfMemoryError as error:
        end(1, _out_of_memory(config, str(error)))
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        end(1, _out_of_memory(config, str(error)))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        where = error.filename or config.run.dir or "the run folder"
        end(1, f"{where}: {error.strerror}; what was saved before is intact, make room and continue with --resume")


def _out_of_memory(config: Config, message: str) -> str:
    train = config.train
    return (
        f"out of memory at train.batch_size={train.batch_size}, train.eval_batch_size={train.eval_batch_size}, "
        f"net.width={config.net.width}: lower one of them ({message.strip().splitlines()[0]})"
    )
