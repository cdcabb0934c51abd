"""waiting.py: a process for each policy, in turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

SMALL = [
    "net.width=1",
    "train.batch_size=8",
    "train.eval_batch_size=8",
    "data.synthetic_count=16",
    "data.backend=torch",
]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="stops processes by signals")
def test_every_policy_trains_in_a_process_of_its_own_that_does_not_outlive_the_measurement(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "benchmarks" / "waiting.py"), "--rounds", "2", "--steps", "1"]
    words += ["--json", str(tmp_path / "report.json"), *SMALL]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # its processes are known by the recipe's path
    ended = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads(ended.stdout.splitlines()[-1])
    assert set(report["policies"]) == {"unset", "passive", "active"}
    for policy in report["policies"].values():
        assert len(policy["step_seconds"]) == len(policy["processor_seconds"]) == 2
        assert min(policy["step_seconds"] + policy["processor_seconds"]) > 0
    assert report["policies"]["unset"]["over_unset"] == 1
    if Path("/proc").is_dir():
        left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _read(path)]
        assert not left


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
