"""python -m train.export runs/NAME [--torch-export] [--onnx]: the network of a run for use elsewhere.

Writes runs/NAME/export/model.safetensors: the network's own tensors, under their names in net/resnet.py, contiguous. The
normalisation (pixels - mean) / std, per channel in units of 0..255, is NOT part of these weights. model.pt2 (torch.export) and
model.onnx are whole programs from uint8 images (N, 3, H, W) in RGB, of any N, to logits (N, C), normalisation included. What is
needed to use them (class names, size of the images, mean, std, keys of `net:`) is JSON text in each file, as "about". Each file
is read back and must give the logits of the run's network on real test images before it gets its name.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import net as networks
from dali_pipeline import sources
from dali_pipeline.dataset import DataError
from dali_pipeline.errors import UserError, at_home
from net.interface import Network
from net.options import NetOptions
from train.config import from_record
from train.disk.atomic import fsync_folder, open_new
from train.disk.content import misfit
from train.disk.folder import own_folder
from train.disk.snapshot import Snapshot, load_snapshot
from train.errors import explained
from train.screen.log import Log
from train.screen.streams import Parser, standard_streams
from train.step.steps import EvalStep

IMAGES = 256  # test images that every export is verified on
# The largest difference allowed between the logits of an export and the network's, relative to the largest logit. The same
# operations in the same order give equal logits; another runtime's rounding is about 1e-6.
TOLERANCES = {"model.safetensors": 0.0, "model.pt2": 1e-4, "model.onnx": 1e-4}
# Packages that each file needs to be written and verified; all are in the extra `export`.
REQUIRED_PACKAGES = {
    "model.safetensors": ("safetensors",),
    "model.pt2": (),
    "model.onnx": ("onnx", "onnxscript", "onnxruntime"),
}

OF_PROGRAMS = "images (N, 3, H, W), uint8, RGB"  # what they take


class ExportError(UserError):
    """An export that cannot be made, or differs from the network: one line with the cause."""


def require(name: str) -> None:
    """Raise ExportError where a package that this file needs is missing."""
    missing = [package for package in REQUIRED_PACKAGES[name] if importlib.util.find_spec(package) is None]
    if missing:
        raise ExportError(f"{name} needs {', '.join(missing)}: pip install -e '.[export]'")


@dataclass(frozen=True)
class Subject:
    """What is exported: the network of a checkpoint, in eval mode; with `ema` with the average of its weights."""

    snapshot: Snapshot
    net: Network
    ema: bool

    def program(self) -> EvalStep:
        """The network as a module from uint8 images to logits, normalisation included."""
        data = self.snapshot.data
        return EvalStep(self.net, data.mean, data.std, channels_last=False).eval()

    @property
    def test_accuracy(self) -> float | None:
        """As measured after the checkpoint's last finished epoch, in percent; None where it was not."""
        metrics = self.snapshot.position.metrics
        found = metrics[-1].get("ema_test_accuracy" if self.ema else "test_accuracy") if metrics else None
        return None if found is None else float(found)


def subject(snapshot: Snapshot, ema: bool = False) -> Subject:
    """The network of a checkpoint. Raises ExportError where its tensors are not those of its recipe, or there is no average."""
    weights = snapshot.model
    if ema:
        if snapshot.ema is None:
            raise ExportError("--ema: the run kept no average of its weights (train.ema_decay=0)")
        weights = {key.removeprefix("module."): t for key, t in snapshot.ema.items() if key.startswith("module.")}
    net = networks.build(from_record(snapshot.config).net, len(snapshot.data.class_names))
    if problem := misfit(weights, net.state_dict(), "ema" if ema else "model"):
        raise ExportError(f"the checkpoint is not that of the network of its recipe: {problem}")
    net.load_state_dict(weights)
    return Subject(snapshot, net.eval(), ema)


def first_test_images(snapshot: Snapshot, root: Path | None) -> Tensor:
    """(IMAGES, 3, H, W) uint8: the first test images of the data set that the run was trained on. Raises DataError."""
    try:
        dataset = sources.load(from_record(snapshot.config).data, root=root, download=False)
    except DataError as error:
        why = "  exports are verified on the run's test images; --data-root DIR names the folder here that holds them"
        raise DataError(*error.args, why) from None
    return torch.from_numpy(dataset.test.take(slice(IMAGES)).images).permute(0, 3, 1, 2).contiguous()


def about(subject: Subject, images: str) -> dict[str, Any]:
    """What a user of an export must know, `images` of its input; JSON can hold it."""
    data, options = subject.snapshot.data, from_record(subject.snapshot.config).net
    return {
        "architecture": "CustomResNet",
        "input": images,
        **asdict(options),
        "logit_scale": subject.net.logit_scale,
        "height_and_width": [data.height, data.width],
        "data_name": data.data_name,
        "class_names": list(data.class_names),
        "mean": list(data.mean),
        "std": list(data.std),
        "epoch": subject.snapshot.position.epoch,
        "weights": "average" if subject.ema else "trained",
        "test_accuracy": subject.test_accuracy,
    }


