"""How many processors a process may use: in containers of both versions of cgroups, and under taskset."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from dali_pipeline.processors import usable_processors

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "33 25 0:28 {} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
OTHERS = "22 1 8:1 / / rw - ext4 /dev/vda rw\n36 25 0:33 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def machine(root: Path, groups: str, mounts: str, files: dict[str, str]) -> Path:
    """A tree with the two files of /proc that say where this process's groups are, and the groups' own files."""
    for name, text in {"proc/self/cgroup": groups, "proc/self/mountinfo": f"{OTHERS}\n{mounts}\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("quota", "threads"), [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("max 100000", 8)]
)
def test_a_container_of_version_2_limits_the_threads(tmp_path: Path, quota: str, threads: int) -> None:
    root = machine(tmp_path, "0::/\n", V2, {"sys/fs/cgroup/cpu.max": f"{quota}\n"})
    assert usable_processors(root)[0] == threads


def test_the_smallest_quota_on_the_way_up_counts(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/job/cpu.max": "300000 100000\n",
        "sys/fs/cgroup/job/step/cpu.max": "max 100000\n",
        "sys/fs/cgroup/another/cpu.max": "100000 100000\n",
    }
    root = machine(tmp_path, "0::/job/step\n", V2, files)
    assert usable_processors(root) == (3, "a cgroup's quota of 3 processors")


@pytest.mark.parametrize("mounted", ["/", "/docker/abc"], ids=["the host's root", "the container's group"])
@pytest.mark.parametrize(("quota", "threads"), [("250000", 3), ("-1", 8)])
def test_a_container_of_version_1_limits_the_threads(tmp_path: Path, mounted: str, quota: str, threads: int) -> None:
    group = "sys/fs/cgroup/cpu,cpuacct" + ("/docker/abc" if mounted == "/" else "")
    files = {f"{group}/cpu.cfs_quota_us": f"{quota}\n", f"{group}/cpu.cfs_period_us": "100000\n"}
    root = machine(tmp_path, "9:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/\n", V1.format(mounted), files)
    assert usable_processors(root)[0] == threads


def test_a_group_named_from_outside_the_container_is_the_one_that_is_mounted(tmp_path: Path) -> None:
    root = machine(
        tmp_path, "0::/../other\n", V2.replace(" / ", " /pod/x ", 1), {"sys/fs/cgroup/cpu.max": "1000 1000\n"}
    )
    assert usable_processors(root)[0] == 1


@pytest.mark.parametrize("text", ["", "max\n", "a b\n", "100 0\n", "1 2 3\n"])
def test_files_that_say_nothing_limit_nothing(tmp_path: Path, text: str) -> None:
    root = machine(tmp_path, "0::/\nodd\n", f"{V2}\nodd", {"sys/fs/cgroup/cpu.max": text})
    assert usable_processors(root)[0] == 8
    assert usable_processors(tmp_path / "nothing") == (8, "all processors of the machine")


def test_affinity_and_quota_count_whichever_is_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = machine(tmp_path, "0::/\n", V2, {"sys/fs/cgroup/cpu.max": "400000 100000\n"})
    for processors, expected in ((2, (2, "the process's affinity")), (6, (4, "a cgroup's quota of 4 processors"))):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=processors: set(range(n)))
        assert usable_processors(root) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="taskset is Linux's")
def test_under_taskset_a_process_counts_its_own_processors() -> None:
    code = "import dali_pipeline.processors as p; print(p.usable_processors()[0])"
    words = ["taskset", "-c", str(min(os.sched_getaffinity(0))), sys.executable, "-c", code]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "1\n"
