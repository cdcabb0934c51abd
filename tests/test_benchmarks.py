"""The benchmarks: their statistics, what they conclude, what they let pass as correct, what they write; no times."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import CONFIGS
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import ablations, accuracy, machine, tables, throughput
from benchmarks.footprint import footprint_of
from benchmarks.measure import (
    CannotMeasure,
    Rate,
    Stage,
    device_peak_gib,
    interleave,
    matrix_stage,
    mean_and_interval,
    student_t,
)
from benchmarks.peers import (
    ANSWER_SECONDS,
    CHECK_FILL,
    CUTOUT,
    PeerError,
    PeerHost,
    Task,
    WrongImages,
    check,
    check_augmented,
    check_loader,
    check_plain,
    peers,
)
from benchmarks.stages import (
    Pipeline,
    TimedLoader,
    Training,
    each_alone,
    load_data,
    pipeline_kinds,
    training_flops,
)
from dali_pipeline import dali_graph
from dali_pipeline.datasets import synthetic
from dali_pipeline.loader import TrainLoader
from dali_pipeline.plan import NO_AUGMENT, Augment, draw_plan
from net.resnet import CustomResNet
from train.checkpoint import load_checkpoint
from train.config import Config, to_yaml
from train.fit import fit
from train.record import Log

ROOT = CONFIGS.parent
positive = st.floats(1e-3, 1e9)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on cores that others use wait for each other most of the time, and nothing here needs them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# statistics


@given(st.lists(positive, min_size=1, max_size=30))
def test_median_and_spread_are_numpys(samples: list[float]) -> None:
    rate = Rate(tuple(samples))
    first, middle, third = np.percentile(samples, [25, 50, 75])
    assert rate.median == pytest.approx(middle)
    assert rate.spread == pytest.approx(third - first, abs=1e-6)
    record = rate.record()
    assert record["samples"] == pytest.approx(samples, rel=1e-4) and record["repeats"] == len(samples)
    assert (record["median"], record["spread"]) == (rate.median, rate.spread)


def test_ratio_pairs_the_samples_of_a_round() -> None:
    # the machine gets three times slower: the medians say 1, every pair says 2
    assert Rate((20.0, 10.0, 6.0)).over(Rate((10.0, 5.0, 3.0))) == 2
    assert Rate((2.0, 9.0, 4.0)).over(Rate((1.0, 1.0, 2.0))) == 2
    with pytest.raises(ValueError, match="3 samples do not pair with 2"):
        Rate((1.0, 2.0, 3.0)).over(Rate((1.0, 2.0)))


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 10, 49, 200, 399])
def test_student_t_is_scipys(freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)
    assert student_t(freedom, 0.5) == pytest.approx(stats.t.ppf(0.75, freedom), rel=1e-9)


def test_interval_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = [93.8, 94.1, 94.02, 93.95, 94.3]
    mean, deviation, half_width = mean_and_interval(values)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert deviation == pytest.approx(np.std(values, ddof=1))
    assert (mean - half_width, mean + half_width) == pytest.approx((low, high))
    assert mean_and_interval([94.0]) == (94.0, None, None)


class Scripted:
    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order = name, order

    def warm_up(self) -> None:
        self.order.append(f"warm {self.name}")

    def sample(self) -> float:
        self.order.append(self.name)
        return float(len(self.order))


def test_stages_take_turns_and_every_other_round_runs_backwards() -> None:
    order: list[str] = []
    rates = interleave([Scripted("a", order), Scripted("b", order)], 3)
    assert order == ["warm a", "warm b", "a", "b", "b", "a", "a", "b"]
    assert rates["a"].samples == (3.0, 6.0, 7.0) and rates["b"].samples == (4.0, 5.0, 8.0)
    with pytest.raises(ValueError, match="different names"):
        interleave([Scripted("a", order), Scripted("a", order)], 1)


class Failing(Scripted):
    def sample(self) -> float:
        if self.order.count(self.name) == 1:
            raise CannotMeasure("no answer")
        return super().sample()


def test_a_stage_that_fails_leaves_and_the_others_go_on_in_pairs() -> None:
    order: list[str] = []
    gone: dict[str, str] = {}
    stages = [Scripted("a", order), Failing("b", order), Scripted("c", order)]
    rates = interleave(stages, 3, gone.__setitem__)
    assert order == ["warm a", "warm b", "warm c", "a", "b", "c", "c", "a", "a", "c"]
    assert gone == {"b": "no answer"} and rates.keys() == {"a", "c"}
    assert rates["a"].over(rates["c"]) > 0
    with pytest.raises(CannotMeasure):
        interleave([Failing("b", [])], 2)


def test_peak_of_device_memory_is_torchs_and_none_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    assert device_peak_gib(torch.device("cuda")) == 1.5
    assert device_peak_gib(torch.device("cpu")) is None


@pytest.mark.parametrize(("seconds", "epoch", "steps"), [(1.0, 1, 20), (1.0, 7, 21), (1.0, 97, 20), (4.0, 97, 97)])
def test_a_chunk_lasts_as_asked_in_whole_epochs_where_that_is_not_much_more(
    monkeypatch: pytest.MonkeyPatch, seconds: float, epoch: int, steps: int
) -> None:
    clock = [0.0]

    def run(count: int) -> float:
        clock[0] += 0.05 * count
        return 512.0 * count

    monkeypatch.setattr("benchmarks.measure.time.perf_counter", lambda: clock[0])
    stage = Stage("s", run, torch.device("cpu"), seconds, epoch)
    stage.warm_up()
    assert abs(stage.steps - steps) <= (epoch == 1)  # of rounding
    assert stage.sample() == pytest.approx(512 / 0.05)


def test_matrix_stage_counts_two_operations_a_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: calls.append((*a.shape, *b.shape)))
    operations = matrix_stage(torch.device("cpu"), "fp32", 1.0).run(3)
    assert operations == sum(2 * rows * inner * columns for rows, inner, _, columns in calls) and len(calls) == 3


def test_training_flops_are_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    net = CustomResNet(10, 8)
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(2, 3, 32, 32)).sum().backward()
    assert 2 * training_flops(8) == counter.get_total_flops()
    assert training_flops(64) == pytest.approx(2.272e9, rel=1e-3)


def test_a_recorded_command_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    words = ["--json", str(tmp_path / "r.json"), f"--picture={tmp_path}/p.png", f"data.root={tmp_path}", "net.width=2"]
    assert machine.command("throughput", [*words, "--data-root", "~/data", "--quick"]) == (
        "python benchmarks/throughput.py --json FILE --picture=FILE data.root=DIR net.width=2 --data-root DIR --quick"
    )
    words = [
        str(ROOT / "configs" / "onecycle.yaml"),
        "--runs",
        "2",
        "--json",
        "benchmarks/results/a.json",
        "data.root=data",
    ]
    assert machine.command("accuracy", words) == (
        "python benchmarks/accuracy.py configs/onecycle.yaml --runs 2 --json benchmarks/results/a.json data.root=data"
    )
    assert machine.shareable([f"{ROOT}/a.yaml", "../elsewhere/b.yaml"])[0] == "a.yaml"
    assert machine.shareable(["--work", f"{ROOT}/../elsewhere"]) == ["--work", "DIR"]


# conclusions


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        (
            (3.1, 0.995, 0.995),
            "compute-bound: the pipeline delivers 3.1x what the network takes, and training does 99.5%",
        ),
        ((500.0, 0.99, 0.99), "compute-bound: the pipeline delivers 500x what"),
        ((0.4, 0.99, 0.396), "input-bound: the pipeline delivers 40% of what the network takes"),
        ((1.5, 0.6, 0.6), "overlap-bound: end to end reaches 60% of the slower stage alone (the step)"),
        ((0.7, 0.5, 0.35), "overlap-bound: end to end reaches 50% of the slower stage alone (the pipeline)"),
    ],
)
def test_verdict(ratios: tuple[float, float, float], words: str) -> None:
    names = ("pipeline_over_step", "overlap", "end_to_end_over_step")
    assert words in throughput.verdict(dict(zip(names, ratios, strict=True)))


def test_ratios_of_made_up_stages() -> None:
    rates = {
        "pipeline": Rate((4000.0, 2000.0)),
        "step": Rate((1000.0, 500.0)),
        "end_to_end": Rate((990.0, 495.0)),
    }
    found = throughput.training_ratios(rates, Rate((1e12, 5e11)), 400_000_000, 0.02)
    assert found == {
        "pipeline_over_step": 4.0,
        "end_to_end_over_step": pytest.approx(0.99),
        "overlap": pytest.approx(0.99),
        "pipeline_share_of_training_thread": 0.02,
        "model_flop_utilisation": pytest.approx(0.4),
    }
    rates["pipeline"] = Rate((500.0, 250.0))
    rates["end_to_end"] = Rate((450.0, 225.0))
    assert throughput.training_ratios(rates, Rate((1.0, 1.0)), 1, 0.0)["overlap"] == pytest.approx(0.9)


# correctness of what is timed

Floats = npt.NDArray[np.float32]


def augmented(count: int = 256, **changes: Any) -> tuple[Floats, npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Images augmented one by one as the plan says: (pixels, labels, originals)."""
    images = np.random.default_rng(1).integers(0, 256, (count, 32, 32, 3), np.uint8)
    plan = draw_plan(3, 0, count, Augment(**changes))
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    out = np.empty_like(images)
    for i, (index, dy, dx, flip, cy, cx) in enumerate(
        zip(plan.indices, plan.dy, plan.dx, plan.flip, plan.cy, plan.cx, strict=True)
    ):
        image = padded[index, dy : dy + 32, dx : dx + 32].copy()
        if flip:
            image = image[:, ::-1].copy()
        side = changes.get("cutout", CUTOUT)
        image[max(cy - side // 2, 0) : cy + side // 2, max(cx - side // 2, 0) : cx + side // 2] = CHECK_FILL
        out[i] = image
    return out.astype(np.float32), plan.indices, images


def test_right_augmentation_passes() -> None:
    check_augmented(*augmented(), CHECK_FILL)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("channels", "no crop and flip"),
        ("upside down", "no crop and flip"),
        ("other image", "no crop and flip"),
        ("transposed", "no crop and flip"),
        ("twice", "different images"),
        ("normalised", "no crop and flip"),
    ],
)
def test_wrong_pixels_are_caught(fault: str, words: str) -> None:
    pixels, labels, images = augmented()
    if fault == "channels":
        pixels = pixels[..., ::-1]
    elif fault == "upside down":
        pixels = pixels[:, ::-1]
    elif fault == "other image":
        labels = np.roll(labels, 1)
    elif fault == "transposed":
        pixels = pixels.swapaxes(1, 2)
    elif fault == "twice":
        labels = np.concatenate([labels[:-1], labels[:1]])
    elif fault == "normalised":
        pixels = pixels / 255
    with pytest.raises(WrongImages, match=words):
        check_augmented(pixels, labels, images, CHECK_FILL)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"flip": False}, "0% of the images are mirrored"),
        ({"crop": False, "pad": 4}, "only 1 of 81 crop offsets"),
        ({"cutout": 0}, "no square of 8 x 8"),
        ({"cutout": 6}, "no square of 8 x 8"),
    ],
)
def test_missing_augmentations_are_caught(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(WrongImages, match=words):
        check_augmented(*augmented(**changes), CHECK_FILL)


def test_another_fill_colour_and_another_padding_are_caught() -> None:
    pixels, labels, images = augmented()
    with pytest.raises(WrongImages, match="no square"):
        check_augmented(pixels, labels, images, (0, 0, 0))
    with pytest.raises(WrongImages, match="no crop and flip"):
        check_augmented(pixels, labels, images, CHECK_FILL, padding="reflect")


def test_plain_images_must_be_the_originals_with_their_labels() -> None:
    images = np.random.default_rng(1).integers(0, 256, (64, 32, 32, 3), np.uint8)
    order = np.random.default_rng(2).permutation(64)
    check_plain(images[order].astype(np.float32), order, images)
    with pytest.raises(WrongImages, match="differ from the original"):
        check_plain(images[order][..., ::-1].astype(np.float32), order, images)
    with pytest.raises(WrongImages, match="differ from the original"):
        check_plain(images[order].astype(np.float32), np.roll(order, 1), images)
    with pytest.raises(WrongImages, match="different images"):
        check_plain(images[order][:-1].astype(np.float32), order[:-1], images)


def test_own_pipelines_pass_the_check_of_the_peers() -> None:
    kinds, _ = pipeline_kinds([torch.device("cpu")])
    for name, kind in kinds.items():
        if "compiled" not in name:
            check_loader(lambda split, augment, kind=kind: own_epoch(split, augment, kind))


def own_epoch(split: Any, augment: Augment, kind: dict[str, Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return TrainLoader(split, batch_size=64, augment=augment, fill=CHECK_FILL, seed=1, **kind).epoch(0)


def small_task() -> Task:
    dataset = synthetic(count=512)
    return Task(dataset.train.images, dataset.train.labels, 64, CHECK_FILL, torch.device("cpu"))


@pytest.mark.filterwarnings("ignore")
def test_airbench_delivers_what_it_should() -> None:
    pytest.importorskip("airbench")
    check(peers()["airbench"], small_task())


def test_peers_are_checked_timed_and_left_out_with_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # in the other process, a package that cannot be imported
    (tmp_path / "kornia.py").write_text("raise ImportError('no module named kornia', name='kornia')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    host = PeerHost(small_task())
    try:
        for name in ("torchvision_pil_0_workers", "torchvision_pil_2_workers"):
            assert host.stage(name, 0.01).sample() > 0
        with pytest.raises(PeerError, match=r"kornia is not installed; pip install -e '\.\[bench\]'"):
            host.stage("kornia", 0.01)
        with pytest.raises(PeerError, match="needs a CUDA device"):
            host.stage("airbench", 0.01)
        with pytest.raises(PeerError, match="KeyError"):
            host.stage("no such peer", 0.01)
        assert host.stage("torchvision_pil_0_workers", 0.01).sample() > 0, "the process outlives a peer's failure"
    finally:
        host.close()
    with pytest.raises(PeerError, match="ended"):
        host.ask("sample", "torchvision_pil_0_workers", 0.01)


def test_a_peer_that_hangs_costs_only_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kornia.py").write_text("import time\ntime.sleep(600)")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    host = PeerHost(small_task())
    try:
        before = host.stage("torchvision_pil_0_workers", 0.01)
        with monkeypatch.context() as patched:
            patched.setattr("benchmarks.peers.ANSWER_SECONDS", 1.0)
            with pytest.raises(PeerError, match="no answer within 1 s"):
                host.stage("kornia", 0.01)
        assert before.sample() > 0, "a new process takes over"
    finally:
        host.close()
    assert ANSWER_SECONDS <= 60


# throughput.py


@pytest.fixture
def tiny(quick_config: Config) -> Config:
    quick_config.data.name, quick_config.data.synthetic_count = "synthetic", 512
    quick_config.train.batch_size = 64
    return quick_config


def test_end_to_end_is_the_trainers_own_epoch(tiny: Config) -> None:
    training, reference = (Training(copy.deepcopy(tiny), synthetic(count=512)) for _ in range(2))
    try:
        # 19 steps in three pieces, one across an epoch's end: the plan goes on where the last piece stopped
        assert sum(training.run_end_to_end(steps) for steps in (3, 11, 5)) == 19 * 64
        for epoch in range(3):
            for step, (images, labels) in enumerate(reference.trainer.train_loader.epoch(epoch)):
                if epoch * 8 + step < 19:
                    reference.trainer.step.train()
                    reference.trainer.train_one(images, labels, training.schedule(0))
        weights = reference.trainer.net.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in training.trainer.net.state_dict().items())
        assert 0 < training.waited < training.spent
    finally:
        training.close()
        reference.close()


def test_timed_loader_changes_no_batch(tiny: Config) -> None:
    dataset = synthetic(count=512)
    pipeline = Pipeline(dataset, batch_size=64, device=torch.device("cpu"), backend="torch", augment=Augment())
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
    path, trace, picture = tmp_path / "out" / "r.json", tmp_path / "trace.json", tmp_path / "throughput.png"
    words = ["--quick", *TINY_WORDS, "--json", str(path), "--profile", str(trace), "--picture", str(picture)]
    words += ["--ablate", "prefetch", "--ablate", "graph", "--ablate", "channels_last"]
    words += ["augment.pad=2", "augment.cutout=6"]
    asked: list[Augment] = []
    drawn: list[str] = []

    def loader(*args: Any, **kwargs: Any) -> TrainLoader:
        asked.append(kwargs["augment"])
        return TrainLoader(*args, **kwargs)

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
        if make.args[0]["backend"] == "torch":
            raise WrongImages("pixels differ")
        raise RuntimeError("no memory\nat all")

    class Host:
        """A peer that answers once."""

        def __init__(self, task: Task) -> None:
            assert "verdict" in json.loads(path.read_text()), "what is ours is measured and saved by now"

        def stage(self, name: str, seconds: float) -> Any:
            return Failing(name, [])

        def close(self) -> None: ...

    monkeypatch.setattr("benchmarks.stages.find_compiler", lambda device: (False, "no compiler"))
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
        raise dali_graph.WrongPixels("7 of 24 images differ from the reference")

    monkeypatch.setattr(dali_graph, "probe", wrong)
    _, left_out = pipeline_kinds([torch.device("cpu")])
    assert throughput.WRONG_PIXELS in left_out["pipeline_dali_cpu"]


def test_every_key_of_synthetic_data_is_used(tiny: Config) -> None:
    tiny.data.synthetic_size, tiny.data.synthetic_classes = 64, 3
    dataset = load_data(tiny)
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


@pytest.mark.parametrize("script", ["throughput", "accuracy", "tables", "footprint", "lr_finder", "dali_candidates"])
def test_scripts_start_anywhere_without_being_installed(script: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if script == "dali_candidates":  # it needs torch for its --help; -S still hides an installed project
        environment["PYTHONPATH"] = str(Path(torch.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / "benchmarks" / f"{script}.py"), "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and f"benchmarks/{script}.py" in done.stdout, done.stderr


# accuracy.py


@pytest.fixture
def recipe_file(quick_config: Config, tmp_path: Path) -> Path:
    quick_config.train.ema_decay, quick_config.train.tail = 0.9, "endless"
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(quick_config))
    return path


def test_a_later_run_of_a_campaign_is_a_fresh_one_bit_for_bit(recipe_file: Path, tmp_path: Path) -> None:
    from train.config import load_config

    config = load_config(recipe_file)
    with accuracy.Campaign(copy.deepcopy(config)) as campaign:
        campaign.run(3)
        record = campaign.run(5)
        state = copy.deepcopy(campaign.trainer.state())
    config.train.seed, config.train.tta = 5, True
    fit(config, tmp_path / "fresh", log=Log(quiet=True))
    fresh = load_checkpoint(tmp_path / "fresh" / "last.pt")
    for part in ("model", "ema"):
        assert state[part].keys() == fresh[part].keys()
        assert all(torch.equal(value, fresh[part][name]) for name, value in state[part].items()), part
    momentum, fresh_momentum = state["optimizer"]["state"], fresh["optimizer"]["state"]
    assert momentum.keys() == fresh_momentum.keys()
    assert all(torch.equal(momentum[i]["momentum_buffer"], fresh_momentum[i]["momentum_buffer"]) for i in momentum)
    last = fresh["metrics"][-1]
    assert record["accuracy"] == last["test_accuracy"] and record["tta_accuracy"] == last["test_tta_accuracy"]
    assert record["ema_accuracy"] == last["ema_test_accuracy"] and record["test_loss"] == last["test_loss"]


def test_accuracy_goes_on_after_an_interruption(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    finished, path = tmp_path / "f" / "runs.jsonl", tmp_path / "r.json"
    words = [
        str(recipe_file),
        "--finished",
        str(finished),
        "--json",
        str(path),
        "train.epochs=1",
        "schedule.peak_epoch=0.5",
    ]
    assert accuracy.main([*words, "--runs", "2"]) == 0
    both = finished.read_text().splitlines()
    assert len(both) == 3
    # killed while the second run's line was written
    finished.write_text("\n".join(both[:2]) + "\n" + both[2][:20])
    done: list[int] = []
    run = accuracy.Campaign.run

    def counted(self: accuracy.Campaign, seed: int) -> dict[str, Any]:
        done.append(seed)
        return run(self, seed)

    monkeypatch.setattr(accuracy.Campaign, "run", counted)
    capsys.readouterr()
    assert accuracy.main([*words, "--runs", "3"]) == 0
    assert done == [1, 2]
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads(path.read_text())
    records = [json.loads(line) for line in finished.read_text().splitlines()]
    assert [record["seed"] for record in records[1:]] == [0, 1, 2]
    assert records[1] == json.loads(both[1])
    again = json.loads(both[2])
    assert all(
        records[2][key] == again[key] for key in ("seed", "accuracy", "tta_accuracy", "ema_accuracy", "test_loss")
    )
    values = [record["accuracy"] for record in records[1:]]
    assert report["accuracy"]["mean"] == pytest.approx(np.mean(values))
    assert report["accuracy"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert report["accuracy"]["n"] == report["runs"] == 3
    assert report["covers"].keys() == {*report["seconds"], "once"}
    assert str(tmp_path) not in report["command"] and "root" not in report["recipe"]["data"]
    # runs of other arithmetic are no part of the same mean
    header = records[0] | {"environment": records[0]["environment"] | {"precision": "bf16", "device": "cuda:0"}}
    whole = finished.read_text()
    finished.write_text(json.dumps(header) + "\n" + whole.partition("\n")[2])
    assert accuracy.main([*words, "--runs", "4"]) == 2
    assert "(device: cuda -> cpu; precision: bf16 -> fp32)" in capsys.readouterr().err
    assert done == [1, 2]
    finished.write_text(whole)
    # nothing to do: the report again, without a trainer
    monkeypatch.setattr(accuracy, "Campaign", None)
    # the report replaces a link, and not what the link leads to
    (tmp_path / "mine").write_text("mine")
    path.unlink()
    path.symlink_to(tmp_path / "mine")
    assert accuracy.main([*words, "--runs", "2"]) == 0
    assert (tmp_path / "mine").read_text() == "mine" and json.loads(path.read_text())["runs"] == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"]["n"] == 2


def test_accuracy_refuses_a_changed_recipe(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.config import load_config, to_dict

    config = load_config(recipe_file)
    finished = tmp_path / "runs.jsonl"
    accuracy.append(finished, {"recipe": accuracy.comparable(to_dict(config)), "environment": {}}, only_first=True)
    before = finished.read_text()
    words = [str(recipe_file), "--runs", "1", "--finished", str(finished)]
    assert accuracy.main([*words, "optim.momentum=0.8"]) == 2
    assert "optim.momentum: 0.9 -> 0.8" in capsys.readouterr().err
    assert finished.read_text() == before
    # a data folder and a seed are no part of the recipe
    config.data.root, config.train.seed = "elsewhere", 7
    assert accuracy.read_finished(finished, to_dict(config)) == {}


@pytest.mark.parametrize("text", ["a line without an end", "two lines\nof notes", "a list\n", '{"loss": 1}\n{"lo'])
def test_accuracy_neither_changes_nor_removes_a_file_that_it_did_not_write(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text(text)
    assert accuracy.main([str(recipe_file), "--runs", "1", "--finished", str(notes)]) == 2
    assert "name another file with --finished" in capsys.readouterr().err
    assert notes.read_text() == text


def test_accuracy_finds_its_rates_where_the_recipe_asks_for_that(recipe_file: Path) -> None:
    from train.config import load_config

    words = ["schedule.lr_max=find", "schedule.lr_min=find", "schedule.find_steps=20", "train.epochs=1"]
    config = load_config(recipe_file, [*words, "schedule.peak_epoch=0.5", "net.width=4"])
    with accuracy.Campaign(config) as campaign:
        record = campaign.run(0)
    assert 0 < record["lr_min"] < record["lr_max"] and record["seconds"]["lr_search"] > 0
    assert record["device_peak_gib"] is None


def test_time_to_94_is_the_sum_up_to_the_first_epoch_that_reaches_it() -> None:
    metrics = [
        {"epoch": i + 1, "seconds": 2.0, "eval_seconds": 0.5, "test_accuracy": percent}
        for i, percent in enumerate([90.0, 94.0, 93.9, 94.2])
    ]
    assert accuracy.time_to(metrics) == {"epoch_of_94": 2, "training_seconds_to_94": 4.0, "seconds_to_94": 5.0}
    assert set(accuracy.time_to(metrics[:1]).values()) == {None}


@pytest.mark.slow
def test_seeds_share_one_compilation(quick_config: Config) -> None:
    from torch._dynamo.utils import counters

    quick_config.train.compile, quick_config.train.epochs, quick_config.schedule.peak_epoch = "default", 1, 0.5
    torch._dynamo.reset()
    with accuracy.Campaign(quick_config) as campaign:
        campaign.run(0)
        before = counters["stats"]["unique_graphs"]
        campaign.run(1)
        assert counters["stats"]["unique_graphs"] == before


# tables, the script for a GPU


def test_readme_holds_the_tables_that_the_results_make() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.tables(ROOT / "benchmarks" / "results") in readme
    assert tables.replaced(readme, tables.tables(ROOT / "benchmarks" / "results")) == readme


def made_up_report() -> dict[str, Any]:
    def rate(median: float) -> dict[str, float]:
        return {"median": median, "spread": median / 10, "repeats": 5}

    return {
        "kind": "throughput",
        "machine": {"cpu": "Processor X", "cpus_usable": 2, "load_average_before": [0.5, 0, 0]},
        "versions": {"torch": "2.11"},
        "command": "python benchmarks/throughput.py",
        "settings": {
            "width": 16,
            "batch_size": 512,
            "precision": "fp32",
            "compile": "default",
            "images": 50_000,
            "data": "synthetic",
        },
        "stages": {"pipeline_dali_cpu": rate(500_000.0), "step": rate(1000.0), "augment_none": rate(1.0)},
        "peers": {"torchvision_pil_2_workers": rate(5000.0)},
        "ratios": {"dali_over_torchvision_pil_2_workers": 100.4, "overlap": 0.993},
        "verdict": "compute-bound: so it is",
    }


def test_throughput_table_has_a_column_a_machine(tmp_path: Path) -> None:
    gpu = made_up_report()
    gpu["machine"]["gpu"] = "GPU Y"
    del gpu["stages"]["pipeline_dali_cpu"]
    gpu["peers"]["torchvision_pil_16_workers"] = gpu["peers"]["torchvision_pil_2_workers"] | {"median": 20_000.0}
    gpu["ratios"] |= {"dali_over_torchvision_pil_16_workers": 25.2, "dali_over_torch_compiled": 1.25}
    (tmp_path / "a.json").write_text(json.dumps(made_up_report()))
    (tmp_path / "b.json").write_text(json.dumps(gpu))
    (tmp_path / "c.json").write_text(json.dumps({"found": []}))  # another benchmark's
    block = tables.tables(tmp_path).splitlines()
    assert block[0] == tables.BEGIN and block[-1] == tables.END
    assert "| images/s, median; ratios: median of paired ratios | 2 cores, Processor X | GPU Y |" in block
    assert "| DALI pipeline, cpu | 500,000 ± 5% |  |" in block
    assert "| training step alone | 1,000 ± 5% | 1,000 ± 5% |" in block
    assert "| DataLoader, torchvision PIL, 2 workers | 5,000 ± 5% | 5,000 ± 5% |" in block
    assert "| DALI over DataLoader, PIL, 2 workers | 100x | 100x |" in block
    assert "| DALI over DataLoader, PIL, the fastest |  | 25x (16 workers) |" in block
    assert "| DALI over torch compiled |  | 1.25x |" in block
    assert not any("torch compiled over DataLoader" in line for line in block), "nobody measured it"
    said = throughput.conclusions(gpu)
    assert "DALI over DataLoader, PIL, the fastest: 25x (16 workers)" in said and "paired ratios" in said[0]
    assert not any("fastest" in line for line in throughput.conclusions(made_up_report()))
    assert not any("augment" in line for line in block)
    assert sum("Compute-bound: so it is." in line for line in block) == 2


def test_accuracy_table_says_what_its_times_leave_out() -> None:
    record = {
        "seed": 0,
        "accuracy": 94.0,
        "tta_accuracy": 94.2,
        "test_loss": 0.3,
        "seconds": {"lr_search": 1.0, "training": 9.0, "evaluation": 1.0, "tta": 0.1},
        "images_per_second": 1.0,
        "seconds_to_94": 8.0,
        "training_seconds_to_94": 7.0,
    }
    never = {"accuracy": 94.2, "seconds_to_94": None, "training_seconds_to_94": None}
    report = accuracy.summarise([record, record | never], {}, {"machine": {"gpu": "GPU Y"}})
    table = tables.accuracy_table([report | {"command": "python benchmarks/accuracy.py c.yaml"}])
    half_width = 12.706 * 0.1 * np.sqrt(2) / np.sqrt(2)
    assert f"| GPU Y | 94.10 ± {half_width:.2f} (2) | 94.20 ± 0.00 (2) | 9.0 s | 10.0 s | 8.0 s (1 of 2) |" in table[2]
    assert "compiling" in table[-1]
    assert any("8.0 s with the evaluations" in line for line in accuracy.lines(report))


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="has no <!-- results"):
        tables.replaced("nothing here", "block")


def test_gpu_session_goes_on_after_a_failure_and_sums_up(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" >> "$(dirname "$0")/calls"\ncase "$*" in *accuracy*) exit 3 ;; esac\n')
    python.chmod(0o755)
    (tmp_path / "data").mkdir()
    (tmp_path / "out").mkdir()
    old = ["throughput.json", "throughput.png", "trace.json", "trace.json.gz", "recipe.json", "recipe.jsonl", "old.log"]
    for name in old:
        (tmp_path / "out" / name).write_text("of another day")
    done = subprocess.run(
        [
            "bash",
            str(ROOT / "benchmarks" / "gpu_session.sh"),
            str(tmp_path / "out"),
            str(tmp_path / "data"),
            str(python),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    starts = ("-m pytest", "benchmarks/throughput.py", "benchmarks/accuracy.py", "- ")
    assert len(calls) == 4 and all(call.startswith(start) for call, start in zip(calls, starts, strict=True))
    assert f"data.root={tmp_path / 'data'}" in calls[2] and "-m gpu -v --tb=short --durations=10" in calls[0]
    assert re.findall("--ablate ([a-z]+)", calls[1]) == ["graph", "prefetch", "pipelines", "batch", "compile"]
    assert "recipe: exit code 3" in done.stdout and "tests: done" in done.stdout
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"gpu.csv", "tests.log", "throughput.log", "recipe.log", "old.log"}, (
        "only its own outputs are removed"
    )
    script = (ROOT / "benchmarks" / "gpu_session.sh").read_text()
    limits = [int(seconds) for seconds in re.findall(r"^part \w+ (\d+) ", script, re.MULTILINE)]
    grace = re.findall(r"timeout --signal=INT --kill-after=(\d+) ", script)
    assert len(limits) == 3 and len(grace) == 1
    assert sum(limits) + len(limits) * int(grace[0]) < 8 * 60
