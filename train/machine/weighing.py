"""Whether torch.compile pays on a CPU: whether it saves more time than it takes, estimated from measurements on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dali_pipeline.errors import cache_folder
from train.machine.environment import cpu_name

# Defaults, for a machine on which nothing was measured yet.
# Seconds to compile with an empty cache and with a full one: the quickstart's recipe on two otherwise idle cores.
COLD_SECONDS = 54.0
WARM_SECONDS = 5.0
# The gain: an eager step's time over a compiled one's, by torch's name for the CPU's vector units. Measured in fp32 at width 16
# and batch size 512 on two Xeon cores, n = 8.
GAIN_BY_VECTOR_UNITS = {"AVX512": 1.37}
# The gain with other vector units. Compiled steps were slower with AVX2 (a gain of 0.95 and 0.84 at widths 8 and 16 on one EPYC
# core), but a default below 1 would never compile. This one makes a long run compile once; what it measures decides from then on.
FALLBACK_GAIN = 1.1
# The speed of an eager step: between the 15 to 38 GFLOP/s of that EPYC core and the 85 of the two Xeon cores.
EAGER_FLOPS_PER_SECOND = 50e9
# The history keeps the latest five measurements of a kind, and the latest 64 graphs of a machine.
MAX_VALUES = 5
MAX_GRAPHS = 64


@dataclass(frozen=True)
class Weighed:
    """Whether compiling pays, and the calculation behind the answer, in words."""

    pays: bool
    why: str


@dataclass(frozen=True)
class Estimate:
    """A number, and where it comes from: "seen here" (measured on this machine) or "a default"."""

    value: float
    source: str


def weigh(eager_seconds: float, steps_left: int, compile_seconds: float, gain: float) -> bool:
    """Whether `steps_left` eager steps of `eager_seconds` each take longer than `compile_seconds` plus as many compiled steps,
    `gain` times as fast. Evaluations are not counted: they are short beside the training, and gain less."""
    return eager_seconds * steps_left > compile_seconds + eager_seconds * steps_left / gain


def weigh_seen(eager_seconds: float, steps_left: int, compiling: Estimate, gain: Estimate) -> Weighed:
    """`weigh` with estimates, and its calculation in words."""
    eager = eager_seconds * steps_left
    why = (
        f"weighed: the {steps_left:,} steps left take {eager:,.1f} s as they are; compiled they would take "
        f"{eager / gain.value:,.1f} s ({gain.value:.2f} times the speed, {gain.source}), and compiling "
        f"{compiling.value:,.1f} s ({compiling.source})"
    )
    return Weighed(weigh(eager_seconds, steps_left, compiling.value, gain.value), why)


def weigh_by_arithmetic(step_flops: float, steps_left: int) -> Weighed:
    """`weigh` from a step's number of operations and the defaults, with nothing measured: every run on one machine gets the same
    answer."""
    gain = default_gain()
    why = (
        f"train.deterministic=true: by a fixed rule, {steps_left:,} steps of {step_flops / 1e9:,.1f} GFLOP at "
        f"{EAGER_FLOPS_PER_SECOND / 1e9:.0f} GFLOP/s, compiled {gain:.2f} times as fast after {COLD_SECONDS:.0f} s"
    )
    return Weighed(weigh(step_flops / EAGER_FLOPS_PER_SECOND, steps_left, COLD_SECONDS, gain), why)


def default_gain() -> float:
    return GAIN_BY_VECTOR_UNITS.get(torch.backends.cpu.get_cpu_capability(), FALLBACK_GAIN)


def history_path() -> Path:
    """compile.json in the user's folder for caches."""
    # where there is none, a place that is no folder: nothing is kept
    return (cache_folder() or Path(os.devnull)) / "compile.json"


def compiler_cache() -> Path:
    """Where torch's compiler keeps what it has compiled; asking torch would import the compiler."""
    asked = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if asked:
        return Path(asked)
    try:
        import getpass

        user = getpass.getuser()
    except (ImportError, KeyError, OSError):  # a user without a name, as in some containers
        user = ""
    return Path(tempfile.gettempdir(), f"torchinductor_{user}")


