"""The options beyond the assignment's recipe, as overrides by name, and all that go together at once."""

from __future__ import annotations

from typing import Any

OPTIONS: dict[str, dict[str, Any]] = {
    "alternating flip": {"augment.flip": True, "augment.flip_rule": "alternating"},
    "decoupled": {"optim.decoupled_weight_decay": True},
    "lookahead": {"optim.lookahead_every": 3},
    "norm bias rate": {"optim.norm_bias_rate": 8.0},
    "muon": {"optim.filters": "muon"},
    "whitening": {"net.whitening": True},
    "dirac": {"net.residual_init": "dirac"},
    "activation": {"net.activation": "gelu"},
    "views": {"train.tta": "shift", "train.ema_decay": 0.9},
    "trapezoid": {"schedule.shape": "trapezoid", "schedule.hold_epochs": 0.5},
    "norms": {"net.norm_scale": "frozen", "net.norm_momentum": 0.3, "net.norm_eps": 1e-3},
}
EVERYTHING = {key: value for options in OPTIONS.values() for key, value in options.items()}
