"""The kernels that torch.compile plans for a training step on the stand-in, with bytes and FLOPs, as JSON on standard output.

    python tests/rehearsal/standin.py tests/rehearsal/plan.py [--width 64] [--batch 512] [--pooling ours|torch]
        [--relu ours|torch] [--reads 8] [--combo-kernels] [--recipe onecycle fast94 ...]

The step of a recipe, with its network and optimizers, passes through dynamo, AOTAutograd, the partitioner and inductor's fusion
for the GPU named; a hook where inductor writes its code notes every kernel. Triton is not called. Bytes are those of the arrays
that a kernel reads and writes, each once; a convolution counts as the kernels that cuDNN starts for it. The optimizers are not
compiled: theirs are the kernels that torch starts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import inside
import torch
from torch import nn
from torch._inductor import config as inductor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode, Scheduler
from torch._inductor.virtualized import V
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import net as networks
from dali_pipeline.sources.cifar import CIFARS
from net.activation import ReLU
from net.options import NetOptions
from net.pooling import MaxPool
from train.config import Config, find_recipe, load_config
from train.options import OptimOptions
from train.step import steps
from train.step.measures import measures_of
from train.step.optim import Optimizers, parameter_groups
from train.step.schedule import Rates
from train.step.views import VIEWS

KINDS = {"ours": MaxPool.forward, "torch": nn.MaxPool2d.forward}
RELUS = {"ours": ReLU.forward, "torch": nn.ReLU.forward}


class Uncompiled:
    """In the place of a Triton kernel."""

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        Uncompiled.atomics += source.count("tl.atomic_")

    atomics = 0

    def run(self, *arguments: Any, **settings: Any) -> None:
        inside._launch(self.name)


def convolutions(operator: str, node: Any, element: int) -> list[dict[str, Any]]:
    """The kernels of a convolution: forward, or the gradients of images and weight."""
    shapes = [[int(side) for side in array.get_size()] for array in node.inputs[:3]]
    if "backward" in operator:
        gradient, images, weight = shapes
        # the arguments that are no tensors, one after the other: last, which gradients are asked for, of images, weight and bias
        whats = [what for what, asked in zip(("data", "weight"), node.constant_args[-3:-1], strict=True) if asked]
    else:
        (images, weight), whats = shapes[:2], ["forward"]
        gradient = [images[0], weight[0], *images[2:]]
    moved = element * (prod(images) + prod(gradient) + prod(weight))
    flops = 2 * prod(gradient) * prod(weight[1:])
    shape = f"{weight[1]} to {weight[0]} at {images[2]} x {images[3]}"
    return [
        {"group": "convolutions", "name": f"{what}, {shape}", "what": what, "channels": [weight[1], weight[0]]}
        | {"kernels": 1, "bytes": moved, "flops": flops, "outputs": element * prod(gradient)}
        for what in whats
    ]


def group_of(backward: bool, origins: set[str], moved: int) -> str:
    """What a generated kernel is for, by the operations that it was made of."""

    def any_of(*stems: str) -> bool:
        return any(name.startswith(stem) for name in origins for stem in stems)

    if all(name.startswith("convert_element_type") for name in origins):
        return "casts of weights and gradients"
    if moved < 3e5:  # at 3 TB/s a tenth of a microsecond, less than lies between two kernels
        return "tiny kernels"
    if backward:
        pools = any_of("iota", "clone") or any("max_pool" in name or "scatter" in name for name in origins)
        return "pooling, backward" if pools else "batch norm and activation, backward"
    if any_of("isnan") or any("max_pool" in name for name in origins):
        return "pooling, forward"
    if any_of("rsqrt", "var_mean", "relu", "erf", "exp", "sigmoid"):
        return "batch norm and activation, forward"
    return "normalisation of the images" if any_of("sub") else "classifier"


def rows_of(scheduler: Scheduler) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for node in scheduler.nodes:
        if isinstance(node, NopKernelSchedulerNode):
            continue
        moved = int(node.get_read_write_buffers_sizes())
        parts = [part.node for part in node.get_nodes() if part.node is not None]
        if not isinstance(node, ExternKernelSchedulerNode):
            origins = {origin.name for part in parts for origin in part.get_origins()}
            name = ", ".join(sorted(origins))[:100]
            group = group_of(V.graph.is_backward, origins, moved)
            rows.append({"group": group, "name": name, "kernels": 1, "bytes": moved, "flops": 0})
            continue
        operator = str(getattr(node.node, "python_kernel_name", None))
        if "convolution" in operator:
            rows += convolutions(operator, node.node, node.node.inputs[0].get_dtype().itemsize)
        elif type(node.node).__name__ != "MultiOutput":  # one of several results, no kernel
            rows.append({"group": "classifier", "name": operator, "kernels": 1, "bytes": moved, "flops": 0})
    return rows


class Moved(TorchDispatchMode):
    """Counts the bytes of the arrays that operations read and write, each once an operation: of `products` of matrices, with
    their FLOPs, and of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.products = {"kernels": 0, "bytes": 0, "flops": 0}
        self.other_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        arrays = tree_leaves([args, kwargs, self._written(func, args, kwargs, out)])
        moved = sum(array.nbytes for array in arrays if isinstance(array, torch.Tensor))
        count = flop_registry.get(func.overloadpacket)
        if count is None:
            self.other_bytes += moved
        else:
            self.products["kernels"] += 1
            self.products["bytes"] += moved
            self.products["flops"] += count(*args, **kwargs, out_val=out)
        return out

    def _written(self, func: Any, args: Any, kwargs: Any, out: Any) -> list[Any]:
        """What the operation writes: its arguments that it changes, or else its result."""
        declared = func._schema.arguments
        given = dict(zip((argument.name for argument in declared), args, strict=False)) | kwargs
        changed = {a.name for a in declared if a.alias_info is not None and a.alias_info.is_write} & given.keys()
        if given.get("grad_scale") is None:
            changed.discard("grads")  # SGD's fused kernel changes the gradients only where it divides them by a scale
        return [given[name] for name in changed] or [out]


