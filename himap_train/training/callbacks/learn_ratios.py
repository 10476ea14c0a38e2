"""Keep ratios that learn, step by step of a run; see `learnable` for its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from himap_train.checkpoints.adapter import CHECKPOINT_KEY
from himap_train.models.foresight import make_scorers
from himap_train.pruning.learned.ratios import KeepRatios
from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.adapter_module import Step
from himap_train.training.callbacks.progress import step_ended
from himap_train.training.run.launch import say
from himap_train.training.run.measured_rows import model_config
from himap_train.training.schedules.learnable import Learnable
from himap_train.training.schedules.per_step import Measured


class LearnKeepRatios(Callback):
    """Runs the ratios of each optimizer step, gives them the gradient of all ranks, freezes them in time.

    Args:
        settings: Settings of the config.
        tokens_of: Image and text tokens of a typical sample from those that were measured, if any.
        measured: What the first process has counted when training starts.
    """

    def __init__(
        self,
        settings: Learnable,
        tokens_of: Callable[[tuple[int, int] | None], tuple[int, int]],
        measured: Measured = lambda: None,
    ) -> None:
        self.settings, self.tokens_of, self.measured = settings, tokens_of, measured
        self._ratios: KeepRatios | None = None
        self._saved: dict[str, Any] | None = None
        self._leaf: Tensor | None = None
        self._last = 0

    @property
    def ratios(self) -> KeepRatios:
        """What learns, from the start of training on."""
        if self._ratios is None:
            raise RuntimeError("the keep ratios are made when training starts")
        return self._ratios

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """What is given before the first layer that learns is there from the start, with a ranking that learns."""
        given = self.settings.given(model_config(pl_module).text_config.num_hidden_layers)
        if pl_module.llava is None:
            pl_module.schedule = given
        elif pl_module.schedule.stages[: len(given.stages)] != given.stages:  # else of an earlier fit
            make_scorers(pl_module.peft_model, given)
            pl_module.adopt(given)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Here the number of steps is known, and every process is there."""
        tokens = self.tokens_of(trainer.strategy.broadcast(self.measured()))
        self._ratios = self.settings.ratios(pl_module.peft_model.config, tokens)
        if self._saved is not None:
            self._ratios.load_state_dict(self._saved)
        # One step at least, and one at least afterwards.
        steps = int(trainer.estimated_stepping_batches)
        self._last = min(max(round(self.settings.until * steps), 1), max(steps - 1, 1))
        if trainer.global_step:
            pl_module.adopt(self._schedule_after(trainer.global_step))
        say(
            f"learned keep ratios: budget {self.settings.budget} reached at step {self._warmup(steps)}, frozen at "
            f"step {self._last} of {steps}"
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The same ratios in all micro-batches of a window."""
        if self._leaf is not None:
            return
        step = trainer.global_step
        if step >= self._last:
            self._leaf = None
            schedule = pl_module.schedule
        else:
            self.ratios.target = self._target(step, int(trainer.estimated_stepping_batches))
            now = self.ratios.ratios()
            self._leaf = now.to(device=pl_module.device, dtype=torch.float32).requires_grad_()
            schedule = self.ratios.schedule(now)
        pl_module.use_step(Step(schedule, ratios=self._leaf))
        self._log(pl_module, schedule)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Where an optimizer step ends, before a checkpoint is written."""
        if self._leaf is None or not step_ended(trainer, batch_idx):
            return
        gradient = torch.zeros_like(self._leaf) if self._leaf.grad is None else self._leaf.grad
        self.ratios.step(trainer.strategy.reduce(gradient, reduce_op="mean"))
        self._leaf = None
        pl_module.adopt(self._schedule_after(trainer.global_step))
        if trainer.global_step == self._last:
            say(f"frozen keep ratios: {pl_module.schedule.to_dict()['stages']}")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Where something else stopped it (`max_time`, early stopping) the budget is met all the same."""
        if 0 < trainer.global_step < self._last:
            pl_module.adopt(self._schedule_after(self._last))
            say(
                f"training ended at step {trainer.global_step}, before the keep ratios were to be frozen (step "
                f"{self._last}): frozen now at the budget {self.settings.budget}, to which the weights had no time to "
                f"adapt, while last.ckpt goes on learning where it is resumed: {pl_module.schedule.to_dict()['stages']}"
            )

    def _log(self, pl_module: Any, schedule: PruningSchedule) -> None:
        """What each layer keeps now, and what that costs."""
        stages = {stage.layer: stage.keep_ratio for stage in schedule.stages}
        ratio: float | None = 1.0
        figures: dict[str, Any] = {}
        for layer in range(self.ratios.layers):
            ratio = stages.get(layer, ratio)
            figures[f"keep_ratio/layer{layer:02d}"] = ratio
        pl_module.log_dict({**figures, "train/flops_ratio": self.ratios.cost(schedule)})

    def state_dict(self) -> dict[str, Any]:
        """The shares and their moments."""
        return self.ratios.state_dict() if self._ratios else {}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """The schedule that was saved with the weights: a run that is at its end does not start training again."""
        pl_module.adopt(PruningSchedule.from_dict(checkpoint[CHECKPOINT_KEY]["schedule"]))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Comes before training starts."""
        self._saved = state_dict or None

    def _schedule_after(self, steps: int) -> PruningSchedule:
        """What is saved once so many steps are done: as it is learned, or frozen at the budget."""
        if steps < self._last:
            return self.ratios.schedule(self.ratios.ratios())
        self.ratios.target = self.settings.budget
        return self.ratios.freeze(self.settings.tolerance)

    def _warmup(self, steps: int) -> int:
        return round(self.settings.warmup * steps)

    def _target(self, step: int, steps: int) -> float:
        warmup = self._warmup(steps)
        progress = min((step + 1) / (warmup + 1), 1.0)
        return 1.0 - progress * (1.0 - self.settings.budget)
