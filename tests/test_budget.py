"""A schedule at a budget: what it costs, what it keeps of the original, what it refuses."""

from __future__ import annotations

import pytest
from cost_toys import LLAVA_7B

from himap_train import PruningSchedule, PruningStage
from himap_train.pruning.budget import at_strength

HIMAP = PruningSchedule.from_preset("himap")


@pytest.mark.parametrize("budget", [0.25, 0.3, 0.45, 0.6, 0.8, 0.99])
def test_the_budget_is_met_and_ratios_never_grow(budget: float) -> None:
    schedule = HIMAP.at_budget(LLAVA_7B, budget)
    assert schedule.cost(LLAVA_7B).flops_ratio == pytest.approx(budget, rel=0.005)
    assert [(stage.layer, stage.criterion) for stage in schedule.stages] == [(2, "instruction"), (8, "image")]


def test_at_its_own_cost_a_schedule_is_itself() -> None:
    schedule = HIMAP.at_budget(LLAVA_7B, HIMAP.cost(LLAVA_7B).flops_ratio)
    assert schedule.cost(LLAVA_7B).image_tokens_per_layer == HIMAP.cost(LLAVA_7B).image_tokens_per_layer


def test_one_is_dense_and_strength_two_leaves_no_image_token() -> None:
    assert HIMAP.at_budget(LLAVA_7B, 1.0) == PruningSchedule()
    assert at_strength(HIMAP, 0.0) == PruningSchedule()
    assert [stage.keep_ratio for stage in at_strength(HIMAP, 2.0).stages] == [0.0, 0.0]


def test_an_impossible_budget_names_the_least() -> None:
    least = at_strength(HIMAP, 2.0).cost(LLAVA_7B).flops_ratio
    with pytest.raises(ValueError, match=f"at least {least:.3f}"):
        HIMAP.at_budget(LLAVA_7B, 0.1)
    with pytest.raises(ValueError, match="above 1"):
        HIMAP.at_budget(LLAVA_7B, 1.2)


def test_counts_and_empty_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="fixed count"):
        PruningSchedule((PruningStage(2, "image", keep_count=64),)).at_budget(LLAVA_7B, 0.5)
    with pytest.raises(ValueError, match="give stages"):
        PruningSchedule().at_budget(LLAVA_7B, 0.5)
