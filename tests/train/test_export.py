"""Exports: each gives the network's logits, from its file alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT

import train.export
from dali_pipeline import sources
from dali_pipeline.dataset import Split
from dali_pipeline.options import DataOptions
from net import build
from net.options import NetOptions
from train.config import Config, changed
from train.disk.checkpoint import load_checkpoint, save_checkpoint
from train.disk.snapshot import load_snapshot
from train.export import ExportError, Subject, export, main, subject
from train.run import fit
from train.screen.log import Log


@pytest.fixture
def run(quick_config: Config, tmp_path: Path) -> Path:
    values = {
        "train.ema_decay": 0.9,
        "train.epochs": 1,
        "schedule.peak_epoch": 0.5,
        "data.backend": "torch",
        "net.width": 4,
    }
    fit(changed(quick_config, values), tmp_path / "run", log=Log(quiet=True))
    return tmp_path / "run"


def digits() -> Split:
    return sources.load(DataOptions(name="digits")).test


def accuracy(logits: torch.Tensor) -> float:
    labels = torch.from_numpy(digits().labels)
    return 100 * int((logits.argmax(1) == labels).sum()) / len(labels)


def pixels() -> torch.Tensor:
    return torch.from_numpy(digits().images).permute(0, 3, 1, 2)


def test_safetensors_hold_all_that_is_needed_for_the_accuracy_of_the_checkpoint(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed (extra: export)")
    from safetensors.torch import load_file

    assert main([str(run)]) == 0
    assert "to 0.0e+00" in capsys.readouterr().out
    path = run / "export" / "model.safetensors"
    about = about_tensors(path)
    net = build(NetOptions(width=about["width"], logit_scale=about["logit_scale"]), len(about["class_names"]))
    net.load_state_dict(load_file(path))
    mean, std = (torch.tensor(about[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        logits = net.eval()((pixels() - mean) / std)
    assert accuracy(logits) == load_checkpoint(run / "best.pt")["test_accuracy"] == about["test_accuracy"]
    assert about["height_and_width"] == [32, 32]
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.safetensors"]
    assert path.stat().st_mode & 0o777 == (run / "config.yaml").stat().st_mode & 0o777


def test_ema_exports_the_average_and_is_refused_without_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed (extra: export)")
    from safetensors.torch import load_file

    assert main([str(run), "--ema"]) == 0
    state = load_checkpoint(run / "best.pt")
    exported = load_file(run / "export" / "model.safetensors")
    assert torch.equal(exported["prep.0.weight"], state["ema"]["module.prep.0.weight"])
    assert not torch.equal(exported["prep.0.weight"], state["model"]["prep.0.weight"])
    about = about_tensors(run / "export" / "model.safetensors")
    assert about["weights"] == "average" and about["test_accuracy"] == state["metrics"][-1]["ema_test_accuracy"]
    averaged = subject(load_snapshot(run / "best.pt"), ema=True).program()
    with torch.no_grad():
        assert accuracy(averaged(pixels())) == about["test_accuracy"]
    state["ema"] = None
    save_checkpoint(run / "best.pt", state)
    assert main([str(run), "--ema"]) == 2
    assert "kept no average" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.pt2", "model.onnx"])
def test_programs_take_uint8_images_of_any_number(run: Path, name: str) -> None:
    for package in train.export.REQUIRED_PACKAGES[name]:
        pytest.importorskip(package, reason=f"{package} is not installed (extra: export)")
    snapshot = load_snapshot(run / "best.pt")
    exported, images = subject(snapshot), pixels()
    difference = export(run, name, exported, images[:64])
    assert difference <= train.export.TOLERANCES[name]
    logits = run_program(run / name, images)
    assert accuracy(logits) == load_checkpoint(run / "best.pt")["test_accuracy"]
    with torch.no_grad():
        torch.testing.assert_close(run_program(run / name, images[:1]), exported.program()(images[:1]))
    about = about_program(run / name)
    assert about["class_names"] == [str(digit) for digit in range(10)]
    assert about["height_and_width"] == [32, 32] and "uint8" in about["input"]


def about_tensors(path: Path) -> Any:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["about"])


def about_program(path: Path) -> Any:
    if path.suffix == ".pt2":
        files = {"about": ""}
        torch.export.load(path, extra_files=files)
        return json.loads(files["about"])
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return json.loads(session.get_modelmeta().custom_metadata_map["about"])


def run_program(path: Path, images: torch.Tensor) -> torch.Tensor:
    if path.suffix == ".pt2":
        with torch.no_grad():
            return torch.export.load(path).module()(images)  # type: ignore[no-any-return]
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def test_an_export_that_differs_is_not_kept_and_the_older_one_stays(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(path: Path, subject: Subject, images: torch.Tensor) -> Any:
        path.write_bytes(b"new")
        return lambda batch: subject.program()(batch) + 0.01

    monkeypatch.setitem(train.export.MAKERS, "model.onnx", wrong)
    (run / "model.onnx").write_bytes(b"old")
    snapshot = load_snapshot(run / "best.pt")
    with pytest.raises(ExportError, match="differs from the network by"):
        export(run, "model.onnx", subject(snapshot), pixels()[:32])
    assert (run / "model.onnx").read_bytes() == b"old"
    assert not list(run.glob(".*tmp*"))


def test_an_export_is_never_written_through_a_link(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def made(path: Path, subject: Subject, images: torch.Tensor) -> Any:
        path.write_bytes(b"new")
        return subject.program()

    monkeypatch.setitem(train.export.MAKERS, "model.safetensors", made)
    monkeypatch.setattr(train.export, "require", lambda name: None)
    target, folder = tmp_path / "mine", run / "export"
    target.write_bytes(b"mine")
    folder.mkdir()
    for name in ("model.safetensors", ".model.safetensors.tmp.safetensors"):
        (folder / name).symlink_to(target)
    assert main([str(run)]) == 0
    assert target.read_bytes() == b"mine"
    assert [(path.name, path.is_symlink(), path.read_bytes()) for path in folder.iterdir()] == [
        ("model.safetensors", False, b"new")
    ]
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    capsys.readouterr()
    assert main([str(run)]) == 2
    assert f"{folder}: is a symbolic link" in capsys.readouterr().err


def test_what_cannot_be_exported_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed (extra: export)")
    assert main([str(tmp_path / "none")]) == 2
    assert "no such checkpoint" in capsys.readouterr().err
    state = load_checkpoint(run / "best.pt")
    state["config"]["data"]["name"] = "cifar10"
    save_checkpoint(run / "other.pt", state)
    assert main([str(run), "--checkpoint", "other.pt", "--data-root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "could not be fetched" in error and "--data-root DIR names the folder" in error
    monkeypatch.setattr(train.export.importlib.util, "find_spec", lambda name: None)
    assert main([str(run), "--onnx"]) == 2
    error = capsys.readouterr().err
    assert "needs safetensors: pip install -e '.[export]'" in error and len(error.splitlines()) == 1
    with pytest.raises(ExportError, match="onnx, onnxscript, onnxruntime"):
        train.export.require("model.onnx")


def test_the_extra_names_every_package_that_an_export_needs() -> None:
    import configparser

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extra = setup["options.extras_require"]["export"]
    assert all(package in extra for packages in train.export.REQUIRED_PACKAGES.values() for package in packages)


@pytest.mark.slow
@pytest.mark.parametrize(
    "activation", ["gelu", pytest.param("celu", marks=pytest.mark.long), pytest.param("silu", marks=pytest.mark.long)]
)
def test_every_export_holds_the_whitening_and_the_activation(
    quick_config: Config, tmp_path: Path, activation: str
) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed (extra: export)")
    values = {"train.epochs": 1, "schedule.peak_epoch": 0.5, "data.backend": "torch", "net.whitening": True}
    fit(changed(quick_config, {**values, "net.activation": activation}), tmp_path / "run", log=Log(quiet=True))
    snapshot = load_snapshot(tmp_path / "run" / "best.pt")
    exported = subject(snapshot)
    assert torch.isfinite(exported.net.state_dict()["whitening.weight"]).all()
    for name in ("model.safetensors", "model.pt2", "model.onnx"):
        for package in train.export.REQUIRED_PACKAGES[name]:
            pytest.importorskip(package, reason=f"{package} is not installed (extra: export)")
        assert export(tmp_path, name, exported, pixels()[:64]) <= train.export.TOLERANCES[name]
