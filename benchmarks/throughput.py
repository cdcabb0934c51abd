"""Images per second of the input pipeline, the training step and training as a whole; what limits it; other pipelines' speed.

python benchmarks/throughput.py [--quick] [--json FILE] [--ablations] [--profile FILE] [section.key=value ...]
python benchmarks/throughput.py --folder DIR [--json FILE] [section.key=value ...]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of this folder, whose files could hide packages of the same name

from benchmarks.given import parsed, whole  # noqa: E402
from train.screen.streams import Parser  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.measure import Rate
    from benchmarks.stages import Kind, Pipeline, Training
    from dali_pipeline.dataset import Dataset, Split
    from dali_pipeline.plan import Augment
    from train.config import Config

KIND = "throughput"  # of a report, in its JSON file
REFERENCE_PEER = "torchvision_pil_2_workers"
# in the message of dali_pipeline/backend.py where DALI's probe finds other pixels
WRONG_PIXELS = "its pixels are wrong"
CPU_WIDTH, GPU_WIDTH = 16, 64
SECONDS, QUICK_SECONDS = 0.3, 0.15  # of one sample
ABLATIONS = ("channels_last", "compile", "step_graph", "precision", "batch", "pipelines", "prefetch", "strips", "graph")


def parser() -> argparse.ArgumentParser:
    result = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help=f"on top of the recipe; net.width is {GPU_WIDTH} on a GPU and {CPU_WIDTH} elsewhere by default",
    )
    result.add_argument("--config", default=str(ROOT / "configs" / "onecycle.yaml"), help="the recipe (onecycle.yaml)")
    result.add_argument("--data-root", metavar="DIR", help="measure on the CIFAR-10 in DIR; default: random images")
    result.add_argument(
        "--folder",
        metavar="DIR",
        help="measure how image files become batches: those in DIR, by torchvision's ImageFolder and in this project's ways",
    )
    result.add_argument("--quick", action="store_true", help="within a minute: few repeats, one peer, 10,000 images")
    result.add_argument("--repeats", type=whole(), help="samples a stage (default: 9, with --quick or --folder 3)")
    result.add_argument(
        "--peers",
        action=argparse.BooleanOptionalAction,
        help=f"all other pipelines that are installed (default), none, or with --quick {REFERENCE_PEER} alone",
    )
    result.add_argument(
        "--footprint",
        action=argparse.BooleanOptionalAction,
        help="time to the first step, and memory, of a run in a process of its own (default, but not with --quick)",
    )
    result.add_argument("--ablations", action="store_true", help="also vary one thing at a time; takes long on a CPU")
    result.add_argument(
        "--ablate",
        action="append",
        default=[],
        metavar="NAME",
        choices=ABLATIONS,
        help=f"only this of the ablations (repeatable): {', '.join(ABLATIONS)}",
    )
    result.add_argument("--picture", type=Path, metavar="FILE", help="with --ablations: default throughput.png")
    result.add_argument(
        "--profile", type=Path, metavar="FILE", help="write a torch.profiler trace, list costly kernels"
    )
    result.add_argument("--json", type=Path, metavar="FILE", help="write the last line of the output here too")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(parser(), arguments)
    from benchmarks.machine import command  # imports torch, for which --help need not wait
    from benchmarks.outcome import explained, write_report

    words = command("throughput", sys.argv[1:] if arguments is None else arguments)

    def save(report: dict[str, Any]) -> None:
        """Write the results so far, as ablations can take very long and may be interrupted."""
        report["command"] = words
        if options.json:
            write_report(options.json, report)

    with explained() as outcome:
        measured = measure_files if options.folder else measure
        report = measured(options, lambda line: print(line, flush=True), save)
        save(report)
        print(json.dumps(report))
        for name in report.get("wrong_pixels", []):
            print(f"error: {name}: {report['left_out'][name]}", file=sys.stderr)
            outcome.code = 1
    return outcome.code


def recipe(options: argparse.Namespace) -> Config:
    """The recipe with the settings of a benchmark: data without a download, no range test, a width that suits the machine.
    ConfigError where it has an augmentation that the peers are not set up for."""
    import torch

    from benchmarks.peers import PEERS_AUGMENT
    from train.config import ConfigError, load_config

    wanted = {
        "data.name": "folder" if options.folder else "cifar10" if options.data_root else "synthetic",
        "data.root": options.data_root or "data",
        "data.download": "false",
        "net.width": str(GPU_WIDTH if torch.cuda.is_available() else CPU_WIDTH),
        "schedule.lr_max": "0.1",
        "schedule.lr_min": "0.01",
    }
    given = dict(word.split("=", 1) for word in options.overrides if "=" in word)
    if {**wanted, **given}["data.name"] == "synthetic":
        wanted["data.synthetic_count"] = "10000" if options.quick else "50000"
    words = [f"{key}={value}" for key, value in wanted.items() if key not in given]
    config = load_config(options.config, [*words, *options.overrides])
    if options.peers is not False:
        for key, theirs in asdict(PEERS_AUGMENT).items():
            if (asked := getattr(config.augment, key)) != theirs:
                raise ConfigError(
                    f"augment.{key}: {asked} here, {theirs} in the other pipelines; measure without them: --no-peers"
                )
    return config


def measure_files(
    options: argparse.Namespace, say: Callable[[str], None], save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """What --folder asks for."""
    from benchmarks.image_folder import check, measure_folder

    check(options)
    return measure_folder(options, recipe(options), say)


def measure(
    options: argparse.Namespace, say: Callable[[str], None], save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Do all measurements that were asked for, one after the other, so that each has the whole machine."""
    from benchmarks.machine import crowded, machine_facts
    from benchmarks.stages import Training
    from dali_pipeline import sources
    from train.machine.environment import git_commit, versions
    from train.machine.runtime import prepare
    from train.screen.log import Log
    from train.session import Session

    begun = time.perf_counter()
    config = recipe(options)
    train = config.train
    runtime = prepare(
        device=train.device,
        precision=train.precision,
        compile=train.compile,
        step_graph=train.step_graph,
        channels_last=train.channels_last,
    )
    dataset = sources.load(config.data, download=False)
    repeats = options.repeats or (3 if options.quick else 9)
    seconds = QUICK_SECONDS if options.quick else SECONDS
    report: dict[str, Any] = {
        "kind": KIND,
        "machine": machine_facts(runtime.device),
        "versions": {**versions(), **_peer_versions()},
        "commit": git_commit(),
        "command": "",
        "settings": {
            "device": runtime.device.type,
            "precision": runtime.precision,
            "compile": runtime.compile_mode or "off",
            "channels_last": runtime.channels_last,
            "width": config.net.width,
            "batch_size": train.batch_size,
            "images": len(dataset.train),
            "data": dataset.name,
            "image_size": [dataset.height, dataset.width],
            "augment": asdict(config.augment),
            "quick": options.quick,
        },
        "stages": {},
        "peers": {},
        "left_out": {},
        "wrong_pixels": [],
        "ratios": {},
    }
    say(f"machine: {describe(report['machine'])}")
    if warning := crowded(report["machine"]):
        say(warning)
    say(
        f"{dataset.name}, {len(dataset.train):,} images; width {config.net.width}, batch {train.batch_size}, "
        f"{runtime.precision}, compile {runtime.compile_mode or 'off'}"
    )
    say(f"\n{'images/s':<44}{'median':>12}{'spread':>10}{'n':>4}")
    measurement = Measurement(
        config=config,
        dataset=dataset,
        device=runtime.device,
        repeats=repeats,
        seconds=seconds,
        report=report,
        say=say,
    )
    with Session(config, Log(quiet=True)) as session:  # first, as it tells most
        training = Training(session, dataset)
        measurement.training(training)
        save(report)
        if options.profile:
            from benchmarks.profiling import profile

            for line in profile(training, options.profile):
                say(line)
    kinds = measurement.pipelines()
    save(report)
    if not options.quick:
        measurement.augmentations(kinds)
        save(report)
    if (
        options.peers is not False
    ):  # after this project's own stages, as a peer that hangs is given up only after a while
        measurement.peers(kinds, [REFERENCE_PEER] if options.quick and not options.peers else None)
        save(report)
    if options.footprint if options.footprint is not None else not options.quick:
        from benchmarks.footprint import footprint_of

        report["footprint"] = footprint_of(config, say)
        save(report)
    if options.ablations or options.ablate:
        from benchmarks.ablations import ablate, draw

        names = options.ablate or list(ABLATIONS)
        picture = options.picture or Path("throughput.png")
        report["ablations"] = {}
        for name in names:
            report["ablations"][name] = []
            for row in ablate(name, config, dataset, max(3, repeats // 2), seconds, say):
                report["ablations"][name].append(row)
                save(report)
            draw(report, picture)
        say(f"\npicture: {picture}")
    report["load_average_after"] = _load_average()
    load = (report["machine"]["load_average_before"] or [0.0])[0]
    if load > report["machine"]["cpus_usable"] / 4:
        say(
            f"\nWARNING: the load average was {load:.1f} before: other work slows what is measured, ratios less than rates"
        )
    report["seconds"] = time.perf_counter() - begun
    say("")
    for line in conclusions(report):
        say(line)
    return report


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The measurements, with how often and how long to measure. Results go into `report`, lines for a person to `say`."""

    config: Config
    dataset: Dataset
    device: Any
    repeats: int
    seconds: float  # of one sample
    report: dict[str, Any]
    say: Callable[[str], None]

    def pipelines(self) -> dict[str, Kind]:
        """Measure every pipeline of this project that runs here and gives the right pixels. Returns their kinds by name."""
        import torch

        from benchmarks.measure import interleave
        from benchmarks.peers import PeerError, WrongImages, check_loader
        from benchmarks.stages import pipeline_kinds
        from dali_pipeline.backend import BackendError

        devices = [torch.device("cpu")] + ([self.device] if self.device.type != "cpu" else [])
        kinds, left_out = pipeline_kinds(devices)
        for name, reason in left_out.items():
            self._leave_out(name, reason)
            if WRONG_PIXELS in reason:
                self.report["wrong_pixels"].append(name)
        sound = {}
        with ExitStack() as stack:
            stages = []
            for name, kind in kinds.items():
                try:
                    check_loader(partial(_small_epoch, kind))
                    pipeline = self._pipeline(kind)
                    stack.callback(pipeline.close)
                    pipeline.run(1)
                except (PeerError, BackendError, RuntimeError) as error:
                    reason = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
                    self._leave_out(name, reason)
                    if isinstance(error, WrongImages):
                        self.report["wrong_pixels"].append(name)
                else:
                    sound[name] = kind
                    stages.append(pipeline.stage(name, self.seconds))
            rates = interleave(stages, self.repeats)
        self._say_rates(rates)
        self.report["stages"] |= {name: rate.record() for name, rate in rates.items()}
        self._compare(rates)
        return sound

    def peers(self, kinds: dict[str, Kind], names: Sequence[str] | None) -> None:
        """Measure the peers (`names`, or all) in turn with this project's pipelines on the same device, for their ratios."""
        from benchmarks.measure import Sampled, interleave
        from benchmarks.peers import PeerError, PeerHost, Task, peers

        known = peers()
        batch_size = self.config.train.batch_size
        task = Task(self.dataset.train.images, self.dataset.train.labels, batch_size, self.dataset.fill, self.device)
        with ExitStack() as stack:
            host = PeerHost(task)
            stack.callback(host.close)
            stages: list[Sampled] = []
            for name in names or known:
                try:
                    stages.append(host.stage(name, self.seconds))
                except PeerError as error:
                    self._leave_out(name, str(error))
            for name in _ours(self.device).values():
                if name in kinds:
                    pipeline = self._pipeline(kinds[name])
                    stack.callback(pipeline.close)
                    stages.append(pipeline.stage(name, self.seconds))
            rates = interleave(stages, self.repeats, self._leave_out)
        self._say_rates(rates, {name: peer.what for name, peer in known.items()})
        for name, rate in rates.items():
            self.report["peers" if name in known else "stages"][name] = rate.record()
        self._compare(rates)

    def augmentations(self, kinds: dict[str, Kind]) -> None:
        """Measure each augmentation by itself and none, with the backend that training uses, and what each costs per image."""
        from benchmarks.measure import interleave
        from benchmarks.stages import Kind, each_alone

        dali = kinds.get(f"pipeline_dali_{self.device.type}") if self.config.data.backend != "torch" else None
        kind = dali or Kind("torch", self.device)
        augmentations = each_alone(self.config.augment)
        with ExitStack() as stack:
            stages = []
            for name, augment in augmentations.items():
                pipeline = self._pipeline(kind, augment)
                stack.callback(pipeline.close)
                stages.append(pipeline.stage(f"augment_{name}", self.seconds))
            rates = interleave(stages, self.repeats)
        self._say_rates(rates, {f"augment_{name}": f"{kind.backend}, augmentation: {name}" for name in augmentations})
        none = rates["augment_none"]
        costs = {}
        for name in augmentations:
            if name != "none":
                rate = rates[f"augment_{name}"]
                costs[name] = 1e9 / none.median * (1 / rate.over(none) - 1)
        self.report["stages"] |= {name: rate.record() for name, rate in rates.items()}
        self.report["augmentation_ns_per_image"] = costs
        self.say("cost an image: " + ", ".join(f"{name} {cost:,.0f} ns" for name, cost in costs.items()))

    def training(self, training: Training) -> None:
        """Measure the training's pipeline, its step, both together and the evaluation, in turn with a matrix product."""
        from benchmarks.measure import interleave, matrix_stage

        # many chunks as short as one step, so that bursts of other work on the machine affect both sides of a ratio alike
        stages = [training.stage(name, self.seconds) for name in ("pipeline", "step", "end_to_end")]
        self.report["device_peak_gib"] = training.device_peak_gib()  # before the matrices take GPU memory too
        matrix = matrix_stage(training.device, training.runtime.precision, self.seconds)
        training_repeats = 3 * self.repeats if training.device.type == "cpu" else self.repeats
        rates = interleave([*stages, matrix], training_repeats)
        rates |= interleave([training.stage("evaluation", self.seconds)], self.repeats)
        multiplied = rates.pop("matrix")
        self._say_rates(rates, {"pipeline": f"pipeline as training uses it ({training.backend.name})"})
        self.say(f"matrix product, {training.runtime.precision}: {multiplied.median / 1e12:,.2f} TFLOP/s")
        if self.report["device_peak_gib"] is not None:
            self.say(f"GPU memory of training and evaluation, peak: {self.report['device_peak_gib']:.2f} GiB")
        self.report["stages"] |= {name: rate.record() for name, rate in rates.items()}
        self.report["matrix_flops"] = multiplied.record()
        self.report["compile_seconds"] = training.compile_seconds
        self.report["settings"] |= {"backend": training.backend.name, "step_graph": training.runtime.step_graph}
        self.report["ratios"] |= training_ratios(
            rates, multiplied, training.training_flops, training.waited / max(training.spent, 1e-9)
        )
        self.report["verdict"] = verdict(self.report["ratios"])

    def _pipeline(self, kind: Kind, augment: Augment | None = None) -> Pipeline:
        """A pipeline of the recipe's batches, with its augmentations or with others."""
        from benchmarks.stages import Pipeline

        augment = augment or self.config.augment
        return Pipeline(self.dataset, kind, batch_size=self.config.train.batch_size, augment=augment)

    def _compare(self, rates: dict[str, Rate]) -> None:
        """Add the ratios of each of this project's pipelines to every peer, and of DALI to torch."""
        ours = _ours(self.device)
        for name, stage in ours.items():
            others = {key: key for key in rates if not key.startswith("pipeline_")} | (ours if name == "dali" else {})
            for short, other in others.items():
                if stage in rates and other in rates and stage != other:
                    self.report["ratios"][f"{name}_over_{short}"] = rates[stage].over(rates[other])

    def _leave_out(self, name: str, reason: str) -> None:
        self.report["left_out"][name] = reason
        self.say(f"left out: {name}: {reason}")

    def _say_rates(self, rates: dict[str, Rate], labels: dict[str, str] | None = None) -> None:
        for name, rate in rates.items():
            label = (labels or {}).get(name, name.replace("_", " "))
            self.say(f"{label:<44}{rate.median:>12,.0f}{rate.spread / rate.median:>10.1%}{len(rate.samples):>4}")


def _ours(device: Any) -> dict[str, str]:
    """This project's pipelines on the device: the name of each in a ratio, and its stage."""
    return {name: f"pipeline_{name}_{device.type}" for name in ("dali", "torch_eager", "torch_compiled")}


def _small_epoch(kind: Kind, split: Split, augment: Augment) -> Iterator[tuple[Tensor, Tensor]]:
    from benchmarks.peers import CHECK_FILL

    yield from kind.loader(split, batch_size=64, augment=augment, fill=CHECK_FILL, seed=1).epoch(0)


def training_ratios(
    rates: dict[str, Rate], matrix: Rate, flops_per_image: int, pipeline_share: float
) -> dict[str, float]:
    """Ratios between the stages of training. `matrix` is in floating-point operations per second."""
    pipeline, step, both = rates["pipeline"], rates["step"], rates["end_to_end"]
    slower = pipeline if pipeline.median < step.median else step
    return {
        "pipeline_over_step": pipeline.over(step),
        "end_to_end_over_step": both.over(step),
        "overlap": both.over(slower),
        "pipeline_share_of_training_thread": pipeline_share,
        "model_flop_utilisation": step.over(matrix) * flops_per_image,
    }


def verdict(ratios: dict[str, float]) -> str:
    """What limits training, in one sentence."""
    times, overlap = ratios["pipeline_over_step"], ratios["overlap"]
    delivers = f"{times:.1f}x" if times < 100 else f"{times:.0f}x"
    if overlap < 0.9:
        slower = "pipeline" if times < 1 else "step"
        return (
            f"overlap-bound: end to end reaches {overlap:.0%} of the slower stage alone (the {slower}), pipeline and network get "
            f"in each other's way; the pipeline alone delivers {delivers} what the network takes"
        )
    if times < 1:
        return f"input-bound: the pipeline delivers {times:.0%} of what the network takes"
    return (
        f"compute-bound: the pipeline delivers {delivers} what the network takes, and training does "
        f"{ratios['end_to_end_over_step']:.1%} of the step alone"
    )


def conclusions(report: dict[str, Any]) -> list[str]:
    """The ratios for a person."""
    from benchmarks.tables import ratios

    lines = [f"{name}: {figure}" for name, figure in ratios(report).items() if figure]
    return ["ratios are medians of paired ratios:", *lines, f"verdict: {report['verdict']}"]


def describe(machine: dict[str, Any]) -> str:
    gpu = f"{machine['gpu']}, " if machine.get("gpu") else ""
    return f"{gpu}{machine['cpus_usable']} cores of {machine['cpu']}"


def _load_average() -> list[float] | None:
    import os

    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def _peer_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torchvision", "kornia", "albumentations", "airbench"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
