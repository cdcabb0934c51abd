"""How matplotlib is imported and set up: the one module that imports it.

Pictures go into files and nowhere else, so the user's choices of a backend and a style (MPLBACKEND, matplotlibrc) do not reach
them: a figure has matplotlib's own style, and a setting left over from a notebook, or a damaged file of settings, stops nothing.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _import_matplotlib() -> None:
    """Import matplotlib, which reads the user's settings; where it fails at those, with its own. The settings of a process
    that uses it too are left as they are."""
    try:
        import matplotlib
    except ImportError:
        raise  # it is not there, or broken
    except Exception:  # ValueError for a backend, and for the file whatever reading it raises
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]  # what the half import has left
        with _settings_hidden():
            import matplotlib  # noqa: F401


@contextmanager
def _settings_hidden() -> Iterator[None]:
    found = find_spec("matplotlib")
    own = {name: os.environ.pop(name) for name in ("MPLBACKEND", "MATPLOTLIBRC") if name in os.environ}
    here = Path.cwd()
    try:
        # the first place that is looked for a matplotlibrc is the current folder: this one holds matplotlib's own
        if found is not None and found.origin is not None:
            os.chdir(Path(found.origin).parent / "mpl-data")
        yield
    finally:
        os.chdir(here)
        os.environ.update(own)


_import_matplotlib()

import matplotlib  # noqa: E402
from matplotlib import colormaps  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

__all__ = ["Axes", "Figure", "MaxNLocator", "colormaps", "drawn", "in_own_style", "to_rgb"]

_styled = ContextVar("styled", default=False)
_OF_THE_PROCESS = ("backend", "backend_fallback", "interactive", "toolbar", "webagg", "timezone")  # no part of a style


@contextmanager
def _own_style() -> Iterator[None]:
    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("ignore", matplotlib.MatplotlibDeprecationWarning)  # of settings that are only copied
        defaults = matplotlib.rcParamsDefault
        matplotlib.rcParams.update({name: defaults[name] for name in defaults if not name.startswith(_OF_THE_PROCESS)})
        token = _styled.set(True)
        try:
            yield
        finally:
            _styled.reset(token)


def drawn(draw: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """For a function that draws a figure: inside it matplotlib's own style holds, and afterwards the settings are as before."""

    @wraps(draw)
    def in_style(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with _own_style():
            return draw(*args, **kwargs)

    return in_style


def in_own_style() -> bool:
    """Whether this runs inside a function marked `drawn`; elsewhere a figure would show the user's style."""
    return _styled.get()
