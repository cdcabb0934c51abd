"""What a training needs of its machine, measured in a new process: time to the first step, memory by stage, and the growth of
memory over 50 epochs of the pipeline.

python benchmarks/footprint.py [section.key=value ...]
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks.given import parsed  # noqa: E402

if TYPE_CHECKING:
    from train.config import Config
    from train.session import Session

STEPS = 3
PIPELINE_EPOCHS = 50


def memory_mib(name: str) -> float:
    """VmRSS or VmHWM (its peak) of this process; 0 where there is no /proc. getrusage's peak would include the parent's."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


def children_mib() -> float:
    """Proportional memory (PSS) of this process's descendants, such as the compiler's workers."""
    total = 0.0
    waiting = [Path("/proc/self")]
    while waiting:
        process = waiting.pop()
        for children in process.glob("task/*/children"):
            try:
                waiting += [Path("/proc") / pid for pid in children.read_text(encoding="ascii").split()]
            except OSError:
                continue
        if process.name == "self":
            continue
        try:
            lines = (process / "smaps_rollup").read_text(encoding="ascii").splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
        except OSError:
            continue
    return total


def measure(config: Config) -> dict[str, Any]:
    """Measure the stages of `python -m train`: data, network, compilation, a few steps, evaluation, a checkpoint; then the
    pipeline alone."""
    resident: dict[str, float] = {"interpreter": memory_mib("VmRSS")}
    from train.config import changed
    from train.screen.log import Log
    from train.session import Session

    resident["imports"] = memory_mib("VmRSS")
    with Session(changed(config, {"data.download": False}), Log(quiet=True)) as session:
        return _measure(session, resident)


def _measure(session: Session, resident: dict[str, float]) -> dict[str, Any]:
    from benchmarks.measure import device_peak_gib
    from train.disk.checkpoint import save_checkpoint
    from train.step.meter import StepMeter
    from train.step.schedule import OneCycle

    def note(name: str) -> None:
        resident[name] = memory_mib("VmRSS")

    session.build(check=lambda dataset: note("data"))
    note("trainer and resident images")
    session.warm_up()
    note("compiled")
    trainer = session.trainer
    workers = children_mib()
    peak_of_compilation = memory_mib("VmHWM")

    schedule = OneCycle(1e-3, 1e-3, 1.0, 10**12)
    meter = StepMeter(0, trainer.steps_per_epoch, trainer.runtime.device)

    def after_step(done: int) -> None:
        meter.poll(done)
        if done == first + 1:
            if trainer.runtime.device.type == "cuda":
                meter.finish(done)  # waits for the step
            print("first step", flush=True)

    first = trainer.steps_per_epoch - STEPS
    trainer.train_epoch(0, schedule, meter, first, after_step)
    note("steps")
    trainer.evaluate()
    note("evaluation")
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "last.pt", trainer.state())
    peak = memory_mib("VmHWM")
    grown = 0.0
    for epoch in range(PIPELINE_EPOCHS + 3):
        if epoch == 3:  # the first epochs fill the allocators' caches
            gc.collect()
            grown = -memory_mib("VmRSS")
        for _ in trainer.train_loader.epoch(epoch):
            pass
    gc.collect()
    grown += memory_mib("VmRSS")
    return {
        "device_peak_gib": device_peak_gib(trainer.runtime.device),
        "peak_mib": peak,
        "peak_of_compilation_mib": peak_of_compilation,
        "compiler_workers_mib": workers,
        "resident_mib": resident,
        "growth_mib_over_50_epochs": grown,
        "compile_seconds": session.times.compile,
        "images": len(session.dataset.train),
    }


def footprint_of(config: Config, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure the configuration in a new process, whose compile cache is warm if this one has compiled the same."""
    from train.config import to_yaml

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        begun = time.perf_counter()
        words = [sys.executable, str(Path(__file__).resolve()), "--config", str(path)]
        first_step, last = 0.0, ""
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("first step"):
                    first_step = time.perf_counter() - begun
                last = line
    if process.returncode != 0:
        raise RuntimeError(f"benchmarks/footprint.py ended with exit code {process.returncode}")
    found: dict[str, Any] = json.loads(last) | {"seconds_to_first_step": first_step}
    on_device = "" if found["device_peak_gib"] is None else f" and {found['device_peak_gib']:.2f} GiB of the GPU's"
    say(
        f"a run from the outside: first step after {first_step:.1f} s (compile {found['compile_seconds']:.1f} s), peak memory "
        f"{found['peak_mib'] / 1024:.2f} GiB{on_device}, {found['growth_mib_over_50_epochs']:+.0f} MiB over {PIPELINE_EPOCHS} "
        "epochs of the pipeline"
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--config", default=str(ROOT / "configs" / "onecycle.yaml"))
    options = parsed(parser)
    from benchmarks.outcome import explained
    from train.config import load_config

    with explained() as outcome:
        print(json.dumps(measure(load_config(options.config, options.overrides))))
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
