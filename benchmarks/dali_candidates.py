"""Different graphs that apply the same plans, on the CPU or a GPU, in images per second:

python benchmarks/dali_candidates.py --device cuda

Each graph is first checked against the torch graph, then timed once in every round; medians and ranges are over the rounds. On
the CPU, images per second of processor time are given too: on a shared machine they vary less.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

if __name__ == "__main__":  # instead of this folder, whose files could hide packages of the same name
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.given import whole
from benchmarks.outcome import explained
from dali_pipeline import sources
from dali_pipeline.dali import backend_of, device_id, import_dali
from dali_pipeline.dali_graph import DaliGraph
from dali_pipeline.dataset import Split
from dali_pipeline.feed import FeedOrder
from dali_pipeline.layout import resident_windows
from dali_pipeline.options import DataOptions
from dali_pipeline.plan import Augment, Plan, Stream
from dali_pipeline.resident import resident_images, to_device
from dali_pipeline.torch_graph import TorchGraph
from train.screen.streams import Parser

FILL = (125, 123, 114)
NextBatch = Callable[[], Tensor]


def plans(split: Split, order: FeedOrder) -> Callable[[], Plan]:
    """A source of plans, as a graph pulls them."""

    def forever() -> Iterator[Plan]:
        stream = Stream(len(split), order.batch_size, order.augment, seed=0)
        epoch, step = 0, 0
        while True:
            yield stream.batch(epoch, step)
            epoch, step = stream.next_step(epoch, step)

    return forever().__next__


def sliced(split: Split, order: FeedOrder) -> NextBatch:
    """One DALI sample an image: gather in torch, then slice and erase."""
    dali, fn = import_dali()
    batch_size, augment, device = order.batch_size, order.augment, order.device
    images = resident_images(split, device, mirrored=augment.flip)
    next_slots, next_places = plans(split, order), plans(split, order)

    def pull_images() -> Any:
        slot, _ = resident_windows(next_slots(), len(split), augment)
        batch = images.index_select(0, to_device(slot, device))
        return batch if device.type == "cuda" else batch.numpy()

    def pull_places() -> tuple[Any, Any]:
        plan = next_places()
        _, window = resident_windows(plan, len(split), augment)
        centre = np.stack([plan.cy, plan.cx], 1) - augment.cutout // 2
        return window.astype(np.int32), centre.astype(np.float32)

    pipe = dali.Pipeline(batch_size=batch_size, num_threads=2, device_id=device_id(device), prefetch_queue_depth=2)
    with pipe:
        out = fn.external_source(pull_images, device=backend_of(device), layout="HWC")
        start, hole = fn.external_source(pull_places, num_outputs=2)
        policy = "pad" if augment.padding_mode == "zero" else "reflect_101"
        size = [split.height, split.width]
        out = fn.slice(out, start=start, shape=size, axis_names="HW", out_of_bounds_policy=policy)
        fill = [float(value) for value in order.fill]
        out = fn.erase(out, anchor=hole, shape=[augment.cutout] * 2, axis_names="HW", fill_value=fill)
        pipe.set_outputs(out)

    def run() -> Tensor:
        batch = pipe.run(torch.cuda.current_stream(device))[0] if device.type == "cuda" else pipe.run()[0]
        images: Tensor = torch.utils.dlpack.from_dlpack(batch.as_tensor())
        return images.permute(0, 3, 1, 2)

    return run


class PilImages(torch.utils.data.Dataset[tuple[Any, int]]):
    def __init__(self, split: Split) -> None:
        from torchvision import transforms

        self.images, self.labels = split.images, split.labels
        self.transform = transforms.Compose(
            [transforms.RandomCrop(split.height, 4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def torchvision_pil(split: Split, batch_size: int) -> NextBatch:
    """The usual way: a DataLoader with two workers, crop and flip on PIL images (no cutout)."""
    loader = torch.utils.data.DataLoader(PilImages(split), batch_size, shuffle=True, num_workers=2, drop_last=True)

    def forever() -> Iterator[Tensor]:
        while True:
            for images, _ in loader:
                yield images

    batches = forever()
    return lambda: next(batches)


def rate(run: NextBatch, batch_size: int, seconds: float, device: torch.device) -> tuple[float, float]:
    """Images a second of wall clock, and of this process's processor time, over at least `seconds`."""
    done, start, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        for _ in range(8):
            images = run()
        done += 8 * batch_size
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    assert len(images) == batch_size
    return done / (time.perf_counter() - start), done / (time.process_time() - cpu)


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=whole(), default=512)
    parser.add_argument("--padding-mode", choices=("zero", "reflect"), default="zero")
    parser.add_argument("--seconds", type=float, default=0.5, help="per way and round")
    parser.add_argument("--rounds", type=whole(), default=5)
    parser.add_argument("--threads", type=whole(), default=None, help="torch's, on the CPU")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with explained() as outcome:
        compare(options)
    return outcome.code


def compare(options: argparse.Namespace) -> None:
    """Check every graph, measure them in turn, and print a line for each."""
    device, batch_size = torch.device(options.device), options.batch_size
    augment = Augment(padding_mode=options.padding_mode)
    order = FeedOrder(batch_size=batch_size, augment=augment, fill=FILL, device=device)
    split = sources.load(DataOptions(name="synthetic")).train
    ways: dict[str, NextBatch] = {"torch eager": TorchGraph(split, order, plans(split, order)).run}
    reference = ways["torch eager"]()
    ways["torch compiled"] = TorchGraph(split, replace(order, compiled=True), plans(split, order)).run
    for cutout_by in ("paste", "erase"):
        for padded in (False, True):
            name = f"dali multi_paste, cutout by {cutout_by}, {'padded' if padded else 'unpadded'}"
            graph = DaliGraph(split, order, plans(split, order), cutout_by=cutout_by, padded=padded)
            ways[name] = graph.run
    ways["dali gather, slice, erase"] = sliced(split, order)
    for name, run in ways.items():
        if name != "torch eager":
            assert torch.equal(run(), reference), name
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):
        for name, run in ways.items():
            measured = rate(run, batch_size, options.seconds, device)
            if number:  # the first round warms up
                results[name].append(measured)
    # Last and on its own: its workers run on after each round.
    pil = torchvision_pil(split, batch_size)
    rate(pil, batch_size, 1.0, device)
    results["torchvision DataLoader, PIL, 2 workers"] = [
        (rate(pil, batch_size, 1.0, device)[0], float("nan")) for _ in range(options.rounds)
    ]
    print(f"{device}, batch {batch_size}, {options.rounds} rounds; images a second: median (range); per CPU second")
    for name, rounds in results.items():
        wall, cpu = [pair[0] for pair in rounds], [pair[1] for pair in rounds]
        span = f"({min(wall):,.0f}-{max(wall):,.0f})"
        print(f"{name:46} {statistics.median(wall):11,.0f} {span:24} {statistics.median(cpu):11,.0f}")


if __name__ == "__main__":
    sys.exit(main())
