"""A finished or interrupted run, loaded once for everything that looks at it; and the command line that all modules share."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from dali_pipeline.datasets import DataError, Dataset
from dali_pipeline.datasets import load as load_dataset
from dali_pipeline.loader import BackendChoice, BackendError, choose_backend
from net.resnet import CustomResNet
from train.checkpoint import CheckpointError, load_checkpoint
from train.config import Config, ConfigError, NetConfig, from_dict, load_config
from train.progress import duration
from train.record import Log, RunFolderError, own_folder, read_metrics
from train.runtime import Runtime, RuntimeUnavailable, prepare

Item = TypeVar("Item")
Say = Callable[[str], None]


# what every part of the analysis may ask of a checkpoint, and of a line of metrics.jsonl
NEEDED = {
    "model", "config", "class_names", "mean", "std", "height", "width", "epoch", "step", "test_accuracy", "lr_max", "lr_min",
    "steps_per_epoch",
}  # fmt: skip
MEASURED = {
    "epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds", "images_per_second",
}  # fmt: skip


class AnalysisError(Exception):
    """What was asked for cannot be drawn: one line with the cause and the remedy."""


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A run folder's content. `net` is the plain network in fp32 and eval mode, uncompiled, on `runtime.device`.

    `epoch` counts finished epochs and `step` the steps done in the next one; `recorded_accuracy` is what the run measured
    with exactly these weights, in percent, None where it did not (a checkpoint from inside an epoch). `test_accuracy` is
    filled by what evaluates them again.
    """

    path: Path
    file: str  # best.pt or last.pt
    config: Config
    checkpoint: dict[str, Any]
    net: CustomResNet
    runtime: Runtime
    class_names: tuple[str, ...]
    metrics: list[dict[str, Any]]
    environment: dict[str, Any]
    summary: dict[str, Any]
    notes: list[str] = field(default_factory=list)  # what a reader of the results must know
    data: Dataset | None = None

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def epoch(self) -> int:
        return int(self.checkpoint["epoch"])

    @property
    def step(self) -> int:
        return int(self.checkpoint["step"])

    @property
    def recorded_accuracy(self) -> float | None:
        accuracy = self.checkpoint["test_accuracy"]
        return None if accuracy is None or self.step else float(accuracy)

    @property
    def dataset(self) -> Dataset:
        if self.data is None:
            raise ValueError(f"{self.path} was loaded without its data")
        return self.data

    def caption(self, accuracy: float | None = None) -> str:
        """For under a picture: run NAME · best.pt · epoch 6 of 8 · test accuracy 99.44%."""
        where = f"epoch {self.epoch} of {self.config.train.epochs}"
        if self.step:
            where += f" and {self.step} steps"
        shown = self.recorded_accuracy if accuracy is None else accuracy
        tail = f" · test accuracy {shown:.2f}%" if shown is not None else ""
        return f"run {self.name} · {self.file} · {where}{tail}"

    def output_dir(self, given: Path | None = None) -> Path:
        """`given`, or the run's analysis/, made where it does not exist. RunFolderError where that is a symbolic link."""
        folder = given or own_folder(self.path, "analysis")
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def nearest(word: str, known: Sequence[str]) -> str:
    """The end of an error message: ", did you mean ...?" or "; known: ..."."""
    folded = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), list(folded), n=1, cutoff=0.5)
    if close:
        return f", did you mean {folded[close[0]]}?"
    shown = list(known[:20]) + (["..."] if len(known) > 20 else [])
    return f"; known: {', '.join(shown)}"


def class_index(name: str, class_names: Sequence[str]) -> int:
    """The label of a class by its name, any case, blanks for underscores. Raises AnalysisError with the nearest name."""
    folded = [known.lower().replace("_", " ") for known in class_names]
    wanted = name.strip().lower().replace("_", " ")
    if wanted in folded:
        return folded.index(wanted)
    raise AnalysisError(f"--class {name}: unknown class{nearest(name, class_names)}")


