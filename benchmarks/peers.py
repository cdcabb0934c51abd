"""Peers: input pipelines of other projects on the same task (shuffled batches, padding and crop, flip, cutout, on the device).

They run in a process of their own that never loads DALI, because DataLoader's workers are forked and DALI's threads do not
survive a fork. Before it is timed each peer is checked: without augmentation it must reproduce the images that it was given,
and with augmentation deliver possible augmentations of them.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.measure import CannotMeasure
from dali_pipeline.dataset import Split
from dali_pipeline.plan import NO_AUGMENT, Augment
from dali_pipeline.processors import usable_processors

Images = npt.NDArray[np.uint8]  # (N, H, W, 3)
Batches = Iterator[tuple[Tensor, Tensor]]

CROP_PAD = 4
CUTOUT = 8
PEERS_AUGMENT = Augment(pad=CROP_PAD, cutout=CUTOUT)  # the augmentation that all peers are set up for
CHECKED_IMAGES = 256
CHECK_FILL = (125, 123, 114)
ANSWER_SECONDS = 60.0  # a cold import of a peer's packages takes half of it at most


class PeerError(CannotMeasure):
    """A peer cannot be measured. The message is one line with the reason."""


class WrongImages(PeerError):
    """A peer delivers images other than the given ones, or augments them otherwise than asked."""


@dataclass(frozen=True)
class Task:
    """What a peer has to do: images (N, H, W, 3) uint8 and labels (N,) to deliver in batches on a device."""

    images: Images
    labels: npt.NDArray[np.int64]
    batch_size: int
    fill: tuple[int, int, int]
    device: torch.device
    augment: bool = True


@dataclass(frozen=True)
class Peer:
    """`open(task)` returns a function that starts one epoch. `pixels` converts the peer's batches back to (n, H, W, 3) floats in
    0..255. `padding` and `fill` are the colours that it paints where it cannot use those of the task."""

    packages: tuple[str, ...]
    open: Callable[[Task], Callable[[], Batches]]
    pixels: Callable[[Tensor], npt.NDArray[np.float32]]
    what: str
    workers: int = 0
    padding: str = "zero"
    fill: tuple[float, float, float] | None = None
    whole_epochs: bool = False  # it does all the work of an epoch before the first batch
    cuda_only: bool = False


def peers() -> dict[str, Peer]:
    """All peers by name. Those with a DataLoader have 0, 2, and as many workers as there are CPUs."""
    found: dict[str, Peer] = {}
    loaders = [
        ("torchvision_pil", ("torchvision",), _pil, "DataLoader, torchvision PIL transforms"),
        ("torchvision_v2", ("torchvision",), _v2, "DataLoader, torchvision v2 transforms"),
        ("albumentations", ("albumentations",), _albumentations, "DataLoader, albumentations"),
    ]
    for name, packages, transform, what in loaders:
        for workers in sorted({0, 2, usable_processors()[0]}):
            found[f"{name}_{workers}_workers"] = Peer(
                packages, partial(_data_loader, transform, workers), _planar, f"{what}, {workers} workers", workers
            )
    found["kornia"] = Peer(
        ("kornia",), _kornia, _unit_floats, "kornia on resident batches", fill=(0.5 * 255, 0.5 * 255, 0.5 * 255)
    )
    found["airbench"] = Peer(
        ("airbench",),
        _airbench,
        _airbench_pixels,
        "airbench CifarLoader, resident",
        padding="reflect",
        fill=(0.4914 * 255, 0.4822 * 255, 0.4465 * 255),
        whole_epochs=True,
        cuda_only=True,
    )
    return found


def _import(package: str) -> Any:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # otherwise it looks for a newer version on the internet
    return importlib.import_module(package)


def _planar(images: Tensor) -> npt.NDArray[np.float32]:
    return images.permute(0, 2, 3, 1).cpu().numpy().astype(np.float32)


def _unit_floats(images: Tensor) -> npt.NDArray[np.float32]:
    return (images.permute(0, 2, 3, 1).float() * 255).cpu().numpy()


class _Transformed(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Like torchvision.datasets.CIFAR10: takes an image from an array and applies a transform."""

    def __init__(self, task: Task, transform: Callable[[Images], Tensor]) -> None:
        self.images, self.labels, self.transform = task.images, task.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def _data_loader(
    make_transform: Callable[[Task], Callable[[Images], Tensor]], workers: int, task: Task
) -> Callable[[], Batches]:
    on_gpu = task.device.type == "cuda"
    loader = torch.utils.data.DataLoader(
        _Transformed(task, make_transform(task)),
        batch_size=task.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=on_gpu,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )

    def epoch() -> Batches:
        for images, labels in loader:
            yield images.to(task.device, non_blocking=True), labels.to(task.device, non_blocking=True)

    return epoch


