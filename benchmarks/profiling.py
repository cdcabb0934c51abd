"""A torch.profiler trace of training end to end, and the kernels that cost most.

python benchmarks/profiling.py TRACE [--steps N] [--json FILE]

TRACE is what throughput.py --profile wrote on a GPU (also as .gz). Prints how long the kernels of a step take, by kind: for each
call of a step the median over the steps, which leaves out the calls that another program interrupted. Then the time between the
kernels of the busiest stream: gaps over a millisecond are as a rule the turns of other programs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # instead of this folder, whose files could hide packages of the same name
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.given import read_json, reading, whole
from dali_pipeline.errors import UserError
from train.disk.atomic import write_atomic
from train.screen.streams import Parser

if TYPE_CHECKING:
    from benchmarks.stages import Training

KIND = "kernels"
STEPS = {"cuda": 20, "cpu": 3}
LONG_GAP = 1000.0  # microseconds
MOST_BYTES = 1_000_000_000  # of a trace
# kinds of kernels by parts of their names, the first that fits
KINDS = (
    ("pipeline", ("dali",)),
    ("pooling", ("max_pool2d",)),
    ("batch norm, activation, casts", ("triton_", "bn_", "batch_norm")),
    ("optimizer", ("multi_tensor",)),
    ("copies", ("Memcpy",)),
    ("convolutions", ("wgrad", "dgrad", "fprop", "cudnn", "nhwc", "Memset")),
    ("the others", ("",)),
)


def profile(training: Training, path: Path) -> list[str]:
    """Write the trace (chrome://tracing, Perfetto) and give the ten costliest kernels as lines of a table."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    from benchmarks.measure import synchronize

    on_gpu = training.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    steps = STEPS["cuda" if on_gpu else "cpu"]
    training.run_end_to_end(2)
    with torch_profile(activities=activities) as profiler:
        training.run_end_to_end(steps)
        synchronize(training.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / path.name
        profiler.export_chrome_trace(str(trace))
        write_atomic(path, trace.read_bytes())
    rows = costliest(profiler.events(), on_gpu)
    total = sum(time for _, time, _ in rows)
    lines = [f"\n{'kernel':<72}{'us a step':>12}{'share':>8}{'calls':>7}"]
    for name, time, calls in rows[:10]:
        lines.append(f"{name[:70]:<72}{time / steps:>12,.0f}{time / total:>8.1%}{calls / steps:>7.1f}")
    return [*lines, f"trace: {path}"]


def costliest(events: Any, on_gpu: bool) -> list[tuple[str, float, int]]:
    """(name, microseconds, calls), longest first: of the GPU's kernels, or on a CPU of operators without the time of those that
    they call."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]

    time: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, int] = defaultdict(int)
    for event in events:
        if on_gpu and event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            spent = event.time_range.elapsed_us()
        elif not on_gpu and event.device_type == DeviceType.CPU:
            spent = event.self_cpu_time_total
        else:
            continue
        time[event.name] += spent
        calls[event.name] += 1
    return sorted(((name, spent, calls[name]) for name, spent in time.items()), key=lambda row: -row[1])


def median_times(trace: dict[str, Any], steps: int) -> dict[str, float]:
    """Microseconds a step of each kind of kernel, the longest first, from a trace of so many steps."""
    durations: defaultdict[str, list[float]] = defaultdict(list)
    device = [e for e in trace["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    for event in sorted(device, key=lambda event: float(event["ts"])):
        durations[event["name"]].append(float(event["dur"]))
    found: defaultdict[str, float] = defaultdict(float)
    for name, times in durations.items():
        kind = next(kind for kind, parts in KINDS if any(part in name for part in parts))
        calls, rest = divmod(len(times), steps)  # of one name in a step, for layers of several sizes
        if rest:
            found[kind] += statistics.median(times) * len(times) / steps
        else:
            found[kind] += sum(statistics.median(times[call::calls]) for call in range(calls))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def gaps(trace: dict[str, Any], steps: int) -> dict[str, float]:
    """Microseconds a step between the kernels of the stream that has most of them, in gaps up to LONG_GAP and in longer ones."""
    streams: defaultdict[Any, list[tuple[float, float]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event.get("cat") == "kernel":
            begin = float(event["ts"])
            streams[event.get("args", {}).get("stream")].append((begin, begin + float(event["dur"])))
    kernels = sorted(max(streams.values(), key=len, default=[]))
    between = [max(begin - end, 0.0) for (_, end), (begin, _) in pairwise(kernels)]
    short = sum(gap for gap in between if gap <= LONG_GAP)
    return {"short": short / steps, "long": (sum(between) - short) / steps}


def lines(report: dict[str, Any]) -> list[str]:
    """The report for a person."""
    found, between = report["us_a_step"], report["gaps_us_a_step"]
    rows = {
        **found,
        "all": sum(found.values()),
        "between kernels, up to 1 ms": between["short"],
        "between kernels, longer": between["long"],
    }
    return [f"{kind:<31}{time:>9,.0f} us a step" for kind, time in rows.items()]


def parser() -> argparse.ArgumentParser:
    result = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("trace", type=Path, metavar="TRACE", help="a trace of a GPU's kernels, .json or .json.gz")
    steps = STEPS["cuda"]
    result.add_argument("--steps", type=whole(), default=steps, metavar="N", help=f"how many steps it covers ({steps})")
    result.add_argument("--json", type=Path, metavar="FILE", help="write the last line of the output here too")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    from benchmarks.outcome import conclude, explained

    with explained() as outcome:
        trace = read_json(options.trace, MOST_BYTES)
        with reading(options.trace, "a trace of torch.profiler"):
            found, between = median_times(trace, options.steps), gaps(trace, options.steps)
            gpus = [device["name"] for device in trace.get("deviceProperties", [])]
        if not found:
            raise UserError(f"{options.trace}: holds no kernels of a GPU")
        report = {"kind": KIND, "gpu": gpus[0] if gpus else None, "steps": options.steps, "us_a_step": found}
        report["gaps_us_a_step"] = between
        conclude(report, "profiling", arguments, options, lines)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
