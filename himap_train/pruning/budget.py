"""One schedule at any budget: the same layers and criteria, ratios between dense, the schedule and nothing.

With strength s in [0, 1] a stage keeps `1 - s (1 - r)` of the image tokens: dense at 0, the schedule itself at 1. From
1 to 2 it keeps `(2 - s) r`, at 2 nothing. So ratios keep their order, and the cost falls with s.

Where a stage lets all leave that others had kept, that is a matter of where and not of how many: it comes in until s is
0.5, and the others between 0.5 and 1. So the budget is spent on what they keep as long as that can meet it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from himap_train.pruning.keep import Ratio

if TYPE_CHECKING:
    from himap_train.pruning.schedule import PruningSchedule
    from himap_train.pruning.stage import PruningStage

_HALVINGS = 40


def at_strength(schedule: PruningSchedule, strength: float) -> PruningSchedule:
    """The schedule at a strength in [0, 2]; stages that would remove nothing are left out.

    Raises:
        ValueError: The strength is outside, or a stage has a fixed count, keeps by attention mass or waits.
    """
    if not 0.0 <= strength <= 2.0:
        raise ValueError(f"strength is {strength}; expected 0 (dense) to 1 (the schedule) to 2 (no image token left)")
    none = [stage.keep_ratio == 0.0 for stage in schedule.stages]
    leaving = staying = strength
    if strength < 1.0 and any(none) and not all(none):
        leaving, staying = min(2 * strength, 1.0), max(2 * strength - 1, 0.0)
    strengths = [leaving if leave else staying for leave in none]
    stages = [_at_strength(stage, each) for stage, each in zip(schedule.stages, strengths, strict=True)]
    return replace(schedule, stages=tuple(stage for stage in stages if stage.keep_ratio != 1.0))


def at_budget(
    schedule: PruningSchedule, config: Any, flops_ratio: float, image_tokens: int = 576, text_tokens: int = 115
) -> PruningSchedule:
    """The schedule at the strength whose `flops_ratio` comes nearest to a budget; dense at 1.

    Args:
        schedule: Layers, criteria and the proportions of the ratios.
        config: As in `schedule.cost`.
        flops_ratio: The budget, of the whole prefill.
        image_tokens: Image tokens of the sample that the budget is for.
        text_tokens: Its other tokens.

    Raises:
        ValueError: The schedule has no stages, fixed counts or attention mass, or the budget is above 1 (with `enter`,
            above what all tokens cost from there on) or below what is left when every image token leaves at these
            layers; the message says how much that is.
    """
    if flops_ratio == 1.0:
        return replace(schedule, stages=(), enter=0)
    if not schedule.stages:
        raise ValueError(
            f"a dense schedule has no layers to remove tokens at for the budget {flops_ratio}: give stages"
        )

    def at(strength: float) -> PruningSchedule:
        found = at_strength(schedule, strength)
        return replace(found, stages=tuple(one_at_least(stage, image_tokens) for stage in found.stages))

    least, most = (at(strength).cost(config, image_tokens, text_tokens).flops_ratio for strength in (2.0, 0.0))
    check_budget(flops_ratio, least=least, first_layer=schedule.stages[0].layer)
    if flops_ratio > most:
        raise ValueError(
            f"the budget {flops_ratio} is above {most:.3f}, which is what all image tokens cost that enter at layer "
            f"{schedule.enter}: give less, or 1 for dense"
        )
    return nearest(at, config, flops_ratio, image_tokens, text_tokens)


def nearest(
    at: Callable[[float], PruningSchedule], config: Any, flops_ratio: float, image_tokens: int, text_tokens: int
) -> PruningSchedule:
    """The schedule whose `flops_ratio` comes nearest to a budget, of those `at` strengths from 0 to 2."""

    def cost(strength: float) -> float:
        return at(strength).cost(config, image_tokens, text_tokens).flops_ratio

    low, high = 0.0, 2.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > flops_ratio else (low, middle)
    # Counts are whole tokens, so the cost falls in steps: one of the two sides of the last step.
    return at(min(low, high, key=lambda strength: abs(cost(strength) - flops_ratio)))


def check_budget(flops_ratio: float, least: float, first_layer: int) -> None:
    """Refuse a budget that cannot be met.

    Args:
        flops_ratio: The budget.
        least: What is left when every image token leaves at the first layer.
        first_layer: That layer.

    Raises:
        ValueError: Outside `least` to 1.
    """
    if flops_ratio < least:
        raise ValueError(
            f"the budget {flops_ratio} is below what remains when every image token leaves at the given layers, the "
            f"first of them {first_layer}: text and the layers before them cost {least:.3f} of the dense prefill. Give "
            f"at least {least:.3f}, or earlier layers"
        )
    if flops_ratio > 1.0:
        raise ValueError(f"the budget {flops_ratio} is above 1, which is dense; expected a share of the dense FLOPs")


def one_at_least(stage: PruningStage, image_tokens: int) -> PruningStage:
    """What keeps a token of this many, however small its ratio, says so: of more tokens it is then the same share."""
    tiny = stage.keep_ratio is not None and 0 < stage.keep_ratio * image_tokens < 1
    return stage.keeping(1 / image_tokens) if tiny else stage


def _at_strength(stage: PruningStage, strength: float) -> PruningStage:
    if stage.waits or not isinstance(stage.keep, Ratio):
        how = "waits" if stage.waits else "keeps by attention mass"
        how = how if stage.keep_count is None else f"keeps a fixed count ({stage.keep_count})"
        raise ValueError(
            f"the stage at layer {stage.layer} {how}, which cannot follow a budget; give keep_ratio at one layer"
        )
    ratio = stage.keep.ratio
    return stage.keeping(1 - strength * (1 - ratio) if strength <= 1 else (2 - strength) * ratio)
