"""Predicts training steps and recipes on GPUs that are not here, from the kernels that torch.compile plans, by kind of kernel.

    python benchmarks/roofline.py [--recipe onecycle fast94 ... | --plan PLAN.json] [--measured throughput.json] [--json FILE]
        [--picture FILE]

Every figure is predicted. A kernel takes its FLOPs at the rate that matrix products attain or its bytes at the bandwidth that
copies attain, whichever is longer, and the time between two kernels; the host and the pipeline take nothing. A recipe takes its
epochs and one evaluation of the test set at their end, by the views that it has; compiling, a range test and other evaluations
are left out. The same method, put to two published times, errs by what the last lines say.

Without --plan the plans are made on the spot (tests/rehearsal, Linux on x86-64 with a CUDA build of torch), about a minute each;
recipes whose steps are alike share one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of this folder, whose files could hide packages of the same name

from benchmarks.given import read_json, reading, whole  # noqa: E402
from train.screen.streams import Parser  # noqa: E402

KIND = "roofline"
REHEARSAL = ROOT / "tests" / "rehearsal"
RECIPE = "onecycle"
EPOCH_IMAGES, TEST_IMAGES = 50_000, 10_000


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Peaks of the maker's data sheet, and the parts of them that large matrix products and long copies attain."""

    name: str
    flops: float  # dense, bf16 or fp16 with float32 accumulation, per second
    bandwidth: float  # bytes per second
    matrix: float  # attained of flops
    copy: float  # attained of bandwidth
    gap: float  # seconds from the end of a kernel to the start of the next one
    source: str


# The attained parts and the gaps are assumptions of the order that large products and long copies reach (0.80 of an H200's
# peak are 790 TFLOP/s); a measurement of benchmarks/throughput.py on such a GPU is the first thing to replace them by.
GPUS = (
    Gpu(name="H100", flops=989e12, bandwidth=3.35e12, matrix=0.72, copy=0.90, gap=1.5e-6, source="H100 SXM5 data sheet"),
    Gpu(name="H200", flops=989e12, bandwidth=4.8e12, matrix=0.80, copy=0.88, gap=1.5e-6, source="H200 SXM data sheet"),
    Gpu(name="A100", flops=312e12, bandwidth=2.0e12, matrix=0.80, copy=0.88, gap=1.5e-6, source="A100 80GB SXM data sheet"),
    Gpu(name="A100-40", flops=312e12, bandwidth=1.555e12, matrix=0.80, copy=0.88, gap=1.5e-6, source="A100 40GB data sheet"),
    Gpu(name="L4", flops=121e12, bandwidth=0.3e12, matrix=0.60, copy=0.85, gap=2e-6, source="L4 data sheet, half its sparse"),
    Gpu(name="V100", flops=125e12, bandwidth=0.9e12, matrix=0.75, copy=0.85, gap=2e-6, source="V100 SXM2 data sheet"),
    Gpu(name="T4", flops=65e12, bandwidth=0.32e12, matrix=0.45, copy=0.80, gap=2e-6, source="T4 data sheet; 70 W set its clock"),
)  # fmt: skip


def matrix_fraction(what: str, channels_in: int, channels_out: int) -> float:
    """What cuDNN's implicit matrix products attain of a large one: less where a side of the product is short."""
    if channels_in == 3:
        return 0.12  # 27 terms a sum: the tensor cores mostly idle
    fraction = 0.70 if what == "weight" else 0.80
    return fraction * (0.75 if min(channels_in, channels_out) <= 64 else 1)


def kernel_times(row: dict[str, Any], gpu: Gpu) -> tuple[float, float, float]:
    """Seconds that a row of a plan takes for its FLOPs, for its bytes, and between its kernels."""
    arithmetic = 0.0
    if row["flops"]:
        arithmetic = row["flops"] / (gpu.flops * gpu.matrix * matrix_fraction(row["what"], *row["channels"]))
    return arithmetic, row["bytes"] / (gpu.bandwidth * gpu.copy), row["kernels"] * gpu.gap


