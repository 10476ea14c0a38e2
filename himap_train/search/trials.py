"""The record of a search: every schedule that was tried, none of them twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from himap_train.pruning.schedule import PruningSchedule
from himap_train.search.space import Point, Space


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
