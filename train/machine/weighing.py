"""Whether torch.compile pays on a CPU: what compiling takes against what it saves, both as this machine has shown them."""

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

from train.machine.environment import cpu_name

# where nothing has been seen yet: the quickstart's recipe on two quiet cores, nothing in the cache and everything in it
COLD_SECONDS = 54.0
WARM_SECONDS = 5.0
# an eager step's time over a compiled one's, by torch's name for the CPU's vector units: fp32, width 16, batch 512 on two
# Xeon cores, n = 8. Without AVX-512 compiled steps were slower where they were measured (0.95 and 0.84 of the eager speed
# at widths 8 and 16, one EPYC core with AVX2): the figure is what tries them once, in a long run, which then decides.
GAINS = {"AVX512": 1.37}
OTHER_GAIN = 1.1
FLOPS = 50e9  # a second, of an eager step; 15 to 38 on one such EPYC core, 85 on the two Xeon cores
KEPT = 5  # values of a kind, the latest
GRAPHS = 64  # of a machine, the latest


@dataclass(frozen=True)
class Weighed:
    """Whether compiling pays, and the sum that says so."""

    pays: bool
    why: str


@dataclass(frozen=True)
class Estimate:
    """A number, and where it comes from: "seen here" or "a default"."""

    value: float
    source: str


def weigh(eager_seconds: float, steps_left: int, compile_seconds: float, gain: float) -> bool:
    """Whether `steps_left` steps of `eager_seconds` take longer than `compile_seconds` and as many steps `gain` times as
    fast. Evaluations are left out: they are short beside the training, and gain less."""
    return eager_seconds * steps_left > compile_seconds + eager_seconds * steps_left / gain


def weigh_seen(eager_seconds: float, steps_left: int, compiling: Estimate, gain: Estimate) -> Weighed:
    """`weigh`, with the sum in words."""
    eager = eager_seconds * steps_left
    why = (
        f"weighed: the {steps_left:,} steps left take {eager:,.1f} s as they are; compiled they would take "
        f"{eager / gain.value:,.1f} s ({gain.value:.2f} times the speed, {gain.source}), and compiling "
        f"{compiling.value:,.1f} s ({compiling.source})"
    )
    return Weighed(weigh(eager_seconds, steps_left, compiling.value, gain.value), why)


def weigh_by_arithmetic(step_flops: float, steps_left: int) -> Weighed:
    """The same from the arithmetic of a step and the defaults alone: the same answer on every run of one machine."""
    gain = default_gain()
    why = (
        f"train.deterministic=true: by a fixed rule, {steps_left:,} steps of {step_flops / 1e9:,.1f} GFLOP at "
        f"{FLOPS / 1e9:.0f} GFLOP/s, compiled {gain:.2f} times as fast after {COLD_SECONDS:.0f} s"
    )
    return Weighed(weigh(step_flops / FLOPS, steps_left, COLD_SECONDS, gain), why)


def default_gain() -> float:
    return GAINS.get(torch.backends.cpu.get_cpu_capability(), OTHER_GAIN)


def record_path() -> Path:
    """compile.json in the user's folder for caches."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not folder.is_absolute():
        try:
            folder = Path.home() / ".cache"
        except RuntimeError:  # a container's user without a home
            folder = Path(os.devnull)  # which is no folder: nothing is kept
    return folder / "cifar-throughput" / "compile.json"


def compiler_cache() -> Path:
    """Where torch's compiler keeps what it has compiled; asking torch would import the compiler."""
    asked = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if asked:
        return Path(asked)
    try:
        import getpass

        user = getpass.getuser()
    except (ImportError, KeyError, OSError):  # a container's user without a name
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


class CompileRecord:
    """What compiling took on this machine and what it gained, kept from run to run in `path`:

        {machine: {"cold": [seconds], "warm": [seconds], "graphs": {graph: {"cache": folder, "gain": [ratio]}}}}

    A machine is a torch on a CPU with a number of threads, a graph any text that names a recipe's. What is missing or cannot
    be read counts as not seen, and a file that cannot be written is passed over.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or record_path()
        self.machine = f"torch {torch.__version__}, {cpu_name()}, {torch.get_num_threads()} threads"

    def compile_seconds(self, graph: str) -> Estimate:
        """Of a graph that the compiler's cache holds, or of one that it does not."""
        here = self._here(self._read())
        cache = compiler_cache()
        warm = _dict(_dict(here, "graphs"), graph).get("cache") == str(cache) and cache.is_dir()
        kind, default = ("warm", WARM_SECONDS) if warm else ("cold", COLD_SECONDS)
        seen = _numbers(here, kind)
        return _estimate(min(seen, default=None), default, f", {kind} cache")  # the others had a busy machine

    def gain(self, graph: str) -> Estimate:
        """Of this graph, else of the others here."""
        graphs = _dict(self._here(self._read()), "graphs")
        medians = {name: statistics.median(seen) for name in graphs if (seen := _numbers(_dict(graphs, name), "gain"))}
        others = statistics.median(medians.values()) if medians else None
        return _estimate(medians.get(graph, others), default_gain())

    def add(self, graph: str, seconds: float, *, warm: bool, gain: float | None = None) -> None:
        """A compilation, by its time; and the gain, where that was measured."""
        content = self._read()
        here = self._here(content)
        kind = "warm" if warm else "cold"
        graphs = _dict(here, "graphs")
        entry: dict[str, Any] = {"cache": str(compiler_cache()), "gain": _numbers(_dict(graphs, graph), "gain")}
        if gain is not None:
            entry["gain"] = [*entry["gain"], gain][-KEPT:]
        latest = [*((name, value) for name, value in graphs.items() if name != graph), (graph, entry)][-GRAPHS:]
        here |= {kind: [*_numbers(here, kind), seconds][-KEPT:], "graphs": dict(latest)}
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
