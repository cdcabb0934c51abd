"""The `optim:`, `schedule:`, `train:` and `run:` sections of a recipe, with one declaration for each key. Imports no torch.

`changes` says what changing a key's value changes about a run: its `result` (the default), only its `rounding`, only its
`speed` and what it reports, or `nothing`. Resuming, comparing runs and measuring over seeds use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dali_pipeline.options import key

Changes = Literal["result", "rounding", "speed", "nothing"]

# Upper bounds are far beyond what trains. They catch typing errors, and exclude numbers that torch cannot represent.
MOST_IMAGES = 1_000_000  # in a batch
MOST_EPOCHS = 100_000
HIGHEST_RATE = 1e30  # float32 ends at 3e38; high enough to watch a training diverge
MOST_STEPS = 10**9 - 1  # steps or seconds between checkpoints: nine digits
CHECKPOINT_EVERY = r"(epoch|0*[1-9][0-9]{0,8}s?)"


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    """The optimizers and the loss."""

    momentum: float = key(0.9, "momentum of SGD", at_least=0.0, below=1.0)
    nesterov: bool = key(True, "Nesterov's form of the momentum; needs momentum above 0")
    weight_decay: float = key(5e-4, "weight decay of the convolution and classifier weights", at_least=0.0, at_most=1.0)
    norm_bias_weight_decay: float = key(
        0.0, "weight decay of batch-norm parameters and biases", at_least=0.0, at_most=1.0
    )
    label_smoothing: float = key(0.0, "label smoothing of the cross-entropy", at_least=0.0, below=1.0)
    decoupled_weight_decay: bool = key(
        False, "scale weights by 1 - rate * decay in each step of SGD, instead of decaying through the momentum"
    )
    norm_bias_rate: float = key(
        1.0, "factor on the learning rate of batch norm's biases", above=0.0, at_most=1_000_000.0
    )
    lookahead_every: int = key(
        0,
        "steps between moves of Lookahead's slow weights (arXiv:1907.08610); 0 keeps none",
        at_least=0,
        at_most=MOST_STEPS,
    )
    lookahead_part: float = key(
        0.5, "part of the way to the weights that Lookahead's slow weights go", above=0.0, at_most=1.0
    )
    filters: Literal["sgd", "muon"] = key(
        "sgd", "which optimizer trains the filters of the convolutions; SGD trains the rest"
    )
    muon_lr: float = key(
        0.2, "Muon's learning rate where the schedule peaks; it follows the schedule", above=0.0, at_most=HIGHEST_RATE
    )
    muon_momentum: float = key(0.6, "Nesterov momentum of Muon", at_least=0.0, below=1.0)
    muon_rescale: bool = key(
        True, "scale each convolution's filters to the norm sqrt(out_channels) before each step of Muon"
    )
    class_weights: Literal["none", "balanced"] = key(
        "none", "weights of the classes in the training loss; balanced is n / (C * n_c), so that each counts the same"
    )


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """The learning rate, linear, per step: lr_min up to lr_max at peak_epoch, and down again until the end."""

    lr_max: float | Literal["find"] = key(
        "find", "peak learning rate, or 'find' for the range test", above=0.0, at_most=HIGHEST_RATE
    )
    lr_min: float | Literal["find"] = key(
        "find", "learning rate of the first and the last step, or 'find'", above=0.0, at_most=HIGHEST_RATE
    )
    peak_epoch: float = key(
        5.0, "epoch at whose end the rate peaks; must lie within the training", above=0.0, at_most=float(MOST_EPOCHS)
    )
    shape: Literal["onecycle", "triangle", "trapezoid"] = key(
        "onecycle",
        "how the rate falls: onecycle back to lr_min, triangle to zero, trapezoid to zero after hold_epochs at its peak",
    )
    hold_epochs: float = key(0.0, "epochs at the peak, with shape=trapezoid", at_least=0.0, at_most=float(MOST_EPOCHS))
    find_start: float = key(1e-4, "lowest rate of the range test", above=0.0, at_most=HIGHEST_RATE)
    find_end: float = key(10.0, "highest rate of the range test", above=0.0, at_most=HIGHEST_RATE)
    find_steps: int = key(100, "steps of the range test", at_least=20, at_most=10_000)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The training: how long, in which batches, on which device, in which arithmetic."""

    epochs: int = key(24, "epochs of training", at_least=1, at_most=MOST_EPOCHS)
    batch_size: int = key(512, "images in a batch, over all processes together", at_least=1, at_most=MOST_IMAGES)
    tail: Literal["drop", "endless"] = key(
        "drop", "an epoch's images beyond the last full batch: dropped, or carried over into the next epoch"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = key(
        "auto", "where to train; auto takes a GPU where there is one", changes="rounding"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = key(
        "auto",
        "arithmetic: auto is bf16 where the device computes it, else fp16 (gradients scaled) on a GPU and fp32 elsewhere",
        changes="rounding",
    )
    compile: Literal["auto", "off", "default", "reduce-overhead", "max-autotune"] = key(
        "auto",
        "torch.compile mode; auto is default where a compiler is found, on a CPU in fp32 alone, if it pays for the steps left",
        changes="rounding",
    )
    step_graph: Literal["auto", "on", "off"] = key(
        "auto",
        "a training step as one CUDA graph; auto is on for CUDA with one process, where compile has no graphs of its own",
        changes="rounding",
    )
    channels_last: Literal["auto", "on", "off"] = key(
        "auto", "memory format; auto is on for CUDA and the CPU", changes="rounding"
    )
    eval_batch_size: int = key(
        1000, "images in a batch of an evaluation", at_least=1, at_most=MOST_IMAGES, changes="speed"
    )
    ema_decay: float = key(
        0.0, "decay of the exponential moving average of the weights; 0 keeps none", at_least=0.0, below=1.0
    )
    ema_every: int = key(1, "steps between updates of the average", at_least=1, at_most=1_000_000)
    tta: bool | Literal["shift"] = key(
        False,
        "test-time augmentation after the last epoch, reported beside the plain accuracy: true is flip, shift is flip, and flip "
        "and shift (6 views)",
        changes="speed",
    )
    sync_bn: bool = key(False, "batch-norm statistics over all processes together (torchrun); else each its own")
    seed: int = key(0, "seed of the weights and of the augmentation plan", at_least=0, at_most=2**63 - 1)
    deterministic: bool = key(
        False, "the same bits on every run of one machine, at a cost in speed", changes="rounding"
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where the results go."""

    dir: str | None = key(
        None, "run folder; by default runs/NAME-OF-THE-CONFIG, numbered where that exists", changes="nothing"
    )
    checkpoint_every: str | int = key(
        "epoch",
        "how often last.pt is written: epoch, N steps (200), or N seconds (60s)",
        at_least=1,
        at_most=MOST_STEPS,
        pattern=CHECKPOINT_EVERY,
        changes="nothing",
    )
    analyse: bool = key(True, "draw the pictures and the report of `python -m analysis` at the end", changes="nothing")
    tensorboard: bool = key(
        False, "write TensorBoard event files too (pip install -e '.[tensorboard]')", changes="nothing"
    )
