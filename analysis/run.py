"""Loads a finished or interrupted run for the analysis."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

import net as networks
from dali_pipeline import sources
from dali_pipeline.backend import BackendChoice, BackendError, choose_backend
from dali_pipeline.dataset import DataError, Dataset
from dali_pipeline.errors import UserError, at_home
from dali_pipeline.images import Resize
from dali_pipeline.regular import read_regular
from net.interface import Network
from net.options import NetOptions
from train.config import Config, ConfigError, from_record, load_config
from train.disk.content import is_epoch, is_number
from train.disk.folder import MOST_BYTES, own_folder, read_metrics
from train.disk.snapshot import Snapshot, load_snapshot
from train.machine.runtime import Runtime, RuntimeUnavailable, prepare

Item = TypeVar("Item")
Say = Callable[[str], None]


class AnalysisError(UserError):
    """What was asked for cannot be drawn or computed. The message is one line: cause and remedy."""


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """The content of a run folder. `net` is the network in fp32 and eval mode, uncompiled, on `runtime.device`.

    `epoch` counts finished epochs and `step` the steps done in the next one. `recorded_accuracy` is the test accuracy, in
    percent, that the run itself measured with exactly these weights; None where it did not, as for a checkpoint from within an
    epoch. `test_accuracy` is set when they are evaluated again.
    """

    path: Path
    file: str  # best.pt or last.pt
    config: Config
    snapshot: Snapshot
    net: Network
    runtime: Runtime
    class_names: tuple[str, ...]
    metrics: list[dict[str, Any]]
    environment: dict[str, Any]
    summary: dict[str, Any]
    notes: list[str] = field(
        default_factory=list
    )  # what a reader of the results must know: lines for the log and the report
    data: Dataset | None = None

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def epoch(self) -> int:
        return self.snapshot.position.epoch

    @property
    def step(self) -> int:
        return self.snapshot.position.step

    @property
    def recorded_accuracy(self) -> float | None:
        if self.step:
            return None
        if self.snapshot.test_accuracy is None:  # with a validation split the test set is measured once, at the end
            at_end = self.summary.get("test", {}).get(self.file, {})
            return float(at_end["accuracy"]) if at_end.get("epoch") == self.epoch else None
        return self.snapshot.test_accuracy

    @property
    def dataset(self) -> Dataset:
        if self.data is None:
            raise ValueError(f"{self.path} was loaded without its data")
        return self.data

    @property
    def resize(self) -> Resize:
        """How the run's own images took the network's form; "crop" where they had it."""
        return cast(Resize, getattr(self.config.data, "resize", "crop"))

    def caption(self, accuracy: float | None = None) -> str:
        """The caption of a picture, such as: run NAME · best.pt · epoch 6 of 8 · test accuracy 99.44%."""
        where = f"epoch {self.epoch} of {self.config.train.epochs}"
        if self.step:
            where += f" and {self.step} steps"
        shown = self.recorded_accuracy if accuracy is None else accuracy
        tail = f" · test accuracy {shown:.2f}%" if shown is not None else ""
        return f"run {self.name} · {self.file} · {where}{tail}"

    def output_dir(self, given: Path | None = None) -> Path:
        """`given`, or the run's analysis/; created where it does not exist. RunFolderError where analysis/ is a symbolic link."""
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
    """Load a run folder, its checkpoint `best` or `last` (None: best, or last with a note where there is no best) and its data.

    `precision` is that of evaluation: auto takes the run's own where the device is of the run's kind, else fp32.
    `data_root` replaces the run's data.root. Raises AnalysisError, CheckpointError, ConfigError or DataError.
    """
    path = _check_folder(at_home(path, "run folder", AnalysisError))
    notes: list[str] = []
    file = _choose_checkpoint(path, checkpoint, notes)
    where = f"{path / file}"
    snapshot = load_snapshot(where)
    try:
        config = from_record(snapshot.config, lambda note: notes.append(f"{file}: {note}"))
    except ConfigError as error:
        raise AnalysisError(f"{where}: holds no recipe that this version reads: {error}") from None
    _check_recipe(path, file, config)
    environment = _read_json(path / "environment.json", notes)
    runtime = _runtime(device, precision, config, environment, notes)
    class_names = tuple(str(name) for name in snapshot.data.class_names)
    net = _build_net(snapshot.model, len(class_names), config.net, where)
    if runtime.channels_last:
        net = net.to(memory_format=torch.channels_last)
    run = LoadedRun(
        path=path,
        file=file,
        config=config,
        snapshot=snapshot,
        net=net.to(runtime.device).eval(),
        runtime=runtime,
        class_names=class_names,
        metrics=_metrics(path, snapshot, notes),
        environment=environment,
        summary=_read_json(path / "summary.json", notes),
        notes=notes,
        data=_load_data(config, snapshot, where, data_root, download, notes) if need_data else None,
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
    """Notices a checkpoint that was copied into another run's folder: its network differs from that of config.yaml."""
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
        content = json.loads(read_regular(path, MOST_BYTES).decode("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read ({error}): left out")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{path.name} holds a {type(content).__name__}: left out")
        return {}
    wrong = [name for name, value in content.items() if not _is_recorded(name, value)]
    if wrong:
        notes.append(f"{path.name}: not what a run writes, and left out: {', '.join(wrong)}")
    return {name: value for name, value in content.items() if name not in wrong}


def _is_recorded(name: str, value: Any) -> bool:
    """Whether a value of environment.json or summary.json can be what a run writes, as far as the analysis computes with it."""
    if name == "precision":
        return isinstance(value, str) and value in ("fp32", "bf16", "fp16")
    if name in ("device", "device_name"):
        return value is None or isinstance(value, str)
    if name == "channels_last":
        return isinstance(value, bool)
    if name == "test":
        return isinstance(value, dict) and all(
            isinstance(part, dict) and is_number(part.get("accuracy")) and is_number(part.get("epoch"))
            for part in value.values()
        )
    return is_number(value) if name.startswith("last_") else True


def _metrics(path: Path, snapshot: Snapshot, notes: list[str]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl or, where that is missing or damaged, the copy of them in the checkpoint."""
    try:
        entries = read_metrics(path / "metrics.jsonl")
        for number, entry in enumerate(entries, 1):
            if not is_epoch(entry):
                raise ValueError(f"line {number} is no epoch")
        return entries
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as error:
        notes.append(
            f"metrics.jsonl is damaged ({error}): the curves are drawn from the copy in {path.name}'s checkpoint"
        )
    return list(snapshot.position.metrics)


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


def _build_net(state: dict[str, Any], num_classes: int, shape: NetOptions, where: str) -> Network:
    net = networks.build(shape, num_classes)
    expected = net.state_dict()
    missing = sorted(set(expected) ^ set(state))
    if missing:
        raise AnalysisError(
            f"{where}: {missing[0]} {'is missing from' if missing[0] in expected else 'is no part of'} "
            f"{type(net).__name__} ({len(missing)} such): a checkpoint of another network or version"
        )
    for key, what, ours in (("prep.0.weight", "width", shape.width), ("classifier.weight", "class count", num_classes)):
        found = tuple(state[key].shape[:1])
        if found != (ours,):
            raise AnalysisError(
                f"{where}: its weights have {what} {', '.join(map(str, found))}, its own record says {ours}; the file was "
                "put together from two runs, take the other of best.pt and last.pt (--checkpoint)"
            )
    for key, tensor in expected.items():
        if state[key].shape != tensor.shape:
            raise AnalysisError(f"{where}: {key} is {tuple(state[key].shape)}, expected {tuple(tensor.shape)}")
    net.load_state_dict(state)
    return net.float()


def _load_data(
    config: Config, snapshot: Snapshot, where: str, root: str | Path | None, download: bool, notes: list[str]
) -> Dataset:
    try:
        dataset = sources.load(
            config.data, sources.to_stderr, root=None if root is None else Path(root), download=download
        )
    except DataError as error:
        where = "  --data-root DIR names the folder here that holds the data; --download fetches it"
        raise DataError(*error.args, where) from None
    fit_data(dataset, snapshot, where)
    if dataset.mean != snapshot.data.mean or dataset.std != snapshot.data.std:
        notes.append(
            f"the training images in {dataset.source} are not those that the run saw (mean "
            f"{_triple(dataset.mean)}, the run's {_triple(snapshot.data.mean)}); images are normalised as in the run"
        )
    return dataset


def with_data(run: LoadedRun, data_root: str | Path | None = None, download: bool = False) -> LoadedRun:
    """Add the data to a run that was loaded without them. Raises AnalysisError or DataError."""
    if run.data is not None:
        return run
    data = _load_data(run.config, run.snapshot, f"{run.path / run.file}", data_root, download, run.notes)
    return replace(run, data=data)


def averaged_network(run: LoadedRun) -> Network:
    """The network with the average of the weights (train.ema_decay); like `run.net` in fp32 and eval mode and on its device."""
    assert run.snapshot.ema is not None, "the run kept no average"
    prefix = "module."  # the names of WeightAverage's tensors begin with it, except that of its counter
    state = {name.removeprefix(prefix): value for name, value in run.snapshot.ema.items() if name.startswith(prefix)}
    net = _build_net(state, len(run.class_names), run.config.net, f"{run.path / run.file}")
    if run.runtime.channels_last:
        net = net.to(memory_format=torch.channels_last)
    return net.to(run.runtime.device).eval()


def _triple(values: Sequence[float]) -> str:
    return "/".join(f"{value:.3f}" for value in values)


def fit_data(dataset: Dataset, snapshot: Snapshot, where: str) -> None:
    """AnalysisError unless the checkpoint's classes and image size are those of the data."""
    then = snapshot.data
    if dataset.num_classes != len(then.class_names):
        raise AnalysisError(
            f"{where}: knows {len(then.class_names)} classes, {dataset.name} has {dataset.num_classes}; "
            "the checkpoint belongs to other data"
        )
    if dataset.class_names != then.class_names:
        raise AnalysisError(
            f"{where}: its class names are not those of {dataset.name}; the checkpoint belongs to other data"
        )
    size, seen = (dataset.height, dataset.width), (then.height, then.width)
    if size != seen:
        raise AnalysisError(
            f"{where}: was trained on images of {seen[0]} x {seen[1]}, {dataset.name} has {size[0]} x {size[1]}; "
            "the checkpoint belongs to other data"
        )


def pipeline(run: LoadedRun) -> BackendChoice:
    """The backend of the run's input pipeline, or the one that works on this machine. Both give the same pixels."""
    requested = run.config.data.backend
    return choose_backend("auto" if requested == "dali" else requested, run.runtime.device)


def loader_of(run: LoadedRun, make: Callable[[BackendChoice | str], Item]) -> Item:
    """What `make` returns for the run's backend, or for torch where DALI cannot process these images."""
    try:
        return make(pipeline(run))
    except BackendError:
        return make("torch")
