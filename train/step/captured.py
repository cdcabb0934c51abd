"""A training step as one CUDA graph: one launch instead of some hundred."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BEFORE_CAPTURE = 3  # steps on the stream of the capture: libraries choose their kernels and allocate what they keep


class CapturedStep:
    """`run(images, labels, rate)`, captured once and then replayed.

    `run` is a training step that gives its loss and its number of correct predictions as scalars on the device; `rate` is a
    scalar there, float32. It must neither wait for the device nor depend on anything on the host that changes, and the
    parameters, buffers and states of the optimizers that it uses must keep their memory for as long as the graph is replayed.
    `images` and `labels` have the shape and type of every batch to come; the constructor trains on them. The two results lie
    where the next replay writes.
    """

    def __init__(
        self, run: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], images: Tensor, labels: Tensor
    ) -> None:
        self._images, self._labels = images.clone(), labels.clone()
        self._rate = torch.zeros((), device=images.device)
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        with torch.cuda.stream(current):  # torch stays on the stream of a capture that fails
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(BEFORE_CAPTURE):
                    run(self._images, self._labels, self._rate)
            current.wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # the pipelines of other threads may go on: what they do is not part of the step
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._results = run(self._images, self._labels, self._rate)

    def __call__(self, images: Tensor, labels: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """One step on this batch at this learning rate; the current stream does it after what it has to do by then."""
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._rate.fill_(rate)
        self._graph.replay()
        return self._results
