"""The weights that a training begins with, where they come from another run (net.init)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import net as networks
from dali_pipeline.errors import at_home
from net.options import NetOptions
from train.config import ConfigError
from train.disk.snapshot import Snapshot, load_snapshot

CLASSIFIER = "classifier."  # its weights' names begin with it
# keys of `net:` that change what weights of one shape compute
OF_THE_FUNCTION = ("activation", "logit_scale", "norm_eps")


@dataclass(frozen=True)
class InitialWeights:
    """The network of another run. `where`: its file. `model`: its state. `class_names`: what its classifier tells apart."""

    where: str
    model: Mapping[str, Tensor]
    class_names: tuple[str, ...]
    epoch: int

    def for_classes(self, class_names: tuple[str, ...]) -> dict[str, Tensor]:
        """The state for a network of these classes: without the classifier's where their number is another."""
        keep = len(class_names) == len(self.class_names)
        return {name: tensor for name, tensor in self.model.items() if keep or not name.startswith(CLASSIFIER)}

    def sentence(self, class_names: tuple[str, ...]) -> str:
        """What is taken from where, in a line for the log."""
        ours, theirs = len(class_names), len(self.class_names)
        if ours != theirs:
            what = f"all but the classifier, which is drawn anew for {ours} classes; the run there had {theirs}"
        elif class_names != self.class_names:
            what = "classifier included; the names of its classes are others than the data's now"
        else:
            what = "classifier included"
        return f"net.init: {self.where}: the weights of epoch {self.epoch}, {what}"


def load_initial_weights(given: str, options: NetOptions) -> InitialWeights:
    """The weights of a run folder's best.pt, or of a checkpoint's file, for a network of these options.

    Raises CheckpointError for a file that cannot be used, and ConfigError, with the names, where its tensors are not those of
    the network (those of the classifier may be for another number of classes), or the network would compute something else with
    them.
    """
    path = at_home(given, "net.init", ConfigError)
    if path.is_dir():
        path = _best_of(path)
    elif path.exists() and not path.is_file():
        raise ConfigError(f"net.init: {path}: is neither a run folder nor a checkpoint's file")
    snapshot = load_snapshot(path)
    _check_tensors(path, snapshot, options)
    return InitialWeights(
        str(path), snapshot.model, tuple(map(str, snapshot.data.class_names)), snapshot.position.epoch
    )


def _best_of(folder: Path) -> Path:
    if not (folder / "best.pt").exists():
        other = f"; give {folder / 'last.pt'}" if (folder / "last.pt").exists() else ""
        raise ConfigError(f"net.init: {folder}: holds no best.pt, which a run writes after its first epoch{other}")
    return folder / "best.pt"


def _check_tensors(path: Path, snapshot: Snapshot, options: NetOptions) -> None:
    expected = networks.build(options, len(snapshot.data.class_names)).state_dict()
    wrong = [
        f"{name} is {_shape(snapshot.model.get(name))} there, {_shape(expected.get(name))} here"
        for name in dict.fromkeys((*expected, *snapshot.model))
        if _shape(snapshot.model.get(name)) != _shape(expected.get(name))
    ]
    theirs = snapshot.config.get("net", {})
    ours = {name: value for name, value in vars(options).items() if name not in ("init", "freeze")}
    others = {name: theirs[name] for name, value in ours.items() if name in theirs and theirs[name] != value}
    if "width" not in others and {others.get("logit_scale", 0), options.logit_scale} == {None, options.width**-0.5}:
        del others["logit_scale"]  # null is that
    keys = [f"net.{name}={'null' if value is None else value}" for name, value in others.items()]
    if not wrong:
        if any(name in others for name in OF_THE_FUNCTION):
            raise ConfigError(
                f"net.init: {path}: its weights would compute something else in this network; it was trained with "
                f"{', '.join(keys)}"
            )
        return
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    remedy = f"; it was trained with {', '.join(keys)}" if keys else ""
    raise ConfigError(f"net.init: {path}: its weights are of another network: {'; '.join(wrong[:3])}{more}{remedy}")


def _shape(tensor: Tensor | None) -> tuple[int, ...] | str:
    return "missing" if tensor is None else tuple(tensor.shape)
