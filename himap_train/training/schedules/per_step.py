"""Another schedule in each optimizer step, decided by the step's number alone.

So a resumed run takes up where it was, all micro-batches of an accumulation window run alike, and so do all ranks.
Validation, evaluation and what is saved keep the model's own schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from lightning.pytorch import Callback, Trainer

from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.adapter_module import Teacher
from himap_train.training.run.launch import say


@dataclass(frozen=True)
class Step:
    """What one optimizer step runs.

    Attributes:
        schedule: Of the pass that is trained.
        teacher: Of a pass before it without gradients, whose answers it should also give; None for none.
        figures: What the loggers are told about it.
    """

    schedule: PruningSchedule
    teacher: Teacher | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


class StepPlan(Protocol):
    """What every optimizer step runs."""

    def at(self, step: int) -> Step:
        """What the step of this number (from 0) runs."""

    def __str__(self) -> str:
        """What the user is told when training starts."""


class OtherSchedules(Callback):
    """Training steps run other schedules than the module's own, which it has back for everything else."""

    tokens: tuple[int, int] | None = None
    """Image and text tokens of a typical sample, which the first process has counted."""

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """What is measured is what is saved."""
        pl_module.use_schedule(pl_module.schedule)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The evaluation after training too."""
        pl_module.use_schedule(pl_module.schedule)


class SchedulePerStep(OtherSchedules):
    """Gives the module the schedule of each optimizer step.

    Args:
        make_plan: `(schedule, config, total=optimizer steps, tokens=tokens) -> StepPlan`, called on every rank when
            training starts.
    """

    def __init__(self, make_plan: Callable[..., StepPlan]) -> None:
        self.make_plan = make_plan
        self._plan: StepPlan | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Here the number of steps is known, and every process is there."""
        tokens = trainer.strategy.broadcast(self.tokens)
        config, steps = pl_module.peft_model.config, int(trainer.estimated_stepping_batches)
        self._plan = self.make_plan(pl_module.schedule, config, total=steps, tokens=tokens)
        say(self._plan)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The same in all micro-batches of a window: the step counts when it is done."""
        assert self._plan is not None
        step = self._plan.at(trainer.global_step)
        pl_module.use_schedule(step.schedule, step.teacher)
        pl_module.log_dict(dict(step.figures), prog_bar=True)