def _area(task: Task) -> tuple[float, float]:
    return _share(task.images.shape[1:3])


def _share(size: tuple[int, ...]) -> tuple[float, float]:
    share = CUTOUT**2 / (size[0] * size[1])
    return share, share


def pil_augmentations(size: tuple[int, ...], augment: bool, fill: tuple[int, int, int]) -> list[Any]:
    """torchvision's transforms of a Pillow image of this height and width to uint8 (3, H, W), with the augmentation or not."""
    from torchvision import transforms

    steps: list[Any] = []
    if augment:
        steps += [transforms.RandomCrop(size, CROP_PAD), transforms.RandomHorizontalFlip()]
    steps.append(transforms.PILToTensor())
    if augment:
        steps.append(transforms.RandomErasing(p=1.0, scale=_share(size), ratio=(1, 1), value=fill))
    return steps


def _pil(task: Task) -> Callable[[Images], Tensor]:
    from PIL import Image
    from torchvision import transforms

    steps = pil_augmentations(task.images.shape[1:3], task.augment, task.fill)
    return transforms.Compose([Image.fromarray, *steps])  # type: ignore[no-any-return]


def _v2(task: Task) -> Callable[[Images], Tensor]:
    from torchvision.transforms import v2

    steps: list[Any] = [v2.ToImage()]
    if task.augment:
        steps += [v2.RandomCrop(task.images.shape[1:3], CROP_PAD), v2.RandomHorizontalFlip()]
        steps.append(v2.RandomErasing(p=1.0, scale=_area(task), ratio=(1, 1), value=list(task.fill)))
    steps.append(v2.ToPureTensor())
    return v2.Compose(steps)  # type: ignore[no-any-return]


class _Albumented:
    """Adapts albumentations, which takes and returns images by keyword, to a plain function."""

    def __init__(self, compose: Any) -> None:
        self.compose = compose

    def __call__(self, image: Images) -> Tensor:
        return self.compose(image=image)["image"]  # type: ignore[no-any-return]


def _albumentations(task: Task) -> Callable[[Images], Tensor]:
    A = _import("albumentations")
    height, width = task.images.shape[1:3]
    steps: list[Any] = []
    if task.augment:
        padded = {"min_height": height + 2 * CROP_PAD, "min_width": width + 2 * CROP_PAD}
        steps = [
            A.PadIfNeeded(**padded, border_mode=0, fill=0),  # 0 is cv2.BORDER_CONSTANT
            A.RandomCrop(height, width),
            A.HorizontalFlip(p=0.5),
            A.CoarseDropout(
                num_holes_range=(1, 1),
                hole_height_range=(CUTOUT, CUTOUT),
                hole_width_range=(CUTOUT, CUTOUT),
                fill=task.fill,
                p=1.0,
            ),
        ]
    return _Albumented(A.Compose([*steps, A.ToTensorV2()]))


def _kornia(task: Task) -> Callable[[], Batches]:
    """Images resident as uint8; each batch is gathered and augmented as floats in 0..1, as kornia expects. Its erasing takes one
    number for all channels."""
    K = _import("kornia.augmentation")
    images = torch.from_numpy(task.images).permute(0, 3, 1, 2).contiguous().to(task.device)
    labels = torch.from_numpy(task.labels).to(task.device)
    steps: list[Any] = []
    if task.augment:
        steps = [
            K.RandomCrop(tuple(images.shape[2:]), padding=CROP_PAD, p=1.0),
            K.RandomHorizontalFlip(p=0.5),
            K.RandomErasing(p=1.0, scale=_area(task), ratio=(1.0, 1.0), value=0.5),
        ]
    augment = torch.nn.Sequential(*steps)

    def epoch() -> Batches:
        order = torch.randperm(len(images), device=task.device)
        for first in range(0, len(images) - task.batch_size + 1, task.batch_size):
            taken = order[first : first + task.batch_size]
            with torch.no_grad():
                batch = augment(images[taken].float() / 255)
            yield batch, labels[taken]

    return epoch


def _airbench(task: Task) -> Callable[[], Batches]:
    """airbench's loader with its normalised half-precision images. Its padding is reflected; its cutout paints the mean."""
    loader_class = _import("airbench").CifarLoader
    with tempfile.TemporaryDirectory() as folder:
        content = {
            "images": torch.from_numpy(task.images),
            "labels": torch.from_numpy(task.labels),
            "classes": [str(label) for label in range(int(task.labels.max()) + 1)],
        }
        torch.save(content, Path(folder) / "train.pt")
        augment = {"flip": True, "translate": CROP_PAD, "cutout": CUTOUT} if task.augment else {}
        loader = loader_class(folder, train=True, batch_size=task.batch_size, aug=augment, gpu=task.device)
    return lambda: iter(loader)


