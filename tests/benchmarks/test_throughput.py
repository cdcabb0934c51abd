"""throughput.py: its stages, and what it prints and writes; no times."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ablations, throughput
from benchmarks.footprint import footprint_of
from benchmarks.measure import CannotMeasure
from benchmarks.peers import Task, WrongImages
from benchmarks.stages import Kind, Pipeline, TimedLoader, Training, each_alone, pipeline_kinds, training_flops
from dali_pipeline import backend
from dali_pipeline.dataset import Split
from dali_pipeline.feed import FeedOrder
from dali_pipeline.loader import TrainLoader
from dali_pipeline.plan import NO_AUGMENT, Augment
from dali_pipeline.sources.synthetic import random_dataset
from net import build
from net.options import NetOptions
from train.config import Config, changed
from train.screen.log import Log
from train.session import Session


def test_training_flops_are_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    net = build(NetOptions(width=8), 10)
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(2, 3, 32, 32)).sum().backward()
    assert 2 * training_flops(net, 32, 32) == counter.get_total_flops()
    with torch.device("meta"):
        full_width = build(NetOptions(), 10)
    assert training_flops(full_width, 32, 32) == pytest.approx(2.272e9, rel=1e-3)


@pytest.fixture
def tiny(quick_config: Config) -> Config:
    return changed(quick_config, {"data.name": "synthetic", "data.synthetic_count": 512, "train.batch_size": 64})


def quiet_session(config: Config) -> Session:
    return Session(config, Log(quiet=True))


def test_end_to_end_is_the_trainers_own_epoch(tiny: Config) -> None:
    with quiet_session(tiny) as session, quiet_session(tiny) as other_session:
        training, reference = Training(session), Training(other_session)
        # 19 steps in three pieces, one across an epoch's end: the plan goes on where the last piece stopped
        assert sum(training.run_end_to_end(steps) for steps in (3, 11, 5)) == 19 * 64
        for epoch in range(3):
            for step, (images, labels) in enumerate(reference.trainer.train_loader.epoch(epoch)):
                if epoch * 8 + step < 19:
                    reference.trainer.step.train()
                    reference.trainer.train_one(images, labels, training.schedule(0))
                    reference.trainer.net.steps += 1  # an epoch counts them
        weights = reference.trainer.net.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in training.trainer.net.state_dict().items())
        assert 0 < training.waited < training.spent


def test_timed_loader_changes_no_batch() -> None:
    dataset = random_dataset(count=512)
    pipeline = Pipeline(dataset, Kind("torch", torch.device("cpu")), batch_size=64, augment=Augment())
    timed = TimedLoader(pipeline.loader)
    for (images, labels), (wanted, wanted_labels) in zip(timed.epoch(1, 3), pipeline.loader.epoch(1, 3), strict=True):
        assert torch.equal(images, wanted) and torch.equal(labels, wanted_labels)
    assert timed.waited > 0 and timed.steps_per_epoch == 8


TINY_WORDS = ["--no-peers", "--repeats", "2", "data.synthetic_count=512", "net.width=2", "train.batch_size=64"]
TINY_WORDS += ["train.eval_batch_size=100", "train.compile=off", "train.device=cpu", "train.precision=fp32"]


def test_throughput_prints_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.stages.find_compiler", lambda device: (False, "no compiler"))
    monkeypatch.setattr(throughput, "QUICK_SECONDS", 0.01)
    path, trace, picture = tmp_path / "out" / "r.json", tmp_path / "trace.json", tmp_path / "throughput.png"
    words = ["--quick", *TINY_WORDS, "--json", str(path), "--profile", str(trace), "--picture", str(picture)]
    words += ["--ablate", "prefetch", "--ablate", "graph", "--ablate", "channels_last"]
    words += ["augment.pad=2", "augment.cutout=6"]
    asked: list[Augment] = []
    drawn: list[str] = []

    def loader(split: Split, order: FeedOrder, **how: Any) -> TrainLoader:
        if len(split) == 512:  # the check of the pixels has images of its own
            asked.append(order.augment)
        return TrainLoader(split, order, **how)

    draw = ablations.draw

    def draw_noted(report: dict[str, Any], path: Path) -> None:
        drawn.append(list(report["ablations"])[-1])
        draw(report, path)

    with monkeypatch.context() as patched:
        patched.setattr("benchmarks.stages.TrainLoader", loader)
        patched.setattr("benchmarks.ablations.draw", draw_noted)
        assert throughput.main(words) == 0
    assert set(asked) == {Augment(pad=2, cutout=6)}, "a pipeline alone is the one that training uses"
    assert drawn == ["prefetch", "graph", "channels_last"]
    output = capsys.readouterr().out.splitlines()
    report = json.loads(output[-1])
    assert report == json.loads(path.read_text())
    assert {"machine", "versions", "commit", "command", "stages", "peers", "ratios", "verdict"} <= report.keys()
    assert str(tmp_path) not in report["command"] and "--json FILE" in report["command"]
    assert report["settings"]["augment"]["pad"] == 2 and report["settings"]["image_size"] == [32, 32]
    assert report["device_peak_gib"] is None
    stages = {"pipeline_torch_eager_cpu", "pipeline", "step", "end_to_end", "evaluation"}
    assert stages <= report["stages"].keys()
    for rate in report["stages"].values():
        assert rate.keys() == {"median", "spread", "repeats", "samples"} and rate["median"] > 0 and rate["repeats"] >= 2
    assert {"overlap", "model_flop_utilisation", "pipeline_share_of_training_thread"} <= report["ratios"].keys()
    assert report["left_out"]["pipeline_torch_compiled_cpu"] == "no compiler"
    assert report["verdict"] in "\n".join(output)
    assert [row["setting"] for row in report["ablations"]["channels_last"]] == ["channels_last on", "channels_last off"]
    assert all(row["step"]["median"] > 0 for row in report["ablations"]["channels_last"])
    if "pipeline_dali_cpu" in report["stages"]:
        assert len(report["ablations"]["graph"]) == 4
        assert not any("left_out" in row for row in report["ablations"]["graph"] + report["ablations"]["prefetch"])
        assert report["ratios"]["dali_over_torch_eager"] > 0
    assert picture.stat().st_size > 0
    assert json.loads(trace.read_text())["traceEvents"]
    kernels = [line for line in output if line.rstrip().endswith("calls")]
    assert kernels and "us a step" in kernels[0]


def test_what_fails_is_left_out_by_name_and_wrong_pixels_end_in_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.json"

    def check_of(make: Any) -> None:
        if make.args[0].backend == "torch":
            raise WrongImages("pixels differ")
        raise RuntimeError("no memory\nat all")

    class Silent:
        def __init__(self, name: str) -> None:
            self.name = name

        def warm_up(self) -> None: ...

        def sample(self) -> float:
            raise CannotMeasure("no answer")

    class Host:
        """A peer that gives no sample."""

        def __init__(self, task: Task) -> None:
            assert "verdict" in json.loads(path.read_text()), "what is ours is measured and saved by now"

        def stage(self, name: str, seconds: float) -> Any:
            return Silent(name)

        def close(self) -> None: ...

    monkeypatch.setattr("benchmarks.stages.find_compiler", lambda device: (False, "no compiler"))
    monkeypatch.setattr(throughput, "QUICK_SECONDS", 0.01)
    monkeypatch.setattr("benchmarks.peers.check_loader", check_of)
    monkeypatch.setattr("benchmarks.peers.PeerHost", Host)
    assert throughput.main(["--quick", "--json", str(path), *TINY_WORDS[1:]]) == 1
    report = json.loads(path.read_text())
    assert report["left_out"]["pipeline_torch_eager_cpu"] == "WrongImages: pixels differ"
    assert report["left_out"]["torchvision_pil_2_workers"] == "no answer" and report["peers"] == {}
    assert report["left_out"]["pipeline_dali_cpu"] == "RuntimeError: no memory" or not dali_runs()
    assert report["wrong_pixels"] == ["pipeline_torch_eager_cpu"] and report["ratios"]["overlap"] > 0
    assert "error: pipeline_torch_eager_cpu: WrongImages: pixels differ" in capsys.readouterr().err


def dali_runs() -> bool:
    return "pipeline_dali_cpu" in pipeline_kinds([torch.device("cpu")])[0]


def test_wrong_pixels_in_dalis_probe_are_told_from_a_missing_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(device: torch.device) -> str:
        raise backend.WrongPixels("7 of 24 images differ from the reference")

    monkeypatch.setattr(backend, "probe", wrong)
    _, left_out = pipeline_kinds([torch.device("cpu")])
    assert throughput.WRONG_PIXELS in left_out["pipeline_dali_cpu"]


def test_every_key_of_synthetic_data_is_used(tiny: Config) -> None:
    config = changed(tiny, {"data.synthetic_size": 64, "data.synthetic_classes": 3})
    with quiet_session(config) as session:
        dataset = Training(session).trainer.dataset
    assert (dataset.train.height, dataset.train.width, dataset.num_classes, len(dataset.train)) == (64, 64, 3, 512)


def test_augmentations_alone_are_those_of_the_recipe() -> None:
    assert each_alone(Augment(pad=2, padding_mode="reflect", flip=False, cutout=6)) == {
        "none": NO_AUGMENT,
        "crop": Augment(pad=2, padding_mode="reflect", flip=False, cutout=0),
        "cutout": Augment(crop=False, pad=0, flip=False, cutout=6),
        "all": Augment(pad=2, padding_mode="reflect", flip=False, cutout=6),
    }


def test_throughput_refuses_augmentations_that_the_peers_do_not_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput.main(["augment.pad=2"]) == 2
    assert "augment.pad: 2 here, 4 in the other pipelines; measure without them: --no-peers" in capsys.readouterr().err


def test_throughput_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput.main(["net.widht=8"]) == 2
    assert "did you mean net.width" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        throughput.main(["--ablate", "nothing"])


def test_a_run_from_the_outside(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    said: list[str] = []
    found = footprint_of(tiny, said.append)
    assert found["seconds_to_first_step"] > 0 and found["images"] == 512
    if sys.platform == "linux":
        assert found["peak_mib"] >= max(found["resident_mib"].values()) > 0
    assert "first step after" in said[0]
