"""Two minutes on a new machine: the device, DALI's probe, its pixels on whole batches, ten steps in each mode of compiling.

python benchmarks/smoke.py [--json FILE] [--modes MODE ...] [section.key=value ...]

Random images; every part is a line, `ok` or `FAILED`, and the next one starts. The exit code is 1 where one failed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of this folder, whose files could hide packages of the same name

if TYPE_CHECKING:
    from dali_pipeline.dataset import Dataset
    from train.config import Config

MODES = ("off", "default", "reduce-overhead")
RECIPE = {
    "data.name": "synthetic",
    "data.synthetic_count": "10240",
    "schedule.lr_max": "0.1",
    "schedule.lr_min": "0.01",
}
STEPS, BATCHES = 10, 4
RATE = 1e-3  # of learning
AGREEMENT = 0.02  # of the first loss, between modes: their rounding in 16 bits is a tenth of it


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = " ".join(f"{key}={value}" for key, value in RECIPE.items())
    result.add_argument("overrides", nargs="*", metavar="section.key=value", help=f"on top of the recipe and {words}")
    result.add_argument("--config", default=str(ROOT / "configs" / "onecycle.yaml"), help="the recipe (onecycle.yaml)")
    result.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="train.compile (all of them)")
    result.add_argument("--json", type=Path, metavar="FILE", help="write the last line of the output here too")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_intermixed_args(arguments)
    from benchmarks.outcome import explained, write_report
    from dali_pipeline import sources
    from train.config import changed, load_config

    with explained() as outcome:
        given = {word.partition("=")[0] for word in options.overrides}
        words = [f"{key}={value}" for key, value in RECIPE.items() if key not in given]
        config = load_config(options.config, [*words, *options.overrides])
        if config.data.name == "synthetic" and "data.synthetic_count" not in given:
            count = max(config.data.synthetic_count, STEPS * config.train.batch_size)
            config = changed(config, {"data.synthetic_count": count})
        report: dict[str, Any] = {"kind": "smoke", "checks": []}
        dataset = sources.load(config.data, download=False)
        losses: dict[str, float] = {}
        checks: dict[str, Callable[[], str]] = {
            "device": lambda: device(config),
            "DALI's probe": lambda: probe(config),
            "DALI's pixels": lambda: pixels(config, dataset),
            **{f"compile {mode}": lambda mode=mode: ten_steps(config, dataset, mode, losses) for mode in options.modes},
        }
        for name, check in checks.items():
            begun = time.perf_counter()
            try:
                ok, said = True, check()
            except Exception as error:  # whatever it is: the next part may work
                ok, said = False, f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
                outcome.code = 1
            seconds = round(time.perf_counter() - begun, 1)
            report["checks"].append({"name": name, "ok": ok, "said": said, "seconds": seconds})
            print(f"{'ok' if ok else 'FAILED':<8}{name}: {said} ({seconds} s)", flush=True)
            if options.json:
                write_report(options.json, report)
        print(json.dumps(report))
    return outcome.code


def device(config: Config) -> str:
    """What the training would run on; raises where it would not be the device asked for."""
    from train.machine.runtime import prepare

    train = config.train
    runtime = prepare(
        device=train.device,
        precision=train.precision,
        compile=train.compile,
        step_graph=train.step_graph,
        channels_last=train.channels_last,
    )
    return "; ".join(runtime.notes)


def probe(config: Config) -> str:
    """DALI's graph on a few small images."""
    from dali_pipeline.backend import choose_backend

    return choose_backend("dali", _device(config)).reason


def pixels(config: Config, dataset: Dataset) -> str:
    """The first batches of both backends, byte for byte."""
    import torch

    from train.step.trainer import make_train_loader

    loaders = [make_train_loader(config, dataset, _device(config), backend) for backend in ("dali", "torch")]
    try:
        pairs = islice(zip(*(loader.epoch(0) for loader in loaders), strict=True), BATCHES)
        for place, ((images, labels), (expected, theirs)) in enumerate(pairs):
            wrong = int((images != expected).sum())
            if wrong or not torch.equal(labels, theirs):
                raise ValueError(f"batch {place}: {wrong} of {images.numel()} bytes differ from torch's, or a label")
    finally:
        for loader in loaders:
            loader.close()
    return f"{BATCHES} batches of {config.train.batch_size} equal torch's"


def ten_steps(config: Config, dataset: Dataset, mode: str, losses: dict[str, float]) -> str:
    """A session in this mode; its first loss must be that of the modes before it, up to rounding."""
    import torch

    from train.config import changed
    from train.screen.log import Log
    from train.session import Session

    torch._dynamo.reset()
    with Session(changed(config, {"train.compile": mode}), Log(quiet=True)) as session:
        session.build(dataset=dataset)
        session.warm_up()
        trainer = session.trainer
        begun = time.perf_counter()
        batches = islice(trainer.train_loader.epoch(0), STEPS)
        found = [float(trainer.train_one(images, labels, RATE)[0]) for images, labels in batches]
        seconds = time.perf_counter() - begun
    if len(found) < STEPS:
        raise ValueError(f"{len(found)} batches of {config.train.batch_size}, for {STEPS} steps the data are too few")
    if not all(map(math.isfinite, found)):
        raise ValueError(f"losses {found}")
    for other, loss in losses.items():
        if abs(found[0] - loss) > AGREEMENT * abs(loss):
            raise ValueError(f"first loss {found[0]:.4f}, with compile {other} it is {loss:.4f}")
    losses[mode] = found[0]
    backend, precision = session.backend.name, session.runtime.precision
    return f"{STEPS} steps in {seconds:.2f} s, first loss {found[0]:.4f} ({backend}, {precision}), compiled in " + (
        f"{session.times.compile:.1f} s"
    )


def _device(config: Config) -> Any:
    import torch

    wanted = config.train.device
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)


if __name__ == "__main__":
    sys.exit(main())
