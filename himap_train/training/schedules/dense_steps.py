"""Train pruned, serve dense (DualSpeed, arXiv 2602.03815).

In a stated share of the steps the model runs dense, and its answers are also drawn to those that the same weights give
under the schedule, without a gradient. Trained under pruning alone a model loses 3 to 4 points when it runs dense,
DualSpeed finds. Its four learned vectors before every pruned sequence, which tell a model in which of the two it is,
are left out: no token here stands for them, and they would be weights that nothing serves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.adapter_module import Step, Teacher
from himap_train.training.schedules.requirements import require_positive, require_share

_STREAM = 0xD5EE
"""Keeps the draws apart from other numbers made of (seed, step)."""
_DENSE = PruningSchedule()


@dataclass(frozen=True)
class DenseSteps:
    """Train under `model.schedule` for a model that is served dense.

    Args:
        share: Share of the optimizer steps that run dense, with the pruned model as their teacher.
        weight: Weight of the divergence KL(pruned || dense) in them, beside the cross-entropy.
    """

    share: float = 0.1
    weight: float = 1.0

    def check(self, schedule: PruningSchedule) -> None:
        """Refuse what cannot be, before anything is loaded.

        Raises:
            ValueError: Naming the key, what was found and what is valid.
        """
        require_share("pruning.dense_steps.share", self.share)
        require_positive("pruning.dense_steps.weight", self.weight)
        if schedule.dense:
            raise ValueError(
                "pruning.dense_steps is for a model that trains pruned, but model.schedule is dense, as every step "
                "would be; give it stages or a preset, such as divprune, or leave pruning.dense_steps out"
            )


class DenseStepPlan:
    """Which steps of a run of this seed are dense; the others run the schedule."""

    def __init__(self, settings: DenseSteps, schedule: PruningSchedule, seed: int) -> None:
        self.settings, self.schedule, self.seed = settings, schedule, seed

    def at(self, step: int) -> Step:
        """What an optimizer step runs: from (seed, step) alone."""
        dense = np.random.default_rng([_STREAM, self.seed, step]).random() < self.settings.share
        figures = {"train/dense": float(dense)}
        if not dense:
            return Step(self.schedule, figures=figures)
        return Step(_DENSE, Teacher(self.schedule, self.settings.weight), figures)

    def __str__(self) -> str:
        """What to do with the model in the end."""
        return (
            f"dense steps: {self.settings.share:.0%} of the steps run dense, with the pruned model as their teacher; "
            "the model is meant to be served dense: --schedule none, or load_checkpoint(path, schedule=None)"
        )
