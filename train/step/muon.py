"""Muon: momentum whose step is the nearest matrix with orthonormal rows or columns, for the filters of convolutions.

https://kellerjordan.github.io/posts/muon, and airbench94_muon of https://github.com/KellerJordan/cifar10-airbench.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# a quintic whose iteration lifts small singular values fast, and leaves all of them within about 0.3 of 1
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalised(matrices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Matrices (k, m, n) with their singular values brought close to 1, in `dtype`, without a decomposition (Newton-Schulz).

    The singular values of each matrix are divided by its Frobenius norm and put ITERATIONS times through the polynomial
    a s + b s^3 + c s^5; the singular vectors stay. A matrix of zeros gives zeros.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-30)).to(dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Steps of `lr` along the orthogonalised Nesterov momentum of each filter (out, in, h, w), as a matrix (out, in * h * w).

    Filters of one shape are orthogonalised together, in bf16. With `rescale` a filter is scaled to the norm sqrt(out) before each
    step, so that `lr` is the length of the step relative to the filter. There is no weight decay. A step whose gradients have
    overflowed in fp16 changes nothing, and no step waits for the device.
    """

    # GradScaler sets `grad_scale` and `found_inf` before a step, as for SGD's fused kernel
    _step_supports_amp_scaling = True

    def __init__(self, groups: list[dict[str, Any]], momentum: float, rescale: bool) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "rescale": rescale})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all filters that have a gradient."""
        assert closure is None, "Muon evaluates no closure"
        for group in self.param_groups:
            self._step(group, [p for p in group["params"] if p.grad is not None])

    def _step(self, group: dict[str, Any], filters: list[Tensor]) -> None:
        if not filters:
            return
        gradients = [p.grad for p in filters if p.grad is not None]
        momenta = [self._momentum(p) for p in filters]
        scale, overflowed = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        before = [] if overflowed is None else [tensor.clone() for tensor in (*filters, *momenta)]
        if scale is not None:
            gradients = [gradient / scale for gradient in gradients]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        directions = torch._foreach_mul(momenta, group["momentum"])
        torch._foreach_add_(directions, gradients)
        if group["rescale"]:
            norms = torch._foreach_norm(filters)
            torch._foreach_clamp_min_(norms, 1e-30)  # a filter of zeros stays one until the step
            factors = torch._foreach_reciprocal(norms)
            torch._foreach_mul_(factors, [len(p) ** 0.5 for p in filters])
            torch._foreach_mul_(filters, factors)
        rate = group["lr"]
        if not isinstance(rate, Tensor):  # as a captured step has it, which reads it on the device
            rate = torch.full((), rate, device=filters[0].device)
        of_shape: dict[tuple[int, int], list[int]] = {}
        for i, p in enumerate(filters):
            of_shape.setdefault((len(p), p.numel() // len(p)), []).append(i)
        for places in of_shape.values():
            steps = orthogonalised(torch.stack([directions[i].flatten(1) for i in places]))
            for i, step in zip(places, steps, strict=True):
                filters[i].addcmul_(step.reshape(filters[i].shape), rate, value=-1)
        if overflowed is not None:
            for tensor, old in zip((*filters, *momenta), before, strict=True):
                tensor.copy_(torch.where(overflowed.bool(), old, tensor))

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum_buffer"]
        return momentum