def _safetensors(path: Path, subject: Subject, images: Tensor) -> Callable[[Tensor], Tensor]:
    from safetensors.torch import load, save

    known = about(subject, "(N, 3, H, W): pixels of 0..255 in RGB, minus mean, divided by std, per channel")
    # safetensors refuses channels-last weights: it stores contiguous tensors only
    tensors = {name: tensor.contiguous() for name, tensor in subject.net.state_dict().items()}
    path.write_bytes(save(tensors, {"about": json.dumps(known)}))
    content = path.read_bytes()  # by its content, as safetensors opens no name that is not UTF-8
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    read = json.loads(header["__metadata__"]["about"])
    options = {name: read[name] for name in asdict(from_record(subject.snapshot.config).net)}
    again = networks.build(NetOptions(**options), len(read["class_names"]))
    again.load_state_dict(load(content))
    return EvalStep(again, read["mean"], read["std"], channels_last=False).eval()


def _torch_export(path: Path, subject: Subject, images: Tensor) -> Callable[[Tensor], Tensor]:
    batch = {0: torch.export.Dim("batch", min=1)}
    exported = torch.export.export(subject.program(), (images[:4],), dynamic_shapes=(batch,))
    with path.open("wb") as file:
        torch.export.save(exported, file, extra_files={"about": json.dumps(about(subject, OF_PROGRAMS))})
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _onnx(path: Path, subject: Subject, images: Tensor) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    made = torch.onnx.export(
        subject.program(),
        (images[:4],),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        verbose=False,
    )
    assert made is not None
    made.model.metadata_props["about"] = json.dumps(about(subject, OF_PROGRAMS))
    made.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0])


MAKERS: dict[str, Callable[[Path, Subject, Tensor], Callable[[Tensor], Tensor]]] = {
    "model.safetensors": _safetensors,
    "model.pt2": _torch_export,
    "model.onnx": _onnx,
}


@contextlib.contextmanager
def _quiet() -> Any:
    """Silences the exporters' warnings about deprecations and opsets; the files that they write are verified."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def export(folder: Path, name: str, subject: Subject, images: Tensor, limit: float | None = None) -> float:
    """Write folder/name and return the largest difference between its logits and the network's, relative to the largest logit.

    Raises ExportError where that exceeds `limit` (TOLERANCES[name]); the file is then discarded, and an older one stays.
    """
    limit = TOLERANCES[name] if limit is None else limit
    temporary = folder / f".{name}.tmp{Path(name).suffix}"
    try:
        open_new(temporary).close()  # creates a regular file; the exporter then opens it by name
        with _quiet(), torch.no_grad():
            logits_of = MAKERS[name](temporary, subject, images)
            expected = subject.program()(images)
            # in two batches, of other sizes than the one that the export was traced with
            found = torch.cat([logits_of(images[:3]), logits_of(images[3:])])
            if limit == 0:
                found = logits_of(images)
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= limit:
            raise ExportError(
                f"{folder / name}: differs from the network by {difference:.1e} of the largest logit, more than {limit:.0e}"
            )
        temporary.replace(folder / name)
        fsync_folder(folder)
    finally:
        temporary.unlink(missing_ok=True)
    return difference


def parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    result = Parser(
        prog="python -m train.export", description=summary, epilog=rest, formatter_class=argparse.RawTextHelpFormatter
    )
    result.add_argument("run", type=Path, help="the run folder")
    result.add_argument("--checkpoint", default="best.pt", help="which of its checkpoints (default best.pt)")
    result.add_argument("--ema", action="store_true", help="the average of the weights instead of the weights")
    result.add_argument("--torch-export", action="store_true", help="write model.pt2 too")
    result.add_argument("--onnx", action="store_true", help="write model.onnx too")
    result.add_argument("--data-root", type=Path, help="where the data lies now, if not in the recipe's data.root")
    return result


def main(arguments: list[str] | None = None) -> int:
    with standard_streams():
        options = parser().parse_args(arguments)
        log = Log()
        with explained(log, out_of_memory="", place=f"{options.run}", reads_files=True) as outcome:
            _export(options, log)
        return outcome.code


def _export(options: argparse.Namespace, log: Log) -> None:
    names = ["model.safetensors"]
    names += ["model.pt2"] * options.torch_export + ["model.onnx"] * options.onnx
    for name in names:
        require(name)
    run = at_home(options.run, "run folder", ExportError)
    snapshot = load_snapshot(run / options.checkpoint)
    exported = subject(snapshot, options.ema)
    images = first_test_images(snapshot, options.data_root)
    folder = own_folder(run, "export")
    folder.mkdir(exist_ok=True)
    for name in names:
        difference = export(folder, name, exported, images)
        log(
            f"{folder / name}: equals the network's logits on {len(images)} test images to {difference:.1e} of the largest"
        )


if __name__ == "__main__":
    sys.exit(main())
