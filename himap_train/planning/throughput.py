"""What this machine reaches in real training steps of a config."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from himap_train.data.module import LlavaDataModule
from himap_train.training.module import LlavaFineTuner

STEPS = 6
"""Micro-batches that are timed; one before them warms up."""


class _Clock(Callback):
    """When each micro-batch began and ended, the device's work included."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def seconds_a_sample(tuner: LlavaFineTuner, data: LlavaDataModule, trainer: Any) -> float:
    """Seconds that one device of this machine takes for a sample, waiting for data included.

    Args:
        tuner: Loads its weights here.
        data: With a processor.
        trainer: Settings of the config: `accelerator`, `precision`, `gradient_clip_val`, `accumulate_grad_batches`.
    """
    clock = _Clock()
    names = ("accelerator", "precision", "gradient_clip_val", "accumulate_grad_batches")
    given: dict[str, Any] = {name: trainer[name] for name in names}
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    Trainer(
        **given,
        **quiet,
        devices=1,
        max_epochs=-1,
        limit_val_batches=0,
        limit_train_batches=STEPS + 1,
        max_steps=-(-(STEPS + 1) // trainer.accumulate_grad_batches),
        callbacks=[clock],
    ).fit(tuner, datamodule=data)
    if len(clock.times) < 2:
        raise ValueError(f"--measured needs 2 batches of training data or more; it has {len(clock.times)}")
    between = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    return median(between) / data.batch_size
