"""A ranking that learns beside the model, for the stages of `model.schedule` whose criterion is `learned`.

Each backward pass shows on which of the tokens that stay the loss depends; what ranks learns to foresee that, in every
step, from the last such passes. It has an optimizer of its own and runs in no other gradient: weights that are spread
over processes, frozen or quantised do not know of it. What learns is `himap_train.pruning.learned.scorer`, from what
`himap_train.models.foresight` shows, run by `himap_train.training.callbacks.learn_ranking`.
"""

from __future__ import annotations

from dataclasses import dataclass

from himap_train.models.foresight import learned_layers
from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.schedules.requirements import require_positive


@dataclass(frozen=True)
class RankingSettings:
    """Learn the ranking of the stages of `model.schedule` whose criterion is `learned`.

    Args:
        learning_rate: Peak of the ranking's own learning rate; it rises and falls as that of LoRA.
        remembered: How many micro-batches are learned from in turn.
        updates: How many of them in a step.
    """

    learning_rate: float = 3e-3
    remembered: int = 8
    updates: int = 6

    def check(self, schedule: PruningSchedule) -> None:
        """Refuse what cannot be, before anything is loaded.

        Raises:
            ValueError: Naming the key, what was found and what is valid.
        """
        key = "pruning.learn_ranking"
        for name in ("learning_rate", "remembered", "updates"):
            require_positive(f"{key}.{name}", getattr(self, name))
        if not learned_layers(schedule):
            raise ValueError(
                f"{key} trains the stages of model.schedule whose criterion is learned, and there is none; give one, "
                f"such as {{layer: 0, criterion: learned, keep_ratio: 0.2}}, or leave {key} out"
            )