def load_run(
    path: str | Path,
    *,
    checkpoint: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    data_root: str | Path | None = None,
    download: bool = False,
    need_data: bool = True,
    say: Say = print,
) -> LoadedRun:
    """Load a run folder, its checkpoint `best` or `last` (None: best, else last, saying so) and its data.

    `precision` is that of evaluation: auto takes the run's own where the device is of the run's kind, else fp32.
    `data_root` replaces the run's data.root. Raises AnalysisError, CheckpointError, ConfigError or DataError.
    """
    path = _check_folder(Path(path).expanduser())
    notes: list[str] = []
    file = _choose_checkpoint(path, checkpoint, notes)
    state = load_checkpoint(path / file)
    where = f"{path / file}"
    absent = sorted(NEEDED - set(state))
    if absent:
        raise AnalysisError(f"{where}: lacks {', '.join(absent)}: not a checkpoint of a run of this version")
    try:
        config = from_dict(state["config"])
    except ConfigError as error:
        raise AnalysisError(f"{where}: holds no recipe that this version reads: {error}") from None
    _check_recipe(path, file, config)
    environment = _read_json(path / "environment.json", notes)
    runtime = _runtime(device, precision, config, environment, notes)
    class_names = tuple(str(name) for name in state["class_names"])
    net = _build_net(state["model"], len(class_names), config.net, where)
    if runtime.channels_last:
        net = net.to(memory_format=torch.channels_last)
    run = LoadedRun(
        path=path,
        file=file,
        config=config,
        checkpoint=state,
        net=net.to(runtime.device).eval(),
        runtime=runtime,
        class_names=class_names,
        metrics=_metrics(path, state, notes),
        environment=environment,
        summary=_read_json(path / "summary.json", []),
        notes=notes,
        data=_load_data(config, state, where, data_root, download, notes) if need_data else None,
    )
    say(f"{run.caption()} ({runtime.device}, {runtime.precision})")
    for note in notes:
        say(f"note: {note}")
    return run


def _check_folder(path: Path) -> Path:
    if path.is_dir():
        return path
    if path.is_file():
        hint = f"; give the folder, {path.parent}" if path.suffix == ".pt" else ""
        raise AnalysisError(f"{path}: is a file, expected a run folder{hint}")
    if (Path("runs") / path).is_dir():
        raise AnalysisError(f"{path}: no such run folder, did you mean {Path('runs') / path}?")
    siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    hint = nearest(path.name, sorted(siblings)) if siblings else ""
    raise AnalysisError(f"{path}: no such run folder{hint}")


def _choose_checkpoint(path: Path, asked: str | None, notes: list[str]) -> str:
    held = [name for name in ("best", "last") if (path / f"{name}.pt").exists()]
    if asked is not None:
        if asked not in held:
            other = f"; use --checkpoint {held[0]}" if held else "; a run writes one after its first epoch"
            raise AnalysisError(f"{path}: holds no {asked}.pt{other}")
        return f"{asked}.pt"
    if not held:
        raise AnalysisError(
            f"{path}: holds neither best.pt nor last.pt; a run writes them after its first epoch, "
            "or more often with run.checkpoint_every="
        )
    if held[0] == "last":
        notes.append("there is no best.pt: these are the weights of last.pt")
    return f"{held[0]}.pt"


def _check_recipe(path: Path, file: str, config: Config) -> None:
    """A checkpoint that was copied into another run's folder is noticed by what its network is."""
    if not (path / "config.yaml").exists():
        return
    beside = load_config(path / "config.yaml")
    for key, ours, theirs in (
        ("net.width", config.net.width, beside.net.width),
        ("net.logit_scale", config.net.logit_scale, beside.net.logit_scale),
        ("data.name", config.data.name, beside.data.name),
    ):
        if ours != theirs:
            raise AnalysisError(
                f"{path / file}: was trained with {key}={ours}, but config.yaml beside it says {theirs}; "
                "the checkpoint belongs to another run, put it into a folder of its own"
            )


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read ({error}): left out")
        return {}
    return content if isinstance(content, dict) else {}


