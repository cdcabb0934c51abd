"""The kernels of a trace: medians by kind, and traces that are none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import profiling


def kernel(name: str, dur: float, cat: str = "kernel", ts: float = 0.0, stream: int = 7) -> dict[str, Any]:
    return {"name": name, "dur": dur, "cat": cat, "ts": ts, "args": {"stream": stream}}


def test_interrupted_calls_do_not_count_and_kinds_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three steps of the same calls, in one of which a convolution is interrupted; a copy in one of them only."""
    events = [kernel("sm90_fprop_nhwc", dur, ts=ts) for ts, dur in enumerate((10, 7, 10, 7, 5000, 7))]
    events += [kernel("triton_poi_fused_max_pool2d_3", 7, ts=ts) for ts in range(3)]
    events += [kernel("triton_red_fused_5", dur, ts=ts) for ts, dur in enumerate((2, 40, 2, 40, 2, 40))]
    events += [kernel("Memcpy DtoD", 3, "gpu_memcpy"), kernel("aten::conv", 99, "cpu_op"), {"name": "no time"}]
    trace = {"traceEvents": events[::-1], "deviceProperties": [{"name": "X"}]}
    (tmp_path / "trace.json.gz").write_bytes(gzip.compress(json.dumps(trace).encode()))
    assert profiling.main([str(tmp_path / "trace.json.gz"), "--steps", "3", "--json", str(tmp_path / "out.json")]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    expected = {"convolutions": 17.0, "pooling": 7.0, "batch norm, activation, casts": 42.0, "copies": 1.0}
    assert report["us_a_step"] == expected and report["gpu"] == "X"
    assert capsys.readouterr().out.splitlines()[4].split() == ["all", "67", "us", "a", "step"]


def test_gaps_are_those_of_the_busiest_stream() -> None:
    """10 us between the first two kernels and 2000 us between the next ones, over two steps; another stream fills nothing."""
    events = [kernel("a", 5, ts=ts) for ts in (100, 0, 15, 2100)]
    events[0]["ts"], events[0]["dur"] = 20.0, 80.0
    events += [kernel("b", 1000, ts=150, stream=13)]
    found = profiling.gaps({"traceEvents": events}, 2)
    assert found == {"short": 5.0, "long": 1000.0}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is damaged"),
        (gzip.compress(b"{}", mtime=0)[:-9], "is damaged"),
        (b"{}", "a trace of torch.profiler"),
        (b'{"traceEvents": []}', "no kernels"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_trace_of_a_gpu_is_told(
    content: bytes | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "trace.json").write_bytes(content)
    assert profiling.main([str(tmp_path / "trace.json")]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1