def updates(net: networks.Network, optim: OptimOptions, lr_max: float | None) -> list[dict[str, Any]]:
    """The kernels with which the optimizers update the network's parameters; all must have gradients."""
    if optim.lookahead_every:
        raise SystemExit("optim.lookahead_every: a plan does not count Lookahead, which does not act in every step")
    rows: list[dict[str, Any]] = []
    device = torch.device("cuda")
    for kind, optimizer in Optimizers(parameter_groups(net, optim, lr_max), optim, device).by_kind.items():
        optimizer.step()
        with inside.counted() as update, Moved() as moved:
            optimizer.step()
        others = update["launches"] - moved.products["kernels"]  # the stand-in counts products among what is launched
        row: dict[str, Any] = {"group": "optimizer", "name": kind, "flops": 0}
        rows.append(row | {"kernels": others, "bytes": moved.other_bytes})
        if moved.products["kernels"]:
            like = {"what": "forward", "channels": [512, 512]}  # large matrices, as those of forward convolutions
            rows.append(row | moved.products | like | {"name": f"{kind}, products of matrices"})
    return rows


@contextmanager
def planning(pooling: str) -> Iterator[list[dict[str, Any]]]:
    """Rows of all kernels that inductor plans in the block."""
    rows: list[dict[str, Any]] = []
    written = Scheduler.codegen

    def noted(self: Scheduler) -> Any:
        rows.extend(rows_of(self))
        return written(self)

    AsyncCompile.triton = lambda self, name, source, device_str="cuda": Uncompiled(name, source)
    Scheduler.codegen, MaxPool.forward = noted, KINDS[pooling]
    torch._dynamo.reset()
    try:
        yield rows
    finally:
        Scheduler.codegen, MaxPool.forward = written, KINDS["ours"]


@dataclass(frozen=True)
class Step:
    """What a training step and an evaluation compute, whatever is trained by it and for how long."""

    net: NetOptions
    optim: OptimOptions
    lr_max: float | None
    classes: int
    batch: int
    eval_batch: int