def _airbench_pixels(images: Tensor) -> npt.NDArray[np.float32]:
    utils = _import("airbench.utils")
    mean, std = (x.view(1, 3, 1, 1) for x in (utils.CIFAR_MEAN, utils.CIFAR_STD))
    return _unit_floats(images.cpu().float() * std + mean)


# Correctness: without augmentation the images themselves must be delivered; with it, for each image one of the 162 possible
# windows (9 x 9 offsets, mirrored or not) with a square painted over.


def check(peer: Peer, task: Task) -> None:
    """Raise WrongImages unless the peer reproduces random images, and augments them as it is asked to."""
    generator = np.random.default_rng(0)
    _, height, width, _ = task.images.shape
    images = generator.integers(0, 256, (CHECKED_IMAGES, height, width, 3), np.uint8)
    # the label is the image's index: what comes out says what it was made from
    for augment in (False, True):
        asked = replace(task, images=images, labels=np.arange(CHECKED_IMAGES), batch_size=128, augment=augment)
        pixels, labels = _collect(peer.open(asked)(), peer.pixels)
        if augment:
            check_augmented(pixels, labels, images, peer.fill or task.fill, peer.padding)
        else:
            check_plain(pixels, labels, images)


def check_loader(make: Callable[[Split, Augment], Batches]) -> None:
    """The same check for a loader of this project; `make` returns one epoch, whose batch size divides CHECKED_IMAGES."""
    generator = np.random.default_rng(0)
    records = generator.integers(0, 256, (CHECKED_IMAGES, 1 + 3 * 32 * 32), np.uint8)  # like those of CIFAR's files
    pixels = records[:, 1:].reshape(CHECKED_IMAGES, 3, 32, 32)
    split = Split(pixels, np.arange(CHECKED_IMAGES), planar=True)
    images = pixels.transpose(0, 2, 3, 1)
    check_plain(*_collect(make(split, NO_AUGMENT), _planar), images)
    check_augmented(*_collect(make(split, PEERS_AUGMENT), _planar), images, CHECK_FILL)


def _collect(
    epoch: Batches, pixels_of: Callable[[Tensor], npt.NDArray[np.float32]]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    batches = list(epoch)
    pixels = np.concatenate([pixels_of(images) for images, _ in batches])
    return pixels, torch.cat([labels for _, labels in batches]).cpu().numpy()


def check_plain(pixels: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], images: Images) -> None:
    """Without augmentation an epoch is every image once, with its label."""
    if sorted(labels.tolist()) != list(range(len(images))):
        raise WrongImages(f"an epoch holds {len(set(labels.tolist()))} different images of {len(images)}")
    worst = np.abs(pixels - images[labels]).max()
    if not worst <= 1:
        raise WrongImages(f"without augmentation, pixels differ from the original by up to {worst:.0f}")