def graphs_compiled() -> tuple[int, int]:
    """How many graphs this process has taken out of the compiler's cache so far, and how many it has compiled anew."""
    utils = sys.modules.get("torch._dynamo.utils")  # not imported for this: it takes seconds
    if utils is None:
        return 0, 0
    seen = utils.counters["inductor"]
    return seen["fxgraph_cache_hit"], seen["fxgraph_cache_miss"] + seen["fxgraph_cache_bypass"]


def compiled_from_cache(before: tuple[int, int]) -> bool:
    """Whether all that was compiled since `graphs_compiled` gave `before` came out of the cache."""
    cached, anew = graphs_compiled()
    return cached > before[0] and anew == before[1]


class CompileHistory:
    """How long compiling took on this machine and what it gained. Later runs read it from the JSON file `path`:

        {machine: {"cold": [seconds], "warm": [seconds], "graphs": {graph: {"cache": folder, "gain": [ratio]}}}}

    A machine is a version of torch, a CPU and a number of threads. A graph is a text that identifies what a recipe compiles.
    What is missing or cannot be read counts as not measured; failing to write the file is no error.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or history_path()
        self.machine = f"torch {torch.__version__}, {cpu_name()}, {torch.get_num_threads()} threads"

    def compile_seconds(self, graph: str) -> Estimate:
        """How long compiling will take: "warm" where the compiler's cache holds this graph, else "cold"."""
        here = self._here(self._read())
        cache = compiler_cache()
        warm = _dict(_dict(here, "graphs"), graph).get("cache") == str(cache) and cache.is_dir()
        kind, default = ("warm", WARM_SECONDS) if warm else ("cold", COLD_SECONDS)
        seen = _numbers(here, kind)
        # the shortest: longer ones were measured on a busy machine
        return _estimate(min(seen, default=None), default, f", {kind} cache")

    def gain(self, graph: str) -> Estimate:
        """The gain of this graph where it was measured, else the median of the other graphs on this machine."""
        graphs = _dict(self._here(self._read()), "graphs")
        medians = {name: statistics.median(seen) for name in graphs if (seen := _numbers(_dict(graphs, name), "gain"))}
        others = statistics.median(medians.values()) if medians else None
        return _estimate(medians.get(graph, others), default_gain())

    def add(self, graph: str, seconds: float, *, warm: bool, gain: float | None = None) -> None:
        """Add a compilation's time and, where it was measured, its gain."""
        content = self._read()
        here = self._here(content)
        kind = "warm" if warm else "cold"
        graphs = _dict(here, "graphs")
        entry: dict[str, Any] = {"cache": str(compiler_cache()), "gain": _numbers(_dict(graphs, graph), "gain")}
        if gain is not None:
            entry["gain"] = [*entry["gain"], gain][-MAX_VALUES:]
        latest = [*((name, value) for name, value in graphs.items() if name != graph), (graph, entry)][-MAX_GRAPHS:]
        here |= {kind: [*_numbers(here, kind), seconds][-MAX_VALUES:], "graphs": dict(latest)}
        with contextlib.suppress(OSError):
            self._write({**content, self.machine: here})

    def _here(self, content: dict[str, Any]) -> dict[str, Any]:
        return dict(_dict(content, self.machine))

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def _write(self, content: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)


def _dict(content: dict[str, Any], name: str) -> dict[str, Any]:
    found = content.get(name)
    return found if isinstance(found, dict) else {}


def _numbers(content: dict[str, Any], name: str) -> list[float]:
    found = content.get(name)
    if not isinstance(found, list):
        return []
    return [float(v) for v in found if isinstance(v, (int, float)) and 0 < v <= sys.float_info.max]


def _estimate(seen: float | None, default: float, about: str = "") -> Estimate:
    return Estimate(default, f"a default{about}") if seen is None else Estimate(seen, f"seen here{about}")