def step_of(config: Config, batch: int | None) -> Step:
    if config.train.ema_decay:
        raise SystemExit("train.ema_decay: a plan does not count the average of the weights")
    if config.data.name not in CIFARS:
        raise SystemExit(f"data.name={config.data.name}: a plan is of a recipe for one of {', '.join(CIFARS)}")
    rates = Rates.given(config.schedule)
    return Step(
        config.net,
        config.optim,
        None if rates is None else rates.lr_max,
        len(CIFARS[config.data.name].class_names),
        batch or config.train.batch_size,
        config.train.eval_batch_size,
    )


def sums(rows: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("kernels", "bytes", "flops")
    return {f"{key}_per_step": sum(row[key] for row in rows) for key in keys} | {"rows": rows}


def photographs(batch: int) -> torch.Tensor:
    return torch.zeros(batch, 32, 32, 3, dtype=torch.uint8, device="cuda").permute(0, 3, 1, 2)


def make_plan(step: Step, pooling: str, dtype: torch.dtype) -> dict[str, Any]:
    """The kernels of a training step and, as "evaluation", of a batch of an evaluation by one view."""
    device = torch.device("cuda")
    Uncompiled.atomics = 0
    net = networks.build(step.net, step.classes).to(device, memory_format=torch.channels_last)
    pixels: Any = ((0.5,) * 3, (0.25,) * 3)
    with planning(pooling) as rows:
        train = steps.TrainStep(
            net,
            *pixels,
            label_smoothing=step.optim.label_smoothing,
            class_weights=[1.0] * step.classes if step.optim.class_weights == "balanced" else None,
            autocast_dtype=dtype,
        ).to(device)
        steps.compile_in_place(train, "default")
        train(photographs(step.batch), torch.zeros(step.batch, dtype=torch.int64, device=device))[0].backward()
    rows += updates(net, step.optim, step.lr_max)
    rows.append({"group": "tiny kernels", "name": "the meter", "kernels": 2, "bytes": 32, "flops": 0})
    with planning(pooling) as eval_rows, torch.no_grad():
        evaluation = steps.EvalStep(net.eval(), *pixels, autocast_dtype=dtype).to(device)
        steps.compile_in_place(evaluation, "default")
        evaluation(photographs(step.eval_batch))
    return {
        "width": step.net.width,
        "batch": step.batch,
        "dtype": str(dtype).removeprefix("torch."),
        "pooling": pooling,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "atomics": Uncompiled.atomics,
        **sums(rows),
        "evaluation": {"batch": step.eval_batch, **sums(eval_rows)},
    }


def views_of(config: Config) -> int:
    """How often an evaluation looks at each image."""
    return len({(view.mirror, view.shift) for measure in measures_of(config.train) for view in VIEWS[measure.views]})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--recipe", nargs="+", default=["onecycle"], help="whose steps (onecycle); one plan for equal ones"
    )
    parser.add_argument("--width", type=int, help="instead of the recipe's")
    parser.add_argument("--batch", type=int, help="instead of the recipe's")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--pooling", choices=KINDS, nargs="+", default=["ours"], help="a plan for each")
    parser.add_argument("--relu", choices=RELUS, default="ours")
    parser.add_argument(
        "--reads", type=int, default=steps.READS_BEFORE_WRITING, help="of a result before it is written"
    )
    parser.add_argument("--combo-kernels", action="store_true", help="inductor's, independent kernels in one")
    options = parser.parse_args()
    inductor.force_disable_caches = True  # a graph from the cache is not scheduled anew
    inductor.combo_kernels = options.combo_kernels
    ReLU.forward, steps.READS_BEFORE_WRITING = RELUS[options.relu], options.reads  # type: ignore[method-assign]
    recipes: dict[Step, dict[str, dict[str, int]]] = {}
    for name in options.recipe:
        config = load_config(find_recipe(name), [] if options.width is None else [f"net.width={options.width}"])
        of_step = recipes.setdefault(step_of(config, options.batch), {})
        of_step[name] = {"epochs": config.train.epochs, "views": views_of(config)}
    dtype = getattr(torch, options.dtype)
    plans = [
        {"recipes": of_step} | make_plan(step, pooling, dtype)
        for step, of_step in recipes.items()
        for pooling in options.pooling
    ]
    print(json.dumps(plans).replace('{"group"', '\n {"group"'))  # a line a kernel


if __name__ == "__main__":
    main()
