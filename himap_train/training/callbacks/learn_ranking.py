"""A ranking that learns, step by step of a run; see `himap_train.training.schedules.learn_ranking`."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from himap_train.models.foresight import learned_layers
from himap_train.models.install import pruning_of
from himap_train.models.installed import scorers_of
from himap_train.models.stock import text_decoder
from himap_train.pruning.learned.scorer import Lesson, ranking_loss
from himap_train.training.callbacks.progress import step_ended
from himap_train.training.optim import cosine_with_warmup
from himap_train.training.run.launch import say
from himap_train.training.schedules.learn_ranking import RankingSettings

_WARMUP = 0.03


@dataclass
class _Remembered:
    lessons: dict[int, Lesson]
    learned: int


class LearnRanking(Callback):
    """Collects what backward passes teach the ranking, and trains it on that with the gradients of all ranks.

    Args:
        settings: Settings of the config.
    """

    def __init__(self, settings: RankingSettings) -> None:
        self.settings = settings
        # A micro-batch's, by layer, and how often they were learned, the oldest first. Of no image on this rank there
        # are none, while all ranks go on to the next micro-batch together.
        self._lessons: deque[_Remembered] = deque(maxlen=settings.remembered)
        self._now: dict[int, Lesson] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._begun = False
        self._saved: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Here the number of steps is known, and weights are where they are trained."""
        model = pl_module.peft_model
        self._scorers = {at: scorer.to(pl_module.device) for at, scorer in scorers_of(text_decoder(model)).items()}
        self._weights = [weight for scorer in self._scorers.values() for weight in scorer.parameters()]
        self._optimizer = torch.optim.AdamW(self._weights, lr=self.settings.learning_rate)
        updates = trainer.estimated_stepping_batches * self.settings.updates
        self._rate = cosine_with_warmup(self._optimizer, updates, _WARMUP)
        if self._saved is not None:
            self._optimizer.load_state_dict(self._saved["optimizer"])
            self._rate.load_state_dict(self._saved["rate"])
        pruning = pruning_of(model)
        assert pruning is not None
        pruning.learn = self._now.__setitem__
        number = sum(weight.numel() for weight in self._weights)
        say(f"learned ranking: {number:,} weights at layers {sorted(self._scorers)}")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Nobody learns any more."""
        if pruning := pruning_of(pl_module.peft_model):
            pruning.learn = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Some steps of its own for each optimizer step of the model."""
        if learned_layers(pl_module.running_schedule):
            least = min((turn.learned for turn in self._lessons), default=0)
            self._lessons.append(_Remembered(dict(self._now), least))
            self._now.clear()
        for _ in range(self.settings.updates if step_ended(trainer, batch_idx) else 0):
            if self._lessons:
                pl_module.log("train/ranking_loss", self._update(trainer))
            self._rate.step()

    def _update(self, trainer: Trainer) -> Tensor:
        """One step over the lessons whose turn it is, of all ranks; their mean loss."""
        assert self._optimizer is not None
        self._optimizer.zero_grad()
        total, rows = self._loss()
        if total.requires_grad:
            total.backward()
        # One message for all of it: a sum over the rows of all ranks, whatever each of them holds.
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in self._weights]
        flat = torch.cat([part.detach().view(-1).float() for part in (*gradients, total, rows)])
        flat = trainer.strategy.reduce(flat, reduce_op="sum")
        mean = flat[:-1] / flat[-1].clamp(min=1)
        for weight, part in zip(self._weights, mean[:-1].split([w.numel() for w in self._weights]), strict=True):
            weight.grad = part.view_as(weight)
        self._begun = self._begun or bool(flat[-1])  # before any rank has seen an image there is nothing to step by
        if self._begun:
            self._optimizer.step()
        return mean[-1]

    @torch.enable_grad()
    def _loss(self) -> tuple[Tensor, Tensor]:
        """Of the newest lessons of those learned least often: summed over rows and layers, and the number of rows."""
        turn = min(reversed(self._lessons), key=lambda remembered: remembered.learned)
        turn.learned += 1
        total, rows = self._weights[0].new_zeros(()), self._weights[0].new_zeros(())
        for layer, lesson in turn.lessons.items():
            loss, number = ranking_loss(self._scorers[layer](lesson.asked), lesson)
            total, rows = total + loss, torch.maximum(rows, number)
        return total, rows

    def state_dict(self) -> dict[str, Any]:
        """The moments; the weights are in the module's checkpoint, see `adapter_facts`."""
        if self._optimizer is None:
            return {}
        return {"optimizer": self._optimizer.state_dict(), "rate": self._rate.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Comes before training starts."""
        self._saved = state_dict or None