def _metrics(path: Path, state: dict[str, Any], notes: list[str]) -> list[dict[str, Any]]:
    """metrics.jsonl, or what the checkpoint remembers of it."""
    try:
        records = read_metrics(path / "metrics.jsonl")
        for number, record in enumerate(records, 1):
            if not isinstance(record, dict) or not set(record) >= MEASURED:
                raise ValueError(f"line {number} is no epoch")
        return records
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        notes.append(
            f"metrics.jsonl is damaged ({error}): the curves are those that {path.name}'s checkpoint remembers"
        )
    return list(state.get("metrics", []))


def _runtime(device: str, precision: str, config: Config, environment: dict[str, Any], notes: list[str]) -> Runtime:
    layout = "auto" if "channels_last" not in environment else "on" if environment["channels_last"] else "off"
    try:
        chosen = prepare(device=device, precision="fp32", compile="off", channels_last=layout)
        recorded = environment.get("precision", config.train.precision)
        same_kind = str(environment.get("device", chosen.device)).partition(":")[0] == chosen.device.type
        if precision == "auto" and recorded not in ("auto", "fp32") and not same_kind:
            notes.append(
                f"the run computed in {recorded} on {environment.get('device')}; this is fp32 on {chosen.device}, "
                "so single answers can differ from those that the run counted"
            )
            recorded = "fp32"
        wanted = recorded if precision == "auto" else precision
        return prepare(device=device, precision=wanted, compile="off", channels_last=layout)
    except RuntimeUnavailable as error:
        raise AnalysisError(
            str(error).replace("train.device=", "--device ").replace("train.precision=", "--precision ")
        ) from None


def _build_net(state: dict[str, Any], num_classes: int, shape: NetConfig, where: str) -> CustomResNet:
    net = CustomResNet(num_classes, shape.width, shape.logit_scale)
    expected = net.state_dict()
    missing = sorted(set(expected) ^ set(state))
    if missing:
        raise AnalysisError(
            f"{where}: {missing[0]} {'is missing from' if missing[0] in expected else 'is no part of'} "
            f"CustomResNet ({len(missing)} such): a checkpoint of another network or version"
        )
    for key, what, ours in (("prep.0.weight", "width", shape.width), ("classifier.weight", "class count", num_classes)):
        found = int(state[key].shape[0])
        if found != ours:
            raise AnalysisError(
                f"{where}: its weights have {what} {found}, its own record says {ours}; the file was put together from "
                "two runs, take the other of best.pt and last.pt (--checkpoint)"
            )
    for key, tensor in expected.items():
        if state[key].shape != tensor.shape:
            raise AnalysisError(f"{where}: {key} is {tuple(state[key].shape)}, expected {tuple(tensor.shape)}")
    net.load_state_dict(state)
    return net.float()


def _load_data(
    config: Config, state: dict[str, Any], where: str, root: str | Path | None, download: bool, notes: list[str]
) -> Dataset:
    data = config.data
    folder = Path(root if root is not None else data.root).expanduser()
    try:
        dataset = load_dataset(
            data.name,
            folder,
            download=download,
            synthetic_size=data.synthetic_size,
            synthetic_classes=data.synthetic_classes,
            synthetic_count=data.synthetic_count,
        )
    except DataError as error:
        raise DataError(
            f"{error}\n  --data-root DIR names the folder here that holds the data; --download fetches it"
        ) from None
    fit_data(dataset, state, where)
    if list(dataset.mean) != list(state["mean"]) or list(dataset.std) != list(state["std"]):
        notes.append(
            f"the training images in {dataset.source} are not those that the run saw (mean "
            f"{_triple(dataset.mean)}, the run's {_triple(state['mean'])}); images are normalised as in the run"
        )
    return dataset


def _triple(values: Sequence[float]) -> str:
    return "/".join(f"{value:.3f}" for value in values)


