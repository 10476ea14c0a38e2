"""What the loss of an optimizer step is averaged over: the supervised tokens of its micro-batches on all ranks.

The loss of an optimizer step is the mean over all supervised tokens of its micro-batches and ranks, as if they were one
batch. So each micro-batch contributes its *sum*, divided by the number of tokens of the whole window on all ranks. That
number is known in time because the loader reads a window ahead (`himap_train.data.loader`).
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from himap_train.data.loader import WINDOW_BATCHES, WINDOW_TOKENS


class WindowMean:
    """Losses of one accumulation window, added up over its micro-batches.

    Attributes:
        tokens: Supervised tokens of the window on all ranks, at least 1.
        batches: Micro-batches of the window on all ranks that supervise something, at least 1.
        begun: Whether it runs. A checkpoint may lie within one: what is left of it is a window then.
    """

    def __init__(self) -> None:
        self.tokens, self.batches, self.begun = 1.0, 1.0, False
        self._sums: dict[str, Tensor] = {}

    def begin(self, batch: dict[str, Any], trainer: Trainer, device: torch.device) -> None:
        """Start the window of which this is the first micro-batch.

        Raises:
            ValueError: Nobody has counted the window.
        """
        if WINDOW_TOKENS not in batch:
            raise ValueError(f"the batch has no {WINDOW_TOKENS!r}: let `himap_train.data.loader.Windows` count it")
        self.begun, self._sums = True, {}
        counts = torch.tensor([batch[WINDOW_TOKENS], batch[WINDOW_BATCHES]], dtype=torch.float, device=device)
        self.tokens, self.batches = trainer.strategy.reduce(counts, reduce_op="sum").clamp(min=1).tolist()

    def add(self, **sums: Tensor) -> None:
        """Take in the summed losses of a micro-batch, each under its name."""
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()

    def means(self, trainer: Trainer) -> dict[str, Tensor]:
        """Each loss a supervised token, over all ranks; the window has ended."""
        self.begun = False
        reduced = {name: trainer.strategy.reduce(value, reduce_op="sum") for name, value in self._sums.items()}
        return {name: value / self.tokens for name, value in reduced.items()}

    def weight(self, trainer: Trainer) -> float:
        """Factor of a summed loss: Lightning divides by the number of micro-batches and averages over the ranks."""
        return trainer.accumulate_grad_batches * trainer.world_size / self.tokens

    def weight_of_mean(self, trainer: Trainer) -> float:
        """Factor of a micro-batch's mean loss: Lightning divides as for `weight`, also where some supervise nothing."""
        return trainer.accumulate_grad_batches * trainer.world_size / self.batches
