"""Whether images fit the device: made-up machines and containers, sizes counted by hand, and what a large memory map costs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from dali_pipeline import memory
from dali_pipeline.dataset import Split
from dali_pipeline.feed import FeedOrder
from dali_pipeline.loader import EvalLoader, TrainLoader
from dali_pipeline.memory import choose_residence, host_free_bytes, resident_bytes
from dali_pipeline.plan import NO_AUGMENT, Augment
from dali_pipeline.resident import resident_images

CPU = torch.device("cpu")
MIB = 1 << 20


def blank(count: int, height: int = 8, width: int = 8) -> Split:
    return Split(np.zeros((count, height, width, 3), np.uint8), np.zeros(count, np.int64))


def machine(folder: Path, available: int | None, cgroup: str = "", **files: dict[str, object]) -> dict[str, Path]:
    """A /proc and a /sys/fs/cgroup below the folder; `files` by control group, "__" for a slash: its files by name, "_" for a
    point."""
    proc, cgroups = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    if available is not None:
        (proc / "meminfo").write_text(
            f"MemTotal: 9999999 kB\nMemAvailable: {available // 1024} kB\nHugePages_Total: 0\n"
        )
    (proc / "self" / "cgroup").write_text(cgroup)
    for group, contents in files.items():
        path = cgroups / group.replace("__", "/").strip("/")
        path.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (path / name.replace("memory_", "memory.")).write_text(f"{content}\n")
    return {"proc": proc, "cgroups": cgroups}


def test_what_is_free_is_what_the_kernel_says_is_available(tmp_path: Path) -> None:
    assert host_free_bytes(**machine(tmp_path, 700 * MIB)) == 700 * MIB


def test_a_container_leaves_its_limit_less_what_is_in_use_and_not_cached(tmp_path: Path) -> None:
    stat = f"anon 5\nactive_file {30 * MIB}\ninactive_file {50 * MIB}"
    inside = {"memory_max": 512 * MIB, "memory_current": 200 * MIB, "memory_stat": stat}
    assert host_free_bytes(**machine(tmp_path, 4000 * MIB, "0::/\n", __=inside)) == (512 - 200 + 80) * MIB


def test_the_tightest_group_around_a_process_counts(tmp_path: Path) -> None:
    groups = {
        "a__b": {"memory_max": "max", "memory_current": 3 * MIB},
        "a": {"memory_max": 64 * MIB, "memory_current": 60 * MIB},
        "__": {"memory_max": 512 * MIB, "memory_current": 80 * MIB},
    }
    assert host_free_bytes(**machine(tmp_path, 4000 * MIB, "0::/a/b\n", **groups)) == 4 * MIB


def test_a_group_that_uses_more_than_its_limit_leaves_nothing(tmp_path: Path) -> None:
    over = {"memory_max": 10 * MIB, "memory_current": 12 * MIB}
    assert host_free_bytes(**machine(tmp_path, 4000 * MIB, "0::/\n", __=over)) == 0


def test_control_groups_of_version_1_are_read_too(tmp_path: Path) -> None:
    stat = f"inactive_file 1\ntotal_active_file {MIB}\ntotal_inactive_file {2 * MIB}"
    inside = {"memory_limit_in_bytes": 100 * MIB, "memory_usage_in_bytes": 90 * MIB, "memory_stat": stat}
    made = machine(tmp_path, 4000 * MIB, "5:cpu:/x\n4:memory:/job\n0::/\n", memory__job=inside)
    assert host_free_bytes(**made) == 13 * MIB


def test_a_system_that_tells_nothing_is_unknown_and_keeps_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert host_free_bytes(tmp_path / "none", tmp_path / "none") is None
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    found = choose_residence("auto", blank(100), NO_AUGMENT, CPU)
    assert found.resident and "unknown" in found.reason


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems tell nothing")
def test_this_machine_has_memory_free() -> None:
    free = host_free_bytes()
    assert free is not None and 0 < free < 1 << 50


@pytest.mark.parametrize(
    "augment", [Augment(), NO_AUGMENT, Augment(flip=False, pad=2), Augment(crop=False, pad=9)], ids=str
)
def test_the_size_is_that_of_the_images_as_they_are_laid_out(augment: Augment) -> None:
    split = blank(7, 16, 24)
    border = augment.pad if augment.crop else 0
    assert resident_bytes(split, augment) == resident_images(split, CPU, border=border, mirrored=augment.flip).nbytes


def test_auto_keeps_images_that_take_half_of_what_is_free_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    split = blank(100)
    needed = 100 * 8 * 8 * 3
    for free, processes, resident in ((2 * needed, 1, True), (2 * needed - 1, 1, False), (4 * needed, 2, True)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert choose_residence("auto", split, NO_AUGMENT, CPU, processes).resident == resident
        assert choose_residence("always", split, NO_AUGMENT, CPU, processes).resident
        assert not choose_residence("never", split, NO_AUGMENT, CPU, processes).resident
    with pytest.raises(ValueError, match="'maybe', expected 'auto', 'always' or 'never'"):
        choose_residence("maybe", split, NO_AUGMENT, CPU)  # type: ignore[arg-type]


def test_loaders_choose_by_what_is_free_and_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 30_000)
    order = FeedOrder(batch_size=10, augment=NO_AUGMENT, fill=(0, 0, 0), device=CPU)
    for count, resident in ((70, True), (100, False)):
        train = TrainLoader(blank(count), order, seed=0, backend="torch")
        held = EvalLoader(blank(count), batch_size=10, device=CPU, backend="torch")
        for loader in (train, held):
            assert loader.residence.resident == resident
            sizes = f"{count * 192 / 1e6:.2f} MB as resident images, 0.03 MB free on cpu for this process"
            assert loader.residence.reason == sizes
            loader.close()


MAPPED = """
import re, sys, threading, time
import numpy as np, torch
from dali_pipeline.dataset import Split, with_statistics
from dali_pipeline.feed import FeedOrder
from dali_pipeline.hold_out import hold_out
from dali_pipeline.loader import EvalLoader, TrainLoader
from dali_pipeline.plan import Augment

