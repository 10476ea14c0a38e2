"""What a schedule is judged by: the training loss on the answers, teacher-forced, over fixed samples.

The same rows rank, the same labels are predicted and the same function sums the loss as in a training step. No answer
is generated.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from himap_train.evaluation.answering import evaluation_mode
from himap_train.evaluation.samples import EncodedSamples
from himap_train.models.install import install_pruning
from himap_train.models.loss import supervised_loss
from himap_train.models.stock import base_model
from himap_train.pruning.schedule import PruningSchedule


class Objective:
    """Mean loss of the supervised tokens under a schedule; counts the forward passes that it makes.

    Args:
        model: LLaVA or PeftModel around one; has the last schedule installed afterwards.
        samples: From `read_samples`.
        seed: For the criterion `random`, the same draws for every schedule.
    """

    def __init__(self, model: nn.Module, samples: EncodedSamples, seed: int = 0) -> None:
        self.model, self.samples, self.seed = model, samples, seed
        self.forward_passes = 0

    def __call__(self, schedule: PruningSchedule) -> float:
        """The mean loss.

        Raises:
            ValueError: It is not finite.
        """
        install_pruning(self.model, schedule)
        lm_head: Any = base_model(self.model).lm_head
        total = torch.zeros((), dtype=torch.float64)
        with evaluation_mode(self.model), torch.random.fork_rng():
            torch.manual_seed(self.seed)
            for batch in self.samples.batches:
                hidden = batch.states(self.model)
                loss, _ = supervised_loss(hidden, batch.labels, lm_head)
                total += loss.double().cpu()
                self.forward_passes += 1
        mean = float(total) / self.samples.supervised
        if not math.isfinite(mean):
            raise ValueError(
                f"the loss is {mean} under {schedule}: the weights overflow in their dtype; try --dtype float32 or "
                "bfloat16"
            )
        return mean
