"""What a schedule is judged by, and the record of a search: every schedule that was tried, none of them twice.

The objective is the training loss on the answers, teacher-forced, over fixed samples: the same rows rank, the same
labels are predicted and the same function sums the loss as in a training step. No answer is generated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from himap_train.evaluation.answering import evaluation_mode
from himap_train.evaluation.samples import EncodedSamples
from himap_train.models.install import install_pruning
from himap_train.models.loss import supervised_loss
from himap_train.models.stock import base_model
from himap_train.pruning.schedule import PruningSchedule
from himap_train.search.space import Point, Space


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


@dataclass(frozen=True)
class Trial:
    """One schedule that was run.

    Attributes:
        number: From 0, in the order of the search.
        origin: What proposed it.
        schedule: At the budget.
        flops_ratio: Ratio of the sample of mean length.
        loss: The objective.
        seconds: That it took.
    """

    number: int
    origin: str
    schedule: PruningSchedule
    flops_ratio: float
    loss: float
    seconds: float


@dataclass
class Trials:
    """Runs candidates within an allowance and remembers them.

    Args:
        space: Brings points to the budget.
        objective: Schedule to loss, lower is better.
        limit: Most schedules that may be run.
        on_trial: Called after each, for a progress bar.
        baseline: The preset at the same budget and its loss; None where it cannot meet the budget.
    """

    space: Space
    objective: Callable[[PruningSchedule], float]
    limit: int
    on_trial: Callable[[Trial], None] = lambda trial: None
    baseline: tuple[PruningSchedule, float] | None = None
    done: list[Trial] = field(default_factory=list)
    interrupted: bool = False

    @property
    def full(self) -> bool:
        """Whether the allowance is used up."""
        return len(self.done) >= self.limit

    @property
    def best(self) -> Trial:
        """The lowest loss, the earlier of two that are equal."""
        return min(self.done, key=lambda trial: trial.loss)

    def try_point(self, point: Point, origin: str) -> float | None:
        """The loss of a point, run or remembered; None where it does not meet the budget or nothing may be run."""
        schedule = self.space.schedule(point)
        known = next((trial for trial in self.done if trial.schedule == schedule), None)
        if known is not None:
            return known.loss
        if schedule is None or self.full:
            return None
        start = time.perf_counter()
        loss = self.objective(schedule)
        seconds = time.perf_counter() - start
        trial = Trial(len(self.done), origin, schedule, self.space.flops_ratio(schedule), loss, seconds)
        self.done.append(trial)
        self.on_trial(trial)
        return loss
