"""Training: `python -m train --config configs/onecycle.yaml`, and from Python `train.fit("configs/onecycle.yaml")`.

The names in `__all__` are stable from version 0.2 on: names, arguments and results stay; new ones may be added. Everything else
in this package may change with any version. Importing the package does not import torch; using one of its names may.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dali_pipeline.handing_on import handing_on

if TYPE_CHECKING:
    from dali_pipeline.errors import UserError
    from train.config import Config, ConfigError
    from train.python_face import FinishedRun, fit

__all__ = ["Config", "ConfigError", "FinishedRun", "UserError", "fit"]

__getattr__, __dir__ = handing_on(
    __name__,
    {
        "Config": "train.config",
        "ConfigError": "train.config",
        "FinishedRun": "train.python_face",
        "UserError": "dali_pipeline.errors",
        "fit": "train.python_face",
    },
)
