"""A ranking that learns beside the model, for the stages of `model.schedule` whose criterion is `learned`.

In a share of the optimizer steps a dense pass without gradients shows where later layers look; what ranks learns to
foresee that, in every step, from the last such passes. It has an optimizer of its own and runs in no other
gradient: weights that are spread over processes, frozen or quantised do not know of it. What learns is
`himap_train.pruning.learned.scorer`, from what `himap_train.models.foresight` shows, run by
`himap_train.training.callbacks.learn_ranking`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from himap_train.models.foresight import learned_layers
from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.schedules.requirements import require_positive, require_share

_STREAM = 0x5EE5
"""Keeps the draws apart from other numbers made of (seed, step)."""


@dataclass(frozen=True)
class RankingSettings:
    """Learn the ranking of the stages of `model.schedule` whose criterion is `learned`.

    Args:
        share: Share of the optimizer steps with a dense pass to learn from.
        layers: First and last layer whose attention is foreseen; null: all from the stage on that can be, which leaves
            out the decoder's last.
        learning_rate: Peak of the ranking's own learning rate; it rises and falls as that of LoRA.
        remembered: How many batches of such passes are learned from in turn.
        updates: How many of them in a step; more where a run is short.
    """

    share: float = 0.1
    layers: tuple[int, int] | None = None
    learning_rate: float = 3e-3
    remembered: int = 8
    updates: int = 2

    def check(self, schedule: PruningSchedule) -> None:
        """Refuse what cannot be, before anything is loaded.

        Raises:
            ValueError: Naming the key, what was found and what is valid.
        """
        key = "pruning.learn_ranking"
        require_share(f"{key}.share", self.share)
        for name in ("share", "learning_rate", "remembered", "updates"):
            require_positive(f"{key}.{name}", getattr(self, name))
        if not learned_layers(schedule):
            raise ValueError(
                f"{key} trains the stages of model.schedule whose criterion is learned, and there is none; give one, "
                f"such as {{layer: 0, criterion: learned, keep_ratio: 0.2}}, or leave {key} out"
            )

    def watched(self, schedule: PruningSchedule, config: Any) -> range:
        """The layers whose attention is foreseen.

        Raises:
            ValueError: They are no layers of the decoder, or none lies behind a stage that learns.
        """
        last = getattr(config, "text_config", config).num_hidden_layers - 2
        learned = learned_layers(schedule)
        low, high = self.layers or (min(learned), last)
        if not 0 <= low <= high <= last or max(learned) > high:
            raise ValueError(
                f"pruning.learn_ranking.layers is [{low}, {high}]; expected first and last of layers up to {last}, "
                f"the last of them at or behind the last stage that learns (layer {max(learned)})"
            )
        return range(low, high + 1)

    def due(self, seed: int, step: int) -> bool:
        """Whether an optimizer step has a dense pass: from (seed, step) alone."""
        return bool(np.random.default_rng([_STREAM, seed, step]).random() < self.share)
