"""Damaged checkpoints are refused by name, and fallen back from when asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from places import ROOT
from whole_runs import dies, equal, one_line
from zygote import Zygote

from train.disk.checkpoint import load_checkpoint, save_checkpoint


def test_a_damaged_checkpoint_is_refused_by_name_and_falls_back_when_asked(
    runs: Zygote, recipe: Path, tmp_path: Path
) -> None:
    words = ["--config", recipe, f"run.dir={tmp_path / 'run'}"]
    whole = load_checkpoint_of(runs, words, tmp_path / "run")
    last = tmp_path / "run" / "last.pt"
    content = last.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 3] ^= 4
    for damage in (content[: len(content) // 2], b"", bytes(flipped), b"cos\nsystem\n(S'touch payload'\ntR."):
        last.write_bytes(damage)
        code, _, err = runs.run(*words, "--resume")
        assert code == 2
        line = one_line(err)
        assert str(last) in line and "--fallback" in line
        assert not Path("payload").exists() and not (ROOT / "payload").exists()
    assert last.read_bytes() == damage
    code, out, err = runs.run(*words, "--resume", "--fallback")
    assert code == 0, err
    assert "WARNING" in out and "continuing from" in out
    assert equal(load_checkpoint(last), whole)


def load_checkpoint_of(runs: Zygote, words: list[Any], folder: Path) -> dict[str, Any]:
    code, _, err = runs.run(*words)
    assert code == 0, err
    return load_checkpoint(folder / "last.pt")


def test_falling_back_never_puts_the_damaged_file_in_the_place_of_the_good_one(
    runs: Zygote, recipe: Path, tmp_path: Path
) -> None:
    words = ["--config", recipe, f"run.dir={tmp_path / 'run'}"]
    assert runs.run(*words)[0] == 0
    (tmp_path / "run" / "last.pt").write_bytes(b"damaged")
    assert runs.run(*words, "--resume", "--fallback", before=dies("step"))[0] == 99
    for name in ("last.pt", "previous.pt"):
        load_checkpoint(tmp_path / "run" / name)
    both = tmp_path / "run"
    for name in ("last.pt", "previous.pt"):
        (both / name).write_bytes(b"damaged")
    code, _, err = runs.run(*words, "--resume", "--fallback")
    assert code == 2 and "previous.pt" in one_line(err)


def test_a_checkpoint_that_is_no_training_state_is_refused(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run" / "last.pt", {"model": {}})
    code, _, err = runs.run("--config", recipe, f"run.dir={tmp_path / 'run'}", "--resume")
    assert code == 2 and "lacks ema, optimizer" in one_line(err)
