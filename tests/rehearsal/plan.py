"""The kernels that torch.compile plans for a training step on the stand-in, with bytes and FLOPs, as JSON on standard output.

    python tests/rehearsal/standin.py tests/rehearsal/plan.py [--width 64] [--batch 512] [--pooling ours|torch]
        [--relu ours|torch] [--reads 8] [--combo-kernels]

The project's own step passes through dynamo, AOTAutograd, the partitioner and inductor's fusion for the GPU named; a hook
where inductor writes its code notes every kernel. Triton is not called. Bytes are those of the arrays that a kernel reads
and writes, each once; a convolution counts as the kernels that cuDNN starts for it.
"""

from __future__ import annotations

import argparse
import json
from math import prod
from typing import Any

import inside
import torch
from torch import nn
from torch._inductor import config as inductor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode, Scheduler
from torch._inductor.virtualized import V

import net as networks
from net.activation import ReLU
from net.options import NetOptions
from net.pooling import MaxPool
from train.step import steps

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
        whats = ["weight"] if images[1] == 3 else ["data", "weight"]  # nobody asks for the gradient of the photographs
    else:
        (images, weight), whats = shapes[:2], ["forward"]
        gradient = [images[0], weight[0], *images[2:]]
    moved = element * (prod(images) + prod(gradient) + prod(weight))
    flops = 2 * prod(gradient) * prod(weight[1:])
    shape = f"{weight[1]} to {weight[0]} at {images[2]} x {images[3]}"
    return [
        {"group": "convolutions", "name": f"{what}, {shape}", "what": what, "channels": [weight[1], weight[0]]}
        | {"kernels": 1, "bytes": moved, "flops": flops}
        for what in whats
    ]


def group_of(backward: bool, origins: set[str], moved: int) -> str:
    """What a generated kernel is for, by the operations that it was made of."""

    def any_of(*stems: str) -> bool:
        return any(name.startswith(stem) for name in origins for stem in stems)

    if all(name.startswith("convert_element_type") for name in origins):
        return "casts of weights and gradients"
    if moved < 5e4:
        return "tiny kernels"
    if backward:
        pools = any_of("iota", "clone") or any("max_pool" in name or "scatter" in name for name in origins)
        return "pooling, backward" if pools else "batch norm and ReLU, backward"
    if any_of("isnan") or any("max_pool" in name for name in origins):
        return "pooling, forward"
    if any_of("rsqrt", "var_mean", "relu"):
        return "batch norm and ReLU, forward"
    return "normalisation of the images"


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


def make_plan(width: int, batch: int, pooling: str, dtype: torch.dtype) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    written = Scheduler.codegen

    def noted(self: Scheduler) -> Any:
        rows.extend(rows_of(self))
        return written(self)

    AsyncCompile.triton = lambda self, name, source, device_str="cuda": Uncompiled(name, source)
    Scheduler.codegen, MaxPool.forward, Uncompiled.atomics = noted, KINDS[pooling], 0
    torch._dynamo.reset()
    device = torch.device("cuda")
    try:
        net = networks.build(NetOptions(width=width), 10).to(device, memory_format=torch.channels_last)
        step = steps.TrainStep(net, (0.5,) * 3, (0.25,) * 3, autocast_dtype=dtype).to(device)
        steps.compile_in_place(step, "default")
        images = torch.zeros(batch, 32, 32, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
        labels = torch.zeros(batch, dtype=torch.int64, device=device)
        step(images, labels)[0].backward()
    finally:
        Scheduler.codegen, MaxPool.forward = written, KINDS["ours"]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    optimizer.step()
    with inside.counted() as update:
        optimizer.step()
    parameters = sum(parameter.numel() for parameter in net.parameters())
    # weight, gradient and momentum in float32 are read, weight and momentum written
    rows.append(
        {"group": "optimizer", "name": "SGD", "kernels": update["launches"], "bytes": 20 * parameters, "flops": 0}
    )
    rows.append({"group": "tiny kernels", "name": "the meter", "kernels": 2, "bytes": 32, "flops": 0})
    return {
        "width": width,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "pooling": pooling,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "atomics": Uncompiled.atomics,
        "kernels_per_step": sum(row["kernels"] for row in rows),
        "bytes_per_step": sum(row["bytes"] for row in rows),
        "flops_per_step": sum(row["flops"] for row in rows),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=512)
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
    dtype = getattr(torch, options.dtype)
    print(json.dumps([make_plan(options.width, options.batch, pooling, dtype) for pooling in options.pooling]))


if __name__ == "__main__":
    main()
