"""Curriculum: keep ratios fall from dense to the schedule over the first part of training.

PyramidDrop, LLaVolta and EPIC start dense or nearly so and prune harder as training goes on, so that the model never
meets a context much poorer than the one before. The strength s (see `himap_train.pruning.budget.at_strength`) rises
from 0, dense, to 1, the schedule, over the first `share` of the optimizer steps; afterwards it is exactly 1. Or other
schedules run one after the other until then: LLaVolta's compress less and less, and end dense.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from himap_train.models.foresight import learned_layers
from himap_train.pruning.budget import at_strength
from himap_train.pruning.reading import PhasesArgument, fitted_phases, read_phases
from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.adapter_module import Step
from himap_train.training.schedules.requirements import require_ratios, require_share


@dataclass(frozen=True)
class Curriculum:
    """Prune a little at first, and as the schedule says in the end.

    Args:
        shape: How the strength rises: "linear", "cosine" (slow at both ends) or "staged" (in equal stairs, the first of
            them dense).
        share: Share of the optimizer steps over which it rises.
        steps: Stairs of "staged".
        phases: Schedules that run one after the other, each for an equal part of `share`, in place of a rising
            strength: a list, or "llavolta", which goes with `share: 0.75` and a dense `model.schedule`.
    """

    shape: Literal["linear", "cosine", "staged"] = "linear"
    share: float = 0.3
    steps: int = 4
    phases: PhasesArgument | None = None

    def check(self, schedule: PruningSchedule) -> None:
        """Refuse what cannot be, before anything is loaded.

        Raises:
            ValueError: Naming the key, what was found and what is valid.
        """
        require_share("pruning.curriculum.share", self.share)
        if self.phases is not None:
            if not read_phases(self.phases):
                raise ValueError("pruning.curriculum.phases is empty; give at least one schedule, or null")
            return
        require_ratios("pruning.curriculum", schedule)
        if schedule.enter:
            raise ValueError(
                f"pruning.curriculum starts dense, but in model.schedule image tokens enter at layer {schedule.enter}: "
                "give it phases, or a schedule without enter"
            )
        if self.steps < 1:
            raise ValueError(f"pruning.curriculum.steps is {self.steps}; expected 1 or more stairs")

    def strength(self, step: int, total: int) -> float:
        """Strength in [0, 1] of an optimizer step (from 0) of `total`."""
        rise = self.share * total
        if step >= rise:
            return 1.0
        progress = step / rise
        if self.shape == "staged":
            return math.floor(progress * self.steps) / self.steps
        return (1 - math.cos(math.pi * progress)) / 2 if self.shape == "cosine" else progress


class CurriculumSteps:
    """The schedules of a run, step by step.

    Args:
        settings: Settings of the config.
        schedule: Where it ends.
        total: Optimizer steps of the run.
        layers: Layers of the decoder.
    """

    def __init__(self, settings: Curriculum, schedule: PruningSchedule, total: int, layers: int) -> None:
        self.settings, self.schedule, self.total = settings, schedule, total
        self.phases = None if settings.phases is None else fitted_phases(settings.phases, layers)
        for phase in self.phases or ():
            phase.validate_for(layers)
            if untrained := sorted(set(learned_layers(phase)) - set(learned_layers(schedule))):
                raise ValueError(
                    f"pruning.curriculum.phases: a learned ranking is to choose at layer {untrained[0]}, where "
                    "model.schedule has none that could be trained: give it a stage there, or another criterion here"
                )

    def at(self, step: int) -> Step:
        """The schedule of an optimizer step."""
        if self.phases is not None:
            rise = self.settings.share * self.total
            number = math.floor(step / rise * len(self.phases)) if step < rise else len(self.phases)
            return Step([*self.phases, self.schedule][number], figures={"train/phase": float(number)})
        strength = self.settings.strength(step, self.total)
        schedule = self.schedule if strength == 1.0 else at_strength(self.schedule, strength)
        return Step(schedule, figures={"train/strength": strength})

    def __str__(self) -> str:
        """When it ends."""
        way = f"{self.settings.shape} from dense" if self.phases is None else f"{len(self.phases)} phases"
        return (
            f"curriculum: {way} to the schedule, which runs from step "
            f"{math.ceil(self.settings.share * self.total)} of {self.total} on"
        )