def check_augmented(
    pixels: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    images: Images,
    fill: tuple[float, float, float],
    padding: str = "zero",
) -> None:
    """Each image is a window of its padded original, mirrored or not, with one square painted; all windows occur."""
    if sorted(labels.tolist()) != list(range(len(images))):
        raise WrongImages(f"an epoch holds {len(set(labels.tolist()))} different images of {len(images)}")
    count_, height, width, _ = images.shape
    border = ((0, 0), (CROP_PAD, CROP_PAD), (CROP_PAD, CROP_PAD), (0, 0))
    rounded = np.rint(pixels).astype(np.int16)
    padded = np.pad(images[labels], border, mode="reflect" if padding == "reflect" else "constant").astype(np.int16)
    offsets = 2 * CROP_PAD + 1
    fewest = np.full(count_, height * width + 1)
    window = np.zeros(count_, np.int64)
    differs = np.ones((count_, height, width), bool)
    for index in range(2 * offsets**2):
        dy, dx, flip = index // 2 // offsets, index // 2 % offsets, index % 2
        crop = padded[:, dy : dy + height, dx : dx + width]
        crop = crop[:, :, ::-1] if flip else crop
        wrong = (np.abs(rounded - crop) > 1).any(3)
        number = wrong.sum((1, 2))
        better = number < fewest
        fewest[better], window[better], differs[better] = number[better], index, wrong[better]
    if fewest.max() > CUTOUT**2:
        raise WrongImages(
            f"{(fewest > CUTOUT**2).sum()} of {count_} images are no crop and flip of their original: at least "
            f"{fewest.max()} pixels differ, cutout paints {CUTOUT**2}"
        )
    painted = np.all(np.abs(pixels - np.asarray(fill, np.float32)) <= 1, axis=3)
    if not all(_is_square(differs[i], painted[i]) for i in range(count_)):
        raise WrongImages(f"an image has no square of {CUTOUT} x {CUTOUT} in the fill colour, or other pixels changed")
    mirrored = float((window % 2).mean())
    if not 0.35 < mirrored < 0.65:  # five standard deviations
        raise WrongImages(f"{mirrored:.0%} of the images are mirrored, expected half")
    if len(set((window // 2).tolist())) < 0.7 * offsets**2:
        raise WrongImages(f"only {len(set((window // 2).tolist()))} of {offsets**2} crop offsets occur")


def _is_square(differs: npt.NDArray[np.bool_], painted: npt.NDArray[np.bool_]) -> bool:
    """Whether the pixels that differ from the original span a square of side CUTOUT (or the part of one inside the image) that
    is painted completely. Some pixels of the square may have had the fill's colour before."""
    box = []
    for axis in (0, 1):
        lines = np.flatnonzero(differs.any(1 - axis))
        if len(lines) == 0:
            return False
        first, stop = int(lines[0]), int(lines[-1]) + 1
        clipped = first == 0 or stop == differs.shape[axis]
        if stop - first != CUTOUT and not (clipped and stop - first < CUTOUT):
            return False
        box.append(slice(first, stop))
    return bool(painted[box[0], box[1]].all())


# The process that the peers run in


class PeerHost:
    """Times one peer at a time in another process. A process that dies or hangs is replaced for the next request."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._closed = False
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._task), name="peers")
        self._process.start()
        theirs.close()

    def ask(self, *request: Any) -> Any:
        """Send a request and return the answer. PeerError where the peer fails, or the process died or hangs."""
        if self._closed:
            raise PeerError("the process of the peers has ended")
        if self._connection.closed:
            self._start()
        try:
            self._connection.send(request)
            if not self._connection.poll(ANSWER_SECONDS):
                self._stop()
                raise PeerError(f"no answer within {ANSWER_SECONDS:.0f} s")
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._stop()
            raise PeerError(f"the process of the peers ended ({type(error).__name__})") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stage(self, name: str, seconds: float) -> RemoteStage:
        """The peer, checked and ready to be timed; PeerError with the reason where it is not."""
        self.ask("open", name)
        return RemoteStage(name, self, seconds)

    def close(self) -> None:
        """End the process. It is asked to exit first, so that it can end its workers."""
        self._closed = True
        if self._process.is_alive():
            try:
                self._connection.send(("end",))
                self._process.join(5)
            except OSError:
                pass
        self._stop()

    def _stop(self) -> None:
        for end in (self._process.terminate, self._process.kill):
            if self._process.is_alive():
                end()
                self._process.join(5)
        self._connection.close()


@dataclass
class RemoteStage:
    """A peer as a stage for `measure.interleave`. Between samples its workers do not run."""

    name: str
    host: PeerHost
    seconds: float

    def warm_up(self) -> None:
        self.sample()

    def sample(self) -> float:
        return float(self.host.ask("sample", self.name, self.seconds))


def _serve(connection: Connection, task: Task) -> None:
    known = peers()
    try:
        while True:
            try:
                request = connection.recv()
            except (EOFError, KeyboardInterrupt):
                return
            if request[0] == "end":
                return
            answer: Any
            try:
                peer = known[request[1]]
                answer = _open(peer, task) if request[0] == "open" else _sample(peer, task, request[2])
            except PeerError as error:
                answer = error
            except (
                Exception
            ) as error:  # an error of a peer is reported as its result, and the other peers are measured all the same
                answer = PeerError(f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}")
            connection.send(answer)
    finally:
        connection.close()


def _open(peer: Peer, task: Task) -> str:
    if peer.cuda_only and task.device.type != "cuda":
        raise PeerError("needs a CUDA device")
    for package in peer.packages:
        try:
            _import(package)
        except ImportError as error:
            reason = f"{package} is not installed" if getattr(error, "name", None) == package else str(error)
            raise PeerError(f"{reason}; pip install -e '.[bench]'") from None
    check(peer, task)
    return peer.what


def _sample(peer: Peer, task: Task, seconds: float) -> float:
    """Images per second, without the first batches, which include starting workers and filling queues."""
    start = peer.open(task)
    batches = chain.from_iterable(start() for _ in count())
    steps_per_epoch = len(task.images) // task.batch_size
    for _ in range(steps_per_epoch if peer.whole_epochs else 2 * peer.workers + 2):
        next(batches)
    _synchronize(task.device)
    begun = time.perf_counter()
    done, elapsed = 0, 0.0
    while elapsed < seconds:
        for _ in range(steps_per_epoch if peer.whole_epochs else 1):
            next(batches)
            done += 1
        if peer.whole_epochs or task.device.type != "cuda" or done % 16 == 0:
            _synchronize(task.device)
            elapsed = time.perf_counter() - begun
    return done * task.batch_size / elapsed


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
