"""Another schedule in each optimizer step, decided by the step's number alone.

So a resumed run takes up where it was, all micro-batches of an accumulation window run alike, and so do all ranks.
Validation, evaluation and what is saved keep the model's own schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from lightning.pytorch import Callback, Trainer

from himap_train.training.adapter_module import Step
from himap_train.training.run.launch import say

Measured = Callable[[], tuple[int, int] | None]
"""Image and text tokens of a typical sample, in the process that has counted them."""


class StepPlan(Protocol):
    """What every optimizer step runs."""

    def at(self, step: int) -> Step:
        """What the step of this number (from 0) runs."""

    def __str__(self) -> str:
        """What the user is told when training starts."""


class SchedulePerStep(Callback):
    """Gives the module the schedule of each optimizer step.

    Args:
        make_plan: `(schedule, config, total=optimizer steps, tokens=tokens) -> StepPlan`, called on every rank when
            training starts.
        measured: What the first process has counted then, and passes to the others as `tokens`.
    """

    def __init__(self, make_plan: Callable[..., StepPlan], measured: Measured = lambda: None) -> None:
        self.make_plan, self.measured = make_plan, measured
        self._plan: StepPlan | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Here the number of steps is known, and every process is there."""
        tokens = trainer.strategy.broadcast(self.measured())
        config, steps = pl_module.peft_model.config, int(trainer.estimated_stepping_batches)
        self._plan = self.make_plan(pl_module.schedule, config, total=steps, tokens=tokens)
        say(self._plan)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The same in all micro-batches of a window: the step counts when it is done."""
        assert self._plan is not None
        step = self._plan.at(trainer.global_step)
        pl_module.use_step(step)
        pl_module.log_dict(dict(step.figures), prog_bar=True)
