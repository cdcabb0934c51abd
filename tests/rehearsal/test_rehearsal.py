"""The CUDA path on a GPU that is not there (see standin.py): what waits, what is captured, what is planned.

It shows nothing of values, of time, of races between streams, of cuDNN's choices, or of DALI's kernels.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import standin
import torch
from options import EVERYTHING
from zygote import Zygote, zygote

pytestmark = pytest.mark.rehearsal

HERE = Path(__file__).resolve().parent
WIDTH, BATCH = 8, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stand-in was built; skips where it cannot be."""
    built = tmp_path_factory.mktemp("standin")
    reason = standin.unavailable() or standin.build(built)
    if reason:
        pytest.skip(reason)
    return built


@pytest.fixture(scope="module")
def gpu(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Starts scripts on the stand-in without the cost of importing torch each time; an H100 where STANDIN_GPU is not set."""
    with zygote(tmp_path_factory.mktemp("gpu"), standin.environment(folder)) as made:
        yield made


def kind(name: str) -> dict[str, str]:
    """The variable that makes the stand-in a GPU of that name."""
    return {"STANDIN_GPU": str(standin.GPUS.index(name))}


@functools.cache
def epochs(gpu: Zygote, compile: str, precision: str, name: str = "h100", *more: str) -> dict[str, Any]:
    """What epochs.py reports."""
    job = gpu.start(compile, precision, str(WIDTH), str(BATCH), *more, script=HERE / "epochs.py", env=kind(name))
    assert job.wait(timeout=600) == 0, job.stderr[-3000:]
    report: dict[str, Any] = json.loads(job.stdout.splitlines()[-1])
    return report


def assert_nothing_waits(report: dict[str, Any]) -> None:
    for name in ("first_epoch", "second_epoch", "third_epoch"):
        assert report["parts"][name]["places"] == [], name


def expected_convolutions(dtype: str) -> Counter[tuple[Any, ...]]:
    """Of one step, from the architecture: (what, channels in, channels out, side, type, channels-last)."""
    w, expected = WIDTH, Counter[tuple[Any, ...]]()
    layers = [(3, w, 32), (w, 2 * w, 32), (2 * w, 2 * w, 16), (2 * w, 2 * w, 16)]
    layers += [(2 * w, 4 * w, 16), (4 * w, 8 * w, 8), (8 * w, 8 * w, 4), (8 * w, 8 * w, 4)]
    for inputs, outputs, side in layers:
        for what in ("forward", "data", "weight"):
            if inputs != 3 or what != "data":  # nobody asks for the gradient of the images
                expected[what, inputs, outputs, side, dtype, True] += 1
    return expected


def assert_convolutions(report: dict[str, Any], dtype: str) -> None:
    found = Counter(
        (c["what"], c["weight"][1], c["weight"][0], c["images"][2], c["dtype"], c["channels_last"])
        for c in report["convolutions"]
    )
    assert {key: count / report["steps"] for key, count in found.items()} == dict(expected_convolutions(dtype))
    assert all(c["images"][0] == BATCH for c in report["convolutions"])


@pytest.mark.parametrize(
    ("kind", "name", "precision", "dtype"),
    [
        ("h100", "H100", "bf16", "bfloat16"),
        ("a100", "A100", "bf16", "bfloat16"),
        ("t4", "T4", "fp16", "float16"),
    ],
)
def test_uncompiled_epochs_never_wait_and_convolve_channels_last_in_the_gpus_own_type(
    gpu: Zygote, kind: str, name: str, precision: str, dtype: str
) -> None:
    report = epochs(gpu, "off", "auto", kind)
    assert name in report["gpu"]
    assert report["precision"] == precision
    assert_nothing_waits(report)
    assert_convolutions(report, dtype)


@pytest.mark.parametrize(("kind", "precision"), [("h100", "bf16"), ("t4", "fp16")])
def test_epochs_with_every_option_never_wait(gpu: Zygote, kind: str, precision: str) -> None:
    report = epochs(gpu, "off", "auto", kind, *(f"{key}={value}" for key, value in EVERYTHING.items()))
    assert report["precision"] == precision
    assert_nothing_waits(report)


def test_a_wait_is_named_with_its_place(gpu: Zygote) -> None:
    report = epochs(gpu, "off", "auto", "h100")
    places = report["parts"]["evaluation"]["places"]  # its sums are read on the host
    named = [place for place in places if place.endswith(" in evaluate")]
    assert named
    assert all(place.startswith("wait: cuda") and "evaluation.py:" in place for place in named)


def test_cuda_graphs_are_captured_in_the_warm_up_alone(gpu: Zygote) -> None:
    report = epochs(gpu, "reduce-overhead", "bf16")
    parts = report["parts"]
    assert_nothing_waits(report)
    assert_convolutions_of_the_warm_up_alone(report)
    assert parts["warm_up"]["captures"] > 0
    for name, part in parts.items():
        assert part["forbidden"] == 0, part["places"]
        assert name == "warm_up" or part["captures"] == 0, name
    # one graph forward, one backward; an evaluation lies between the second epoch and the third
    for name in ("first_epoch", "second_epoch", "third_epoch"):
        assert parts[name]["graph_launches"] == 2 * report["steps"]
    # the image and its mirror, by the weights and by their average, in each batch: all by one graph for each of those two
    assert parts["evaluation"]["graph_launches"] == 2 * 2 * report["batches"]


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("h100", "off", {}),
        ("h100", "default", {}),
        ("t4", "off", EVERYTHING),
    ],
)
def test_captured_step_is_one_launch(gpu: Zygote, kind: str, mode: str, options: dict[str, Any]) -> None:
    words = {"train.step_graph": "on", **options}
    report = epochs(gpu, mode, "auto", kind, *(f"{key}={value}" for key, value in words.items()))
    assert report["not_captured"] is None
    assert_nothing_waits(report)
    assert_convolutions_of_the_warm_up_alone(report)
    parts = report["parts"]
    assert parts["warm_up"]["captures"] == 1
    for name, part in parts.items():
        assert part["forbidden"] == 0, part["places"]
        assert name == "warm_up" or part["captures"] == 0, name
    for name in ("first_epoch", "second_epoch", "third_epoch"):
        assert parts[name]["graph_launches"] == report["steps"]


@pytest.mark.parametrize("gpu_kind", ["h100", "t4"])
def test_a_step_that_cannot_be_captured_goes_on_as_before(gpu: Zygote, tmp_path: Path, gpu_kind: str) -> None:
    """An update that reads a value on the host fails within the capture, on a T4 in the middle of an update in fp16."""
    script = tmp_path / "uncapturable.py"
    script.write_text(UNCAPTURABLE)
    job = gpu.start(script=script, env=kind(gpu_kind))
    assert job.wait(timeout=300) == 0, job.stderr[-3000:]
    report = json.loads(job.stdout.splitlines()[-1])
    assert "capturing" in report["why"] and not report["captured"]
    assert report["same_stream"] and report["steps"] == 3


UNCAPTURABLE = """
import json
import inside
import torch
from dali_pipeline import sources
from dali_pipeline.backend import BackendChoice
from train.config import load_config
from train.machine.runtime import prepare
from train.step.muon import Muon
from train.step.trainer import Trainer

inside.answer_evaluations()
words = ["data.name=synthetic", "data.synthetic_count=256", "data.backend=torch", "net.width=4", "train.batch_size=64"]
words += ["train.eval_batch_size=64", "train.compile=off"]
config = load_config("fast94", words)
original = Muon.step

def reads(self, closure=None):
    original(self, closure)
    if torch.cuda.is_current_stream_capturing():
        self.param_groups[0]["params"][0].sum().item()

Muon.step = reads
runtime = prepare(device="cuda", compile="off")
trainer = Trainer(config, sources.load(config.data), runtime, BackendChoice("torch", "the rehearsal computes nothing"))
before = torch.cuda.current_stream()
trainer.warm_up()
same = torch.cuda.current_stream() == before
steps = 0
for images, labels in trainer.train_loader.epoch(0):
    if steps < 3:
        trainer.train_one(images, labels, 0.1)
        steps += 1
print(json.dumps({"why": trainer.not_captured, "captured": trainer.captured is not None, "same_stream": same, "steps": steps}))
"""


def assert_convolutions_of_the_warm_up_alone(report: dict[str, Any]) -> None:
    """Afterwards they are nodes of a graph, which no call of ours starts."""
    assert report["convolutions"] == []


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_compiled_epochs_never_wait_and_convolve_channels_last(gpu: Zygote, precision: str) -> None:
    report = epochs(gpu, "default", precision)
    assert_nothing_waits(report)
    assert_convolutions(report, {"bf16": "bfloat16", "fp16": "float16"}[precision])


def budget_file() -> Path:
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in ("torch", "triton")}
    return HERE / "plans" / f"torch-{versions['torch']}-triton-{versions['triton']}.json"


def table_of_the_largest(plan: dict[str, Any]) -> str:
    largest = sorted(plan["rows"], key=lambda row: -row["bytes"])[:10]
    return "\n".join(f"{row['bytes'] / 1e6:8.1f} MB  {row['group']:<32} {row['name'][:100]}" for row in largest)


@pytest.mark.parametrize("recipe", ["onecycle", pytest.param("fast94", marks=[pytest.mark.long, pytest.mark.slow])])
def test_planned_kernels_and_bytes_stay_within_the_budget(gpu: Zygote, recipe: str) -> None:
    path = budget_file()
    poolings = ["ours"] if path.exists() else ["ours", "torch"]
    job = gpu.start("--recipe", recipe, "--pooling", *poolings, script=HERE / "plan.py")
    assert job.wait(timeout=600) == 0, job.stderr[-3000:]
    plans = json.loads(job.stdout)
    plan = plans[0]
    print(
        f"{plan['kernels_per_step']} kernels, {plan['bytes_per_step'] / 1e9:.3f} GB, the largest:\n"
        f"{table_of_the_largest(plan)}"
    )
    assert plan["atomics"] == 0, "a kernel scatters"
    if not path.exists():
        assert plan["bytes_per_step"] < plans[1]["bytes_per_step"], "torch's pooling moves less than ours"
        pytest.skip(f"no budget for these versions: {path.name}; only what holds for every version was checked")
    recorded = [p for p in json.loads(path.read_text(encoding="utf-8")) if recipe in p["recipes"]]
    budget, with_torchs = sorted(recorded, key=lambda p: p["pooling"])  # ours, torch
    assert plan["bytes_per_step"] < with_torchs["bytes_per_step"]
    for now, then in ((plan, budget), (plan["evaluation"], budget["evaluation"])):
        for key in ("kernels_per_step", "bytes_per_step", "flops_per_step"):
            assert now[key] == pytest.approx(then[key], rel=0.02), table_of_changes(now, then)
        assert groups(now) == pytest.approx(groups(then), rel=0.02, abs=1e6)


def table_of_changes(plan: dict[str, Any], budget: dict[str, Any]) -> str:
    """The kernels that only one of two plans has, the larger first."""
    now, then = (Counter((row["bytes"], row["name"]) for row in p["rows"]) for p in (plan, budget))
    lines = [
        f"{sign} {moved / 1e6:8.1f} MB {name}"
        for sign, rows in (("+", now - then), ("-", then - now))
        for moved, name in rows
    ]
    return "\n".join(sorted(lines, key=lambda line: -float(line.split()[1])))


def groups(plan: dict[str, Any]) -> dict[str, int]:
    """Bytes by what kernels are for."""
    result = Counter[str]()
    for row in plan["rows"]:
        result[row["group"]] += row["bytes"]
    return dict(result)


def train(gpu: Zygote, run: Path, epochs: int, *flags: str) -> str:
    """`python -m train` on the stand-in, checkpoints in the background after every step; what it printed."""
    words = {
        "data.name": "synthetic",
        "data.synthetic_count": 256,
        "data.backend": "torch",
        "net.width": 4,
        "train.batch_size": 64,
        "train.eval_batch_size": 64,
        "train.epochs": epochs,
        "train.device": "cuda",
        "train.compile": "off",
        "train.ema_decay": 0.9,
        "schedule.lr_max": 0.1,
        "schedule.lr_min": 0.01,
        "schedule.peak_epoch": 1,
        "run.checkpoint_every": 1,
        "run.analyse": "false",
        "run.dir": run,
    }
    recipe = ["--config", "configs/onecycle.yaml", *(f"{key}={value}" for key, value in words.items())]
    code, out, err = gpu.run("train.__main__", *recipe, *flags, script=HERE / "whole.py")
    assert code == 0, out[-2000:] + err[-2000:]
    return out


def test_command_trains_saves_and_resumes_on_the_gpu(gpu: Zygote, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "H100" in train(gpu, run, 1)
    assert (run / "last.pt").exists() and (run / "best.pt").exists()
    assert "resumed" in train(gpu, run, 2, "--resume", "--extend")
    epochs = [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [1, 2]


def test_run_of_the_gpu_is_exported(gpu: Zygote, tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="the export needs safetensors: pip install -e '.[export]'")
    train(gpu, tmp_path / "run", 1)
    code, out, err = gpu.run("train.export", tmp_path / "run", "--torch-export", script=HERE / "whole.py")
    assert code == 0, out[-2000:] + err[-2000:]
    assert {path.name for path in tmp_path.rglob("model.*")} == {"model.safetensors", "model.pt2"}


def test_smoke_of_the_gpu_session_reaches_every_part(gpu: Zygote, tmp_path: Path) -> None:
    words = ["train.device=cuda", "net.width=4", "train.batch_size=32", "train.eval_batch_size=32"]
    words += [
        "data.backend=torch",
        "data.synthetic_count=320",
        "--modes",
        "off",
        "--json",
        str(tmp_path / "smoke.json"),
    ]
    # DALI cannot run here, and no loss is computed
    gpu.run("benchmarks.smoke", *words, script=HERE / "whole.py")
    checks = json.loads((tmp_path / "smoke.json").read_text(encoding="utf-8"))["checks"]
    assert [check["name"] for check in checks] == ["device", "DALI's probe", "DALI's pixels", "compile off"]
    assert checks[0]["ok"] and "H100" in checks[0]["said"]
    assert "10 steps" in checks[3]["said"] or "losses [" in checks[3]["said"]


def test_the_tests_of_the_gpu_session_are_collected(folder: Path) -> None:
    # of the files that name the mark alone: collecting the others would show nothing and take long
    marked = [path for path in standin.ROOT.glob("tests/**/test_*.py") if ".mark.gpu" in path.read_text("utf-8")]
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", *marked]
    done = subprocess.run(words, env=standin.environment(folder), cwd=standin.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "test_gpu.py::test_no_step_waits_for_the_device" in done.stdout


DRIVER_TOO_OLD = """
import sys
from train.machine.runtime import RuntimeUnavailable, prepare
try:
    print(*prepare(device=sys.argv[1]).notes, sep="\\n")
except RuntimeUnavailable as error:
    print("refused:", error)
"""


@pytest.mark.parametrize(
    ("requested", "beginning"),
    [
        ("auto", "WARNING: device: cpu (not the GPU: "),
        ("cuda", "refused: train.device=cuda: "),
        ("cpu", "device: cpu ("),
    ],
)
def test_driver_too_old_for_torch_is_said_in_one_line(
    gpu: Zygote, tmp_path: Path, requested: str, beginning: str
) -> None:
    script = tmp_path / "prepare.py"
    script.write_text(DRIVER_TOO_OLD)
    code, out, err = gpu.run(requested, script=script, env={"STANDIN_DRIVER": "12040"})
    assert code == 0, err[-2000:]
    line = out.splitlines()[0]
    assert line.startswith(beginning)
    said = all(
        word in line for word in ("driver is too old", "CUDA 12.4", f"CUDA {torch.version.cuda}", "update the driver")
    )
    assert said == (requested != "cpu")
