"""Pictures and tables of a finished run: `python -m analysis runs/NAME`, and from Python `analysis.load("runs/NAME")`.

The names in `__all__` are stable from version 0.2 on: names, arguments and results stay; new ones may be added. Everything else
in this package may change with any version. Importing the package does not import torch; using one of its names may.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dali_pipeline.handing_on import handing_on

if TYPE_CHECKING:
    from analysis.classifier import Answers, Classifier, load
    from dali_pipeline.errors import UserError

__all__ = ["Answers", "Classifier", "UserError", "load"]

__getattr__, __dir__ = handing_on(
    __name__,
    {
        "Answers": "analysis.classifier",
        "Classifier": "analysis.classifier",
        "UserError": "dali_pipeline.errors",
        "load": "analysis.classifier",
    },
)