def predict(plan: dict[str, Any], gpu: Gpu) -> dict[str, Any]:
    """Time of a step by group, what bounds each, and what follows from the sum."""
    groups: dict[str, dict[str, Any]] = {}
    for row in plan["rows"]:
        arithmetic, moving, between = kernel_times(row, gpu)
        group = groups.setdefault(row["group"], {"kernels": 0, "bytes": 0, "flops": 0, "seconds": 0.0, "bounds": {}})
        for key in ("kernels", "bytes", "flops"):
            group[key] += row[key]
        group["seconds"] += max(arithmetic, moving) + between
        bound = max((arithmetic, "arithmetic"), (moving, "memory"), (between, "start of kernels"))[1]
        group["bounds"][bound] = group["bounds"].get(bound, 0.0) + max(arithmetic, moving) + between
    for group in groups.values():
        group["bound"] = max(group.pop("bounds").items(), key=lambda item: item[1])[0]
    step = sum(group["seconds"] for group in groups.values())
    images_per_second = plan["batch"] / step
    return {
        "gpu": gpu.name,
        "source": gpu.source,
        "step_ms": 1e3 * step,
        # no step can be faster: all FLOPs at the rate of large products and nothing beside them
        "floor_ms": 1e3 * plan["flops_per_step"] / (gpu.flops * gpu.matrix),
        "images_per_second": images_per_second,
        "mfu_of_peak": plan["flops_per_step"] / step / gpu.flops,
        "mfu_of_matrix_rate": plan["flops_per_step"] / step / (gpu.flops * gpu.matrix),
        "epoch_seconds": EPOCH_IMAGES // plan["batch"] * step,
        "groups": dict(sorted(groups.items(), key=lambda item: -item[1]["seconds"])),
    }