def fit_data(dataset: Dataset, state: dict[str, Any], where: str) -> None:
    """AnalysisError unless the checkpoint's classes and image size are those of the data."""
    if dataset.num_classes != len(state["class_names"]):
        raise AnalysisError(
            f"{where}: knows {len(state['class_names'])} classes, {dataset.name} has {dataset.num_classes}; "
            "the checkpoint belongs to other data"
        )
    if list(dataset.class_names) != list(state["class_names"]):
        raise AnalysisError(
            f"{where}: its class names are not those of {dataset.name}; the checkpoint belongs to other data"
        )
    size, seen = (dataset.test.height, dataset.test.width), (state["height"], state["width"])
    if size != seen:
        raise AnalysisError(
            f"{where}: was trained on images of {seen[0]} x {seen[1]}, {dataset.name} has {size[0]} x {size[1]}; "
            "the checkpoint belongs to other data"
        )


def pipeline(run: LoadedRun) -> BackendChoice:
    """The run's pipeline, or the one that works here: they give the same pixels."""
    requested = run.config.data.backend
    return choose_backend("auto" if requested == "dali" else requested, run.runtime.device)


def loader_of(run: LoadedRun, make: Callable[[BackendChoice | str], Item]) -> Item:
    """`make` with the run's pipeline, or with torch's where DALI cannot take these images."""
    try:
        return make(pipeline(run))
    except BackendError:
        return make("torch")


def progress(items: Iterable[Item], total: int, title: str, say: Say, every: float = 5.0) -> Iterator[Item]:
    """The items, with a bar on a terminal; elsewhere a line every `every` seconds, none where it is over sooner."""
    if getattr(say, "terminal", False) or (say is print and sys.stdout is not None and sys.stdout.isatty()):
        yield from tqdm(items, total=total, desc=title, leave=False, dynamic_ncols=True)
        return
    begun = last = time.perf_counter()
    for done, item in enumerate(items):
        now = time.perf_counter()
        if now - last >= every and done:
            say(f"{title}: {done}/{total}, {duration((now - begun) / done * (total - done))} to go")
            last = now
        yield item


def parser(module: str, description: str, *, data: bool = True, one_run: bool = True) -> argparse.ArgumentParser:
    """The options that all modules share."""
    result = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    if one_run:
        result.add_argument("run", type=Path, metavar="runs/NAME", help="the run folder")
    result.add_argument(
        "--checkpoint",
        choices=("best", "last"),
        help="which weights (default: best, or last where there is no best.pt)",
    )
    result.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU where there is one"
    )
    result.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="arithmetic of the evaluation (default: the run's own on its kind of device, else fp32)",
    )
    if data:
        result.add_argument(
            "--data-root", type=Path, metavar="DIR", help="where the data lie here (default: the run's data.root)"
        )
        result.add_argument("--download", action="store_true", help="fetch missing data into the data root")
    if one_run:
        result.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: runs/NAME/analysis)")
    return result


def load_for(options: argparse.Namespace, say: Say, path: Path | None = None) -> LoadedRun:
    """The run that the shared options name."""
    return load_run(
        path or options.run,
        checkpoint=options.checkpoint,
        device=options.device,
        precision=options.precision,
        data_root=getattr(options, "data_root", None),
        download=getattr(options, "download", False),
        need_data=hasattr(options, "data_root"),
        say=say,
    )


def command(
    arguments_parser: argparse.ArgumentParser,
    arguments: list[str] | None,
    body: Callable[[argparse.Namespace, Log], int | None],
) -> int:
    """Parse, run, and end what a user can mend as one line on stderr with exit code 2."""
    options = arguments_parser.parse_args(arguments)
    log = Log()
    try:
        return body(options, log) or 0
    except (AnalysisError, CheckpointError, ConfigError, DataError, BackendError, RunFolderError) as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except torch.OutOfMemoryError as error:
        return _fail(f"out of memory ({str(error).strip().splitlines()[0]}); try --device cpu", 1)
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}", 1)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code
