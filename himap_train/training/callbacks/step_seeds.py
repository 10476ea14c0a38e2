"""Random numbers that depend on the place in training alone.

Saving generator states is not enough for a resumed run to equal an uninterrupted one: starting a data loader or a
validation draws numbers too, and a resumed run does so at other times. So every training step starts its generators
from (seed, rank, epoch, batch), and dropout is the same whenever and wherever that step is run.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


def seed_generators(*entropy: int) -> None:
    """Start Python's, NumPy's and torch's generators (those of all devices) from these numbers."""
    words = np.random.SeedSequence(entropy).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))


class StepSeeds(Callback):
    """Seeds each training step from the run's seed and its place."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before the forward."""
        seed_generators(self.seed, trainer.global_rank, trainer.current_epoch, batch_idx)