def predict_recipes(plan: dict[str, Any], gpu: Gpu, epochs: int | None = None) -> dict[str, Any]:
    """What `predict` gives for the plan's step and, by name, the time of each recipe that takes this step, for its own number of
    epochs or the one given."""
    found, evaluation = predict(plan, gpu), plan["evaluation"]
    pass_ = predict(evaluation, gpu)["step_ms"] / 1e3 * -(-TEST_IMAGES // evaluation["batch"])
    recipes = {}
    for name, recipe in plan["recipes"].items():
        count = epochs or recipe["epochs"]
        training, evaluating = count * found["epoch_seconds"], recipe["views"] * pass_
        recipes[name] = {"epochs": count, "views": recipe["views"], "training_seconds": training}
        recipes[name] |= {"evaluation_seconds": evaluating, "seconds": training + evaluating}
    return found | {"recipes": recipes}


@dataclass(frozen=True)
class Published:
    """A network of 3x3 convolutions, (channels in, channels out, height and width) a layer, and how long others trained it."""

    name: str
    gpu: str
    layers: tuple[tuple[int, int, int], ...]
    batch: int
    epochs: float
    seconds: float


PUBLISHED = (
    Published(
        "cifar10-fast, this network, 24 epochs",
        "V100",
        (
            (3, 64, 32), (64, 128, 32), (128, 128, 16), (128, 128, 16), (128, 256, 16), (256, 512, 8), (512, 512, 4),
            (512, 512, 4),
        ),
        512, 24, 64.0,
    ),
    Published(
        "airbench94, compiled",
        "A100",
        ((3, 24, 31), (24, 64, 31), (64, 64, 15), (64, 256, 15), (256, 256, 7), (256, 256, 7), (256, 256, 3)),
        1024, 9.9, 3.09,
    ),
)  # fmt: skip


def passes_per_output(plan: dict[str, Any]) -> float:
    """Bytes of all kernels but convolutions and optimizer, for a byte that a convolution puts out forward."""
    others = sum(row["bytes"] for row in plan["rows"] if row["group"] not in ("convolutions", "optimizer"))
    forward = [row for row in plan["rows"] if row["group"] == "convolutions" and row["what"] == "forward"]
    return float(others / sum(row["outputs"] for row in forward))


def published_plan(case: Published, passes: float) -> dict[str, Any]:
    """The plan of another network: its convolutions, and beside them as many passes over their outputs as ours needs."""
    rows: list[dict[str, Any]] = []
    for inputs, channels, side in case.layers:
        for what in ("forward", "data", "weight"):
            if inputs == 3 and what == "data":
                continue
            elements = case.batch * side * side * (inputs + channels) + 9 * inputs * channels
            flops = 18 * case.batch * side * side * inputs * channels
            rows.append({"group": "convolutions", "what": what, "channels": [inputs, channels], "kernels": 1}
                        | {"bytes": 2 * elements, "flops": flops})  # fmt: skip
    moved = int(passes * sum(2 * case.batch * channels * side * side for _, channels, side in case.layers))  # 16 bits
    rows.append({"group": "the others", "kernels": 12 * len(case.layers), "bytes": moved, "flops": 0})
    return {"batch": case.batch, "rows": rows, "flops_per_step": sum(row["flops"] for row in rows)}


def check_against_published(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """What the method gives for times that others measured, and its error."""
    by_name = {gpu.name: gpu for gpu in GPUS}
    result = []
    for case in PUBLISHED:
        prediction = predict(published_plan(case, passes_per_output(plan)), by_name[case.gpu])
        seconds = case.epochs * EPOCH_IMAGES / prediction["images_per_second"]
        result.append(
            {
                "case": case.name,
                "gpu": case.gpu,
                "predicted_seconds": seconds,
                "published_seconds": case.seconds,
                "error": seconds / case.seconds - 1,
            }
        )
    return result


def plans_on_the_spot(recipes: Sequence[str]) -> list[dict[str, Any]]:
    """Run the rehearsal's planner. Raises RuntimeError with the reason where it cannot run."""
    script = REHEARSAL / "standin.py"
    if not script.exists():
        raise RuntimeError(f"{script} is missing: give plans with --plan, or start this from a checkout")
    words = [sys.executable, script, REHEARSAL / "plan.py", "--recipe", *recipes]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise RuntimeError(f"no plan could be made here ({lines[-1]}); give one with --plan")
    plans: list[dict[str, Any]] = json.loads(done.stdout)
    return plans


def read_plans(path: Path) -> list[dict[str, Any]]:
    """Plans as tests/rehearsal/plan.py prints them: a list, of which the first one of each recipe is taken."""
    found = read_json(path)
    plans, known = [], set[str]()
    needed = {"width", "batch", "rows", "flops_per_step", "evaluation", "recipes"}
    for plan in found if isinstance(found, list) and found else [found]:
        missing = needed - (plan.keys() if isinstance(plan, dict) else set())
        if missing:
            raise RuntimeError(f"{path}: no plan of kernels, it lacks {', '.join(sorted(missing))}")
        if not known & plan["recipes"].keys():
            plans.append(plan)
        known |= plan["recipes"].keys()
    return plans


def measured_steps(path: Path) -> tuple[str, float]:
    """(name of the GPU, images/s of the training step alone) of a report of benchmarks/throughput.py."""
    report = read_json(path)
    with reading(path, "a report of benchmarks/throughput.py"):
        return report["machine"].get("gpu") or report["machine"]["cpu"], float(report["stages"]["step"]["median"])


def gpu_of(device: str) -> str | None:
    """The GPU of the table that torch calls `device`; None for one that is not in it, as cards for PCI Express are not."""
    words = set(device.replace("-", " ").split())
    if {"PCIe", "PCIE", "NVL"} & words:
        return None
    if {"A100", "40GB"} <= words:
        return "A100-40"
    return next((gpu.name for gpu in GPUS if gpu.name in words), None)


def lines_of(report: dict[str, Any]) -> list[str]:
    """The report in words."""
    lines: list[str] = []
    for plan in report["plans"]:
        predictions = [p for p in report["predictions"] if p["recipes"].keys() == plan["recipes"].keys()]
        lines += [*lines_of_plan(plan, predictions), ""]
    for found in report["measured"]:
        lines.append(
            f"measured on {found['gpu']}: {found['images_per_second']:,.0f} images/s"
            + (f", {found['ratio']:.2f} of the prediction" if found["ratio"] else ", a device that is not in the table")
        )
    lines.append("the method against published times:")
    for case in report["published"]:
        lines.append(
            f"  {case['case']}, {case['gpu']}: predicted {case['predicted_seconds']:.2f} s, published "
            f"{case['published_seconds']:g} s, error {case['error']:+.0%}"
        )
    return lines


def lines_of_plan(plan: dict[str, Any], predictions: list[dict[str, Any]]) -> list[str]:
    """A step and its recipes in words; `predictions` are those of its plan, one a GPU."""
    first = predictions[0]
    lines = [
        f"predicted for {', '.join(first['recipes'])}: width {plan['width']}, batch {plan['batch']}, {plan['dtype']}, torch "
        f"{plan['torch']}, {plan['kernels_per_step']} kernels, {plan['bytes_per_step'] / 1e9:.2f} GB and "
        f"{plan['flops_per_step'] / 1e12:.3f} TFLOP a step",
        f"time by kind of kernel, predicted for {first['gpu']}:",
    ]
    for name, group in first["groups"].items():
        share = group["seconds"] / first["step_ms"] * 1e3
        lines.append(
            f"  {name:<37}{group['kernels']:>4} kernels{group['bytes'] / 1e6:>8,.0f} MB{group['seconds'] * 1e6:>8,.0f} us"
            f"{share:>7.1%}  bound by {group['bound']}"
        )
    lines.append(
        f"{'predicted':<9}{'step':>10}{'floor':>10}{'images/s':>11}{'MFU, peak':>11}{'matrix':>8}{'epoch':>9}"
        + "".join(f"{name:>13}" for name in first["recipes"])
    )
    for p in predictions:
        lines.append(
            f"{p['gpu']:<9}{p['step_ms']:>7.2f} ms{p['floor_ms']:>7.2f} ms{p['images_per_second']:>11,.0f}"
            f"{p['mfu_of_peak']:>11.1%}{p['mfu_of_matrix_rate']:>8.1%}{p['epoch_seconds']:>7.2f} s"
            + "".join(f"{recipe['seconds']:>11.1f} s" for recipe in p["recipes"].values())
        )
    of = [
        f"{name}: {recipe['epochs']} epochs, and an evaluation by {recipe['views']} view{'s' * (recipe['views'] > 1)}"
        for name, recipe in first["recipes"].items()
    ]
    return [*lines, f"  ({'; '.join(of)})"]


def table(report: dict[str, Any]) -> list[str]:
    """A Markdown table of the predicted times, a row for each recipe and a column for each GPU; below it how they are made."""
    names = list(dict.fromkeys(p["gpu"] for p in report["predictions"]))
    rows = [
        f"| seconds, predicted, not measured | epochs | views | {' | '.join(names)} |",
        "|---|---:|---:|" + "---:|" * len(names),
    ]
    for plan in report["plans"]:
        for recipe in plan["recipes"]:
            found = {p["gpu"]: p["recipes"][recipe] for p in report["predictions"] if recipe in p["recipes"]}
            seconds = " | ".join(f"{found[name]['seconds']:.1f}" for name in names)
            first = found[names[0]]
            rows.append(f"| `{recipe}` | {first['epochs']} | {first['views']} | {seconds} |")
    errors = " and ".join(f"{case['error']:+.0%} for {case['case']} ({case['gpu']})" for case in report["published"])
    plan = report["plans"][0]
    return [
        *rows,
        "",
        f"Predicted, not measured: from the kernels that torch {plan['torch']} plans for {plan['dtype']}, by rates and "
        "bandwidths of data sheets and an assumed part of them; the epochs, and one evaluation at their end by so many views of "
        "each image, without compiling, a range test and other evaluations, and as if the host and the pipeline took no time. "
        f"Against published times the method errs by {errors}. `{report['command']}`",
    ]


def draw(report: dict[str, Any], path: Path) -> None:
    """Shares of the step by kind of kernel, a bar a GPU."""
    from analysis.plotting import drawn

    drawn(_draw)(report, path)


def _draw(report: dict[str, Any], path: Path) -> None:
    from analysis.style import new_figure, save

    plans, gpus = report["plans"], len({p["gpu"] for p in report["predictions"]})
    first = plans[0]
    caption = f"width {first['width']}, batch {first['batch']}, {first['dtype']}, planned by torch {first['torch']}; not measured"
    height = (0.5 * gpus + 1.6) * len(plans) + 0.8
    figure = new_figure(9, height, "A training step on GPUs, predicted from its kernels", caption)
    colours = {name: f"C{number}" for number, name in enumerate(report["predictions"][0]["groups"])}
    for axes, plan in zip(figure.subplots(len(plans), squeeze=False)[:, 0], plans, strict=True):
        predictions = [p for p in report["predictions"] if p["recipes"].keys() == plan["recipes"].keys()][::-1]
        left = [0.0] * len(predictions)
        for name in predictions[-1]["groups"]:
            shares = [100 * p["groups"][name]["seconds"] / p["step_ms"] * 1e3 for p in predictions]
            axes.barh([p["gpu"] for p in predictions], shares, left=left, label=name, color=colours[name])
            left = [a + b for a, b in zip(left, shares, strict=True)]
        for place, p in enumerate(predictions):
            axes.text(101, place, f"{p['step_ms']:.2f} ms, {p['images_per_second'] / 1e3:,.0f}k images/s", va="center")
        label = f"share of a training step of {', '.join(plan['recipes'])} in percent, predicted"
        axes.set(xlim=(0, 135), xticks=range(0, 101, 20), xlabel=label)
        axes.legend(ncols=3, fontsize="small", loc="lower center", bbox_to_anchor=(0.45, 1))
    save(figure, path)


def make_report(plans: list[dict[str, Any]], epochs: int | None, measured: Path | None) -> dict[str, Any]:
    """The predictions for all plans on all GPUs. The first plan is the one that a measurement is compared with, and that the
    check against published times begins with."""
    predictions = [predict_recipes(plan, gpu, epochs) for plan in plans for gpu in GPUS]
    beside = []
    if measured is not None:
        gpu, rate = measured_steps(measured)
        names = [p for p in predictions if p["gpu"] == gpu_of(gpu)]
        beside = [
            {"gpu": gpu, "images_per_second": rate, "ratio": rate / names[0]["images_per_second"] if names else None}
        ]
    described = [
        {key: plan.get(key) for key in ("recipes", "width", "batch", "dtype", "pooling", "torch", "gpu")}
        | {f"{key}_per_step": sum(row[key] for row in plan["rows"]) for key in ("kernels", "bytes", "flops")}
        for plan in plans
    ]
    return {
        "kind": KIND,
        "figures": "predicted",
        **{key: described[0][key] for key in ("kernels_per_step", "bytes_per_step", "flops_per_step")},
        "plans": described,
        "predictions": predictions,
        "published": check_against_published(plans[0]),
        "measured": beside,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--recipe", nargs="+", metavar="NAME", help=f"recipes for CIFAR to plan and predict ({RECIPE})")
    which.add_argument("--plan", type=Path, help="plans of kernels; made on the spot if not given")
    parser.add_argument("--measured", type=Path, help="throughput.json of a GPU, to stand beside the predictions")
    parser.add_argument("--epochs", type=whole(), help="of each recipe, instead of its own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the shares of a step")
    options = parser.parse_args(arguments)
    from benchmarks.outcome import explained, write_report  # torch from here on: --help answers without it
    from dali_pipeline.errors import UserError
    from train.config import find_recipe

    with explained() as outcome:
        recipes = options.recipe or [RECIPE]
        for name in recipes:
            find_recipe(name)
        try:
            plans = read_plans(options.plan) if options.plan else plans_on_the_spot(recipes)
            report = make_report(plans, options.epochs, options.measured)
        except (RuntimeError, OSError, KeyError, json.JSONDecodeError) as error:
            raise UserError(str(error)) from error
        print("\n".join(lines_of(report)))
        if options.json:
            from benchmarks.machine import command

            write_report(
                options.json, report | {"command": command(KIND, sys.argv[1:] if arguments is None else arguments)}
            )
        if options.picture:
            draw(report, options.picture)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