path, backend, count, side = sys.argv[1], sys.argv[2], 200_000, 16
augments = {"padded": Augment(), "resized": Augment(crop=False, scale=0.3, flip_rule="alternating")}
augment = augments[sys.argv[3]]


def anonymous():
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", file.read())[1])


def use(count):
    pixels = np.memmap(path, np.uint8, "r", shape=(200_000, side, side, 3))
    split = Split(pixels, np.arange(200_000) % 7).take(slice(count))
    names = tuple("abcdefg")
    data = hold_out(with_statistics("mapped", split, split.take(slice(count // 10)), names, "a file"), 0.1)
    order = FeedOrder(batch_size=500, augment=augment, fill=data.fill, device=torch.device("cpu"), resident="never")
    train = TrainLoader(data.train, order, seed=0, backend=backend)
    held = EvalLoader(data.validation, batch_size=500, device=torch.device("cpu"), backend=backend, resident="never")
    for epoch in range(3):
        for images, labels in train.epoch(epoch):
            pass
        for images, labels, valid in held:
            pass
    train.close()
    held.close()


use(2_000)
before, most, done = anonymous(), 0, False


def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.001)


watcher = threading.Thread(target=watch)
watcher.start()
try:
    use(count)
finally:
    done = True
    watcher.join()
print((most - before) / count)
"""


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("augment", ["padded", "resized"])
@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_a_memory_map_of_200_000_images_costs_at_most_200_bytes_of_memory_an_image(
    backend: str, augment: str, tmp_path: Path
) -> None:
    """Statistics, validation split, three epochs and evaluations; an image itself has 768 bytes."""
    path = tmp_path / "pixels"
    np.random.default_rng(0).integers(0, 256, 200_000 * 768, np.uint8).tofile(path)
    command = [sys.executable, "-c", textwrap.dedent(MAPPED), str(path), backend, augment]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    print(f"{backend}, {augment}: {float(done.stdout):.0f} bytes an image")
    assert 0 < float(done.stdout) <= 200
