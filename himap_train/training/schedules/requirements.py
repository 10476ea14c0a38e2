"""Checks that the settings of `pruning:` have in common; each names the key, what was found and what is valid."""

from __future__ import annotations

from himap_train.pruning.keep import Count, Ratio
from himap_train.pruning.schedule import PruningSchedule
from himap_train.pruning.stage import PruningStage


def require_share(key: str, value: float) -> None:
    """Raise ValueError unless `value` is a share."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{key} is {value}; expected a share from 0 to 1")


def require_positive(key: str, value: float) -> None:
    """Raise ValueError unless `value` is above 0."""
    if not value > 0.0:
        raise ValueError(f"{key} is {value}; expected a number above 0")


def require_ratios(key: str, schedule: PruningSchedule) -> None:
    """Raise ValueError unless the schedule has stages, all of them with a ratio."""
    if not schedule.stages:
        raise ValueError(
            f"{key} changes how much model.schedule keeps, but that is dense and has no layers to remove tokens at; "
            f"give it stages or a preset, such as himap, or leave {key} out (learned keep ratios have their own budget)"
        )
    for stage in schedule.stages:
        if stage.waits or not isinstance(stage.keep, Ratio):
            raise ValueError(
                f"{key} needs a keep_ratio in every stage of model.schedule, but the one at layer {stage.layer} "
                f"{_how(stage)}, which cannot change; give keep_ratio at one layer instead, or leave {key} out"
            )


def _how(stage: PruningStage) -> str:
    if stage.waits:
        return "waits until a sample has read its image"
    return f"keeps a fixed count ({stage.keep.count})" if isinstance(stage.keep, Count) else "keeps by attention mass"
