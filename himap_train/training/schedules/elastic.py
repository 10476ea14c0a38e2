"""Elastic training: every step runs another budget, so that one checkpoint serves them all.

Each optimizer step draws a budget (`flops_ratio` of the whole prefill) uniformly from a range, or runs dense in a
stated share of the steps, which keeps the dense model good too: DualSpeed (arXiv 2602.03815) finds that training under
pruning alone does not carry over to running dense. Self-distillation (as EPIC, arXiv 2510.00515, and DualSpeed do, with
the same weights as their own teacher): in a share of the pruned steps a pass at a denser budget without gradients gives
the distributions that the pruned pass is also drawn to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.adapter_module import Step, Teacher
from himap_train.training.schedules.requirements import require_positive, require_ratios, require_share

GRID = 64
"""Intervals between the budgets that can be drawn: lengths of sequences recur, which kernels and allocators like."""
_STREAM = 0xE1A5
"""Keeps the draws apart from other numbers made of (seed, step)."""


@dataclass(frozen=True)
class SelfDistillation:
    """A denser pass of the same weights as the teacher of a pruned one.

    Args:
        share: Share of the pruned steps that have a teacher.
        weight: Weight of the divergence KL(teacher || student), beside the cross-entropy.
        teacher: Budget of the teacher; 1 is dense.
    """

    share: float = 0.25
    weight: float = 1.0
    teacher: float = 1.0


@dataclass(frozen=True)
class Elastic:
    """Train at all budgets of a range, for one checkpoint that serves each of them.

    Args:
        budgets: Lowest and highest `flops_ratio` that a step draws, each above 0 and at most 1.
        dense_share: Share of the steps that run dense.
        self_distillation: A denser pass as the teacher, or null.
    """

    budgets: tuple[float, float]
    dense_share: float = 0.1
    self_distillation: SelfDistillation | None = None

    def check(self, schedule: PruningSchedule) -> None:
        """Refuse what cannot be, before anything is loaded.

        Raises:
            ValueError: Naming the key, what was found and what is valid.
        """
        key, (low, high) = "pruning.elastic", self.budgets
        if not 0.0 < low <= high <= 1.0:
            wrong = "upside down" if 0.0 < high < low <= 1.0 else "outside 0 to 1"
            raise ValueError(
                f"{key}.budgets is [{low}, {high}], which is {wrong}; give the lowest and then the highest "
                "flops_ratio, each above 0 and at most 1 (dense), such as [0.3, 0.8]"
            )
        require_share(f"{key}.dense_share", self.dense_share)
        require_ratios(key, schedule)
        if self.self_distillation is None:
            return
        require_share(f"{key}.self_distillation.share", self.self_distillation.share)
        require_positive(f"{key}.self_distillation.weight", self.self_distillation.weight)
        if not high <= self.self_distillation.teacher <= 1.0:
            raise ValueError(
                f"{key}.self_distillation.teacher is {self.self_distillation.teacher}; a teacher is at least as dense "
                f"as what it teaches: expected a budget from {high} (the end of {key}.budgets) to 1 (dense)"
            )

    def budget(self, place: int) -> float:
        """The budget at a place of the grid, 0 to `GRID`."""
        low, high = self.budgets
        return low + (high - low) * place / GRID

    def check_possible(self, schedule: PruningSchedule, config: Any, tokens: tuple[int, int]) -> None:
        """Refuse budgets that a decoder cannot meet with this schedule's layers.

        Args:
            schedule: Fitted to the decoder.
            config: Configuration of the model.
            tokens: Image and text tokens of a typical sample.

        Raises:
            ValueError: Saying the least possible budget, or the most.
        """
        try:
            low, high = self.budgets
            for budget in sorted({low, high, *(self.budget(place) for place in range(GRID + 1))}):
                schedule.at_budget(config, budget, *tokens)
        except ValueError as error:
            raise ValueError(
                f"pruning.elastic.budgets: {error} (for a sample of {tokens[0]} image and {tokens[1]} text tokens)"
            ) from error


class ElasticSteps:
    """The budgets of a run, step by step.

    Args:
        settings: Settings of the config.
        schedule: Layers, criteria and the proportions of the ratios.
        config: Configuration of the model.
        seed: Seed of the run.
        tokens: Image and text tokens of the sample that budgets are for.
    """

    def __init__(
        self, settings: Elastic, schedule: PruningSchedule, config: Any, seed: int, tokens: tuple[int, int]
    ) -> None:
        self.settings, self.seed = settings, seed
        self._own = schedule.cost(config, *tokens).flops_ratio

        @cache
        def at_budget(budget: float) -> tuple[PruningSchedule, float]:
            found = schedule.at_budget(config, budget, *tokens)
            return found, found.cost(config, *tokens).flops_ratio

        self._at_budget = at_budget

    def draw(self, step: int) -> tuple[float, bool]:
        """The budget of an optimizer step, and whether it has a teacher: from (seed, step) alone."""
        chance = np.random.default_rng([_STREAM, self.seed, step])
        dense, place, taught = chance.random(), int(chance.integers(GRID + 1)), chance.random()
        budget = 1.0 if dense < self.settings.dense_share else self.settings.budget(place)
        distillation = self.settings.self_distillation
        return budget, distillation is not None and budget < distillation.teacher and taught < distillation.share

    def at(self, step: int) -> Step:
        """The schedule of an optimizer step, and its teacher."""
        budget, taught = self.draw(step)
        schedule, ratio = self._at_budget(budget)
        distillation = self.settings.self_distillation
        teacher = None
        if taught and distillation is not None:
            teacher = Teacher(self._at_budget(distillation.teacher)[0], distillation.weight)
        return Step(schedule, teacher, {"train/flops_ratio": ratio})

    def __str__(self) -> str:
        """What it costs beside training at one budget."""
        low, high = self.settings.budgets
        pruned = sum(self._at_budget(self.settings.budget(place))[1] for place in range(GRID + 1)) / (GRID + 1)
        dense = self.settings.dense_share
        text = (
            f"elastic: budgets {low} to {high}, dense in {dense:.0%} of the steps; on average a pass costs "
            f"{dense + (1 - dense) * pruned:.3f} of the dense prefill, under the schedule alone {self._own:.3f}"
        )
        if self.settings.self_distillation is None:
            return text
        teacher, share = self.settings.self_distillation.teacher, (1 - dense) * self.settings.self_distillation.share
        return f"{text}; in {share:.0%} of the steps a forward pass at {teacher} more"
