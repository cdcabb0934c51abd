"""A torch.profiler trace of training end to end, and the kernels that cost most."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from benchmarks.measure import synchronize
from benchmarks.stages import Training
from train.disk.atomic import write_atomic

STEPS = {"cuda": 20, "cpu": 3}


def profile(training: Training, path: Path) -> list[str]:
    """Write the trace (chrome://tracing, Perfetto) and give the ten costliest kernels as lines of a table."""
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
