"""A ranking that learns, step by step of a run; see `himap_train.training.schedules.learn_ranking`."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from himap_train.models.foresight import Lesson, lessons
from himap_train.models.installed import scorers_of
from himap_train.models.stock import text_decoder
from himap_train.pruning.learned.scorer import ranking_loss
from himap_train.training.callbacks.progress import step_ended
from himap_train.training.optim import cosine_with_warmup
from himap_train.training.run.launch import say
from himap_train.training.schedules.learn_ranking import RankingSettings

_WARMUP = 0.03


class LearnRanking(Callback):
    """Shows the ranking dense passes, and trains it on them with the gradients of all ranks.

    Args:
        settings: Settings of the config.
        seed: Seed of the run.
    """

    def __init__(self, settings: RankingSettings, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self._lessons: deque[dict[int, Lesson]] = deque(maxlen=settings.remembered)
        self._optimizer: torch.optim.Optimizer | None = None
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
        self._watched = self.settings.watched(pl_module.schedule, model.config)
        pl_module.look_first(lambda batch: self._look(trainer, pl_module, batch))
        number = sum(weight.numel() for weight in self._weights)
        say(
            f"learned ranking: {number:,} weights at layers {sorted(self._scorers)} foresee the attention of layers "
            f"{self._watched[0]} to {self._watched[-1]}; in {self.settings.share:.0%} of the steps a dense pass more"
        )

    def _look(self, trainer: Trainer, pl_module: Any, batch: dict[str, Any]) -> None:
        """Where it is due, or nothing has been seen since the run went on, see what a dense pass shows of a batch."""
        if self._lessons and not self.settings.due(self.seed, trainer.global_step):
            return
        dense = partial(pl_module.teacher_states, batch)
        self._lessons.append(lessons(pl_module.peft_model, dense, pl_module.schedule, self._watched))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Some steps of its own for each optimizer step of the model."""
        for _ in range(self.settings.updates if step_ended(trainer, batch_idx) else 0):
            loss = self._update(trainer)
            pl_module.log("train/ranking_loss", loss)

    def _update(self, trainer: Trainer) -> Tensor:
        """One step over the lessons whose turn it is, of all ranks; their mean loss."""
        assert self._optimizer is not None
        total, rows = self._loss(self._lessons[0])
        self._lessons.rotate(-1)
        self._optimizer.zero_grad()
        total.backward()
        # One message for all of it: a sum over the rows of all ranks, whatever each of them holds.
        parts = [*(weight.grad.flatten() for weight in self._weights if weight.grad is not None), total, rows]
        flat = trainer.strategy.reduce(torch.cat([part.detach().view(-1).float() for part in parts]), reduce_op="sum")
        mean = flat[:-1] / flat[-1].clamp(min=1)
        for weight, part in zip(self._weights, mean[:-1].split([w.numel() for w in self._weights]), strict=True):
            weight.grad = part.view_as(weight)
        self._optimizer.step()
        self._rate.step()
        return mean[-1]

    @torch.enable_grad()
    def _loss(self, shown: dict[int, Lesson]) -> tuple[Tensor, Tensor]:
        """Summed over rows and layers, and the number of rows."""
        losses = []
        for layer, lesson in shown.items():
            scores = self._scorers[layer](lesson.asked)
            losses.append(ranking_loss(scores, lesson.target, lesson.asked.image_real))
        return torch.stack([total for total, _ in losses]).sum(), losses[0][1]

    def state_dict(self) -> dict[str, Any]:
        """The moments; the weights are in the module's checkpoint, see `adapter_facts`."""
        if self._optimizer is None:
            return {}
        return {"optimizer": self._optimizer.state_dict(), "rate": self._rate.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Comes before training starts."""
        self._saved = state_dict or None
