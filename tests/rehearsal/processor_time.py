"""The processor time of a compiled training step on the CPU, with and without what the plan of kernels gains from.

    OMP_NUM_THREADS=1 python tests/rehearsal/processor_time.py [--width 16] [--batch 512] [--rounds 15]

All steps, forward and backward in fp32, are compiled in one process and take turns. It prints the medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

import net as networks
from benchmarks.measure import interleave
from net.activation import ReLU
from net.options import NetOptions
from train.step import steps

INDUCTORS_READS = 4


class Step:
    """A training step; a stage of `interleave`, whose rate is in steps a second of processor time."""

    def __init__(self, relu: str, reads: int, width: int, batch: int) -> None:
        self.name = f"ReLU of {relu}, {reads} reads"
        net = networks.build(NetOptions(width=width), 10).to(memory_format=torch.channels_last)
        if relu == "torch":
            for layer in net.modules():
                for name, part in layer.named_children():
                    if isinstance(part, ReLU):
                        setattr(layer, name, nn.ReLU())
        self._step = steps.TrainStep(net, (128.0,) * 3, (64.0,) * 3)
        steps.READS_BEFORE_WRITING = reads
        steps.compile_in_place(self._step, "default")
        self._images = torch.randint(0, 256, (batch, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        self._labels = torch.randint(0, 10, (batch,))

    def warm_up(self) -> None:
        for _ in range(3):
            self.sample()

    def sample(self) -> float:
        self._step.zero_grad()
        begun = time.process_time()
        self._step(self._images, self._labels)[0].backward()
        return 1 / (time.process_time() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    ours, theirs = steps.READS_BEFORE_WRITING, INDUCTORS_READS
    made = [
        Step(relu, reads, options.width, options.batch)
        for relu, reads in (("torch", theirs), ("ours", theirs), ("torch", ours), ("ours", ours))
    ]
    rates = interleave(made, options.rounds)
    for step in made:
        rate = rates[step.name]
        taken = [1 / sample for sample in rate.samples]
        print(
            f"{step.name:<22} {1000 * statistics.median(taken):6.0f} ms of processors a step ({1000 * min(taken):.0f} to "
            f"{1000 * max(taken):.0f}), {rates[made[0].name].over(rate):.3f} of the first"
        )


if __name__ == "__main__":
    main()
