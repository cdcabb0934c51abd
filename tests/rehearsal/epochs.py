"""Epochs on the stand-in: `epochs.py COMPILE PRECISION WIDTH BATCH [KEY=VALUE ...]` prints what each part did, as JSON.

The second epoch runs with the meter's poll at every step and torch's own check for synchronisation, as an error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import inside
import torch
from inside import counted

from dali_pipeline import sources
from dali_pipeline.backend import BackendChoice
from train.config import load_config
from train.machine.runtime import prepare
from train.step.meter import StepMeter
from train.step.schedule import OneCycle
from train.step.trainer import Trainer

CONFIG = Path(__file__).resolve().parent.parent.parent / "configs" / "onecycle.yaml"


def main() -> None:
    mode, precision, width, batch, *more = sys.argv[1:]
    words = {
        "data.name": "synthetic",
        "data.synthetic_count": 4 * int(batch),
        "data.backend": "torch",
        "net.width": width,
        "train.batch_size": batch,
        "train.eval_batch_size": batch,
        "train.device": "cuda",
        "train.precision": precision,
        "train.compile": mode,
        "train.step_graph": "off",
        "train.ema_decay": 0.9,
        "train.tta": "true",
        "schedule.lr_max": 0.1,
        "schedule.lr_min": 0.01,
        **dict(word.split("=") for word in more),
    }
    inside.answer_evaluations()
    config = load_config(CONFIG, [f"{key}={value}" for key, value in words.items()])
    runtime = prepare(device="cuda", precision=precision, compile=mode, step_graph=config.train.step_graph)
    trainer = Trainer(
        config, sources.load(config.data), runtime, BackendChoice("torch", "the rehearsal computes nothing")
    )
    parts: dict[str, Any] = {}
    if runtime.compile_mode is not None or runtime.step_graph:
        with counted() as parts["warm_up"]:
            trainer.warm_up()
    schedule = OneCycle(0.05, 0.001, 10, trainer.total_steps)
    steps = trainer.steps_per_epoch
    meters = [StepMeter(epoch, steps, runtime.device, poll_seconds=0.0) for epoch in range(3)]
    inside.CONVOLUTIONS.clear()
    with counted() as parts["first_epoch"]:
        trainer.train_epoch(0, schedule, meters[0])
    convolutions = inside.CONVOLUTIONS[:]
    torch.cuda.set_sync_debug_mode("error")
    with counted() as parts["second_epoch"]:
        trainer.train_epoch(1, schedule, meters[1], after_step=meters[1].poll)
    torch.cuda.set_sync_debug_mode("default")
    meters[1].finish(steps)
    with counted() as parts["evaluation"]:
        trainer.evaluate()
    with counted() as parts["third_epoch"]:
        trainer.train_epoch(2, schedule, meters[2])
    trainer.close()
    report = {
        "gpu": torch.cuda.get_device_name(),
        "precision": runtime.precision,
        "mode": runtime.compile_mode,
        "not_captured": trainer.not_captured,
        "steps": steps,
        "batches": len(trainer.eval_loader),
        "parts": parts,
        "convolutions": convolutions,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
