"""Restores the state of a training after a block that changes it."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from train.step.optim import Optimizers


@contextmanager
def borrowed_state(
    module: nn.Module, optimizer: Optimizers | torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
) -> Iterator[None]:
    """Restores weights, buffers, gradients, train mode, optimizer, scaler and random generators at the end of the block, bit for
    bit, also after an error.

    Tensors are restored in place, so that a compiled or captured graph that uses them stays valid.
    """
    saved = {name: tensor.detach().clone() for name, tensor in module.state_dict(keep_vars=True).items()}
    modes = [(part, part.training) for part in module.modules()]
    gradients = [None if p.grad is None else p.grad.detach().clone() for p in module.parameters()]
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    scaler_state = copy.deepcopy(scaler.state_dict()) if scaler is not None else None
    generators = (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002
    cuda_generators = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in module.state_dict(keep_vars=True).items():
                tensor.copy_(saved[name])
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            parameter.grad = gradient
        for part, mode in modes:
            part.training = mode
        optimizer.load_state_dict(optimizer_state)
        if scaler is not None and scaler_state:
            scaler.load_state_dict(scaler_state)
            # what it notes within a step, which an error has cut off; its state has no key for that
            scaler._per_optimizer_states.clear()
        random.setstate(generators[0])
        np.random.set_state(generators[1])  # noqa: NPY002
        torch.set_rng_state(generators[2])
        if cuda_generators is not None:
            torch.cuda.set_rng_state_all(cuda_generators)
