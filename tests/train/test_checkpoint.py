"""Checkpoints: whole or refused, and never a way to run code."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from train.disk.atomic import WriteError, remove_stale, write_atomic
from train.disk.checkpoint import FORMAT, CheckpointError, load_checkpoint, save_checkpoint, seal, unseal
from train.disk.folder import WRITTEN, RunFolder


@pytest.fixture
def state() -> dict[str, object]:
    torch.manual_seed(0)
    return {
        "model": {"w": torch.randn(5, 3).to(memory_format=torch.contiguous_format)},
        "epoch": 3,
        "names": ["a", "b"],
        "x": None,
    }


def test_round_trip_gives_equal_tensors_numbers_and_text(tmp_path: Path, state: dict[str, object]) -> None:
    save_checkpoint(tmp_path / "c.pt", state)
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])  # type: ignore[index]
    assert (loaded["epoch"], loaded["names"], loaded["x"]) == (3, ["a", "b"], None)
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_plain_torch_load_reads_the_sealed_file(tmp_path: Path, state: dict[str, object]) -> None:
    save_checkpoint(tmp_path / "c.pt", state)
    assert torch.load(tmp_path / "c.pt", weights_only=True)["epoch"] == 3


def test_seal_holds_the_sha256_of_the_file_before_it(tmp_path: Path, state: dict[str, object]) -> None:
    torch.save(state, tmp_path / "plain.pt")
    plain = (tmp_path / "plain.pt").read_bytes()
    assert seal(plain).endswith(b"sha256:" + hashlib.sha256(plain).hexdigest().encode())
    assert unseal(seal(plain)) == plain


def test_every_flipped_bit_is_noticed(tmp_path: Path, state: dict[str, object]) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, state)
    whole = path.read_bytes()
    places = random.Random(0).sample(range(len(whole)), 200) + list(range(len(whole) - 100, len(whole)))
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"c\.pt"):
            load_checkpoint(path)


@pytest.mark.parametrize("length", [0, 1, 2, 70, 71, 73, 500])
def test_truncated_file_is_refused(tmp_path: Path, state: dict[str, object], length: int) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, state)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="not usable"):
        load_checkpoint(path)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["PAYLOAD_TARGET"],)


def test_a_payload_is_refused_and_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "payload-ran"
    monkeypatch.setenv("PAYLOAD_TARGET", str(target))
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Payload()))
    torch.save({"format": 1, "model": Payload()}, tmp_path / "zip.pt")
    (tmp_path / "sealed.pt").write_bytes(seal((tmp_path / "zip.pt").read_bytes()))
    for name in ("raw.pt", "zip.pt", "sealed.pt"):
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(tmp_path / name)
    assert not target.exists()


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "no.pt")
    torch.save({"format": 99}, tmp_path / "f.pt")
    (tmp_path / "f.pt").write_bytes(seal((tmp_path / "f.pt").read_bytes()))
    with pytest.raises(CheckpointError, match="of format 99, this version reads format 3"):
        load_checkpoint(tmp_path / "f.pt")


def test_previous_checkpoint_is_kept_under_its_name(tmp_path: Path) -> None:
    for epoch in range(3):
        save_checkpoint(tmp_path / "last.pt", {"epoch": epoch}, keep_previous=tmp_path / "previous.pt")
    assert load_checkpoint(tmp_path / "last.pt")["epoch"] == 2
    assert load_checkpoint(tmp_path / "previous.pt")["epoch"] == 1


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.pt"
    write_atomic(path, b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_links_are_replaced_and_their_targets_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not hard_links:
        monkeypatch.setattr(os, "link", refuse)
    run, target = tmp_path / "run", tmp_path / "target"
    run.mkdir()
    target.write_text("mine")
    pid = os.getpid()
    for name in ("last.pt", "previous.pt", f".last.pt.{pid}.tmp", f".previous.pt.{pid}.tmp"):
        (run / name).symlink_to(target)
    for epoch in range(3):
        save_checkpoint(run / "last.pt", {"epoch": epoch}, keep_previous=run / "previous.pt")
        assert target.read_text() == "mine"
    assert load_checkpoint(run / "last.pt")["epoch"] == 2 and load_checkpoint(run / "previous.pt")["epoch"] == 1
    assert sorted(p.name for p in run.iterdir()) == ["last.pt", "previous.pt"]
    assert not any(p.is_symlink() for p in run.iterdir())


@pytest.mark.parametrize("through_a_link", [False, True])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_folder_or_a_pipe_is_not_replaced_by_a_file(tmp_path: Path, kind: str, through_a_link: bool) -> None:
    path = target = tmp_path / "there"
    if through_a_link:
        path = tmp_path / "link"
        path.symlink_to(target)
    target.mkdir() if kind == "folder" else os.mkfifo(target)
    before = path.lstat()
    with pytest.raises(WriteError, match="not a regular file"):
        write_atomic(path, b"new")
    assert os.path.samestat(path.lstat(), before)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, target.name}


def test_stale_temporary_files_go(tmp_path: Path) -> None:
    (tmp_path / ".last.pt.123.tmp").write_bytes(b"half")
    (tmp_path / "last.pt").write_bytes(b"whole")
    remove_stale(tmp_path, WRITTEN)
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_temporary_files_of_other_names_stay(tmp_path: Path) -> None:
    theirs = {".notes.tmp", ".notes.txt.123.tmp", ".last.pt.tmp", ".last.pt.mine.tmp", ".a.last.pt.1.tmp"}
    for name in theirs:
        (tmp_path / name).write_text("mine")
    remove_stale(tmp_path, WRITTEN)
    RunFolder(tmp_path).close()
    assert {p.name for p in tmp_path.iterdir()} - {".lock"} == theirs


LEAVES = st.none() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=9) | st.booleans()
PLAIN = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=9,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(state=st.dictionaries(st.text(max_size=5), PLAIN, max_size=4), numbers=st.lists(st.floats(width=32), max_size=9))
def test_any_plain_state_comes_back_equal(tmp_path: Path, state: dict[str, Any], numbers: list[float]) -> None:
    tensor = torch.tensor(numbers)
    save_checkpoint(tmp_path / "c.pt", {**state, "tensor": tensor, "format": FORMAT})
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert {key: loaded[key] for key in state if key not in ("tensor", "format")} == {
        key: value for key, value in state.items() if key not in ("tensor", "format")
    }
    assert loaded["tensor"].numpy().tobytes() == tensor.numpy().tobytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
@given(content=st.binary(max_size=300), sealed=st.booleans())
def test_any_other_bytes_are_refused_by_name(tmp_path: Path, content: bytes, sealed: bool) -> None:
    if sealed:  # a right digest over anything: what is behind it is not trusted either
        content = seal(content + b"\0\0")
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"c\.pt"):
        load_checkpoint(tmp_path / "c.pt")
