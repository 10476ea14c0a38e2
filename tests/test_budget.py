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


def test_one_token_is_said_as_its_share() -> None:
    one, none = (
        PruningSchedule((PruningStage(2, "image", keep_count=count),)).cost(LLAVA_7B).flops_ratio for count in (1, 0)
    )
    schedule = PruningSchedule((PruningStage(2, "image", 0.5),)).at_budget(LLAVA_7B, 0.8 * one + 0.2 * none)
    assert [stage.keep_ratio for stage in schedule.stages] == [1 / 576]


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


def test_what_lets_all_leave_does_so_at_every_budget_that_can_be_met_so() -> None:
    schedule = PruningSchedule((PruningStage(0, "divprune", 0.4), PruningStage(20, "uniform", 0.0)))
    most = PruningSchedule((PruningStage(20, "uniform", 0.0),)).cost(LLAVA_7B).flops_ratio
    for budget in (0.2, 0.3, 0.5, most - 0.01):
        at = schedule.at_budget(LLAVA_7B, budget)
        assert at.cost(LLAVA_7B).flops_ratio == pytest.approx(budget, rel=0.005)
        assert [stage.layer for stage in at.stages] == [0, 20] and at.stages[1].keep_ratio == 0.0
    above = schedule.at_budget(LLAVA_7B, (1 + most) / 2)
    assert above.cost(LLAVA_7B).flops_ratio == pytest.approx((1 + most) / 2, rel=0.005)
    assert [stage.layer for stage in above.stages] == [20]
    own = schedule.at_budget(LLAVA_7B, schedule.cost(LLAVA_7B).flops_ratio)
    assert [stage.keep_ratio for stage in own.stages] == [pytest.approx(0.4, abs=1 / 576), 0.0]


def test_tokens_that_enter_later_enter_there_at_every_budget() -> None:
    hidrop = PruningSchedule.from_preset("hidrop")
    most = PruningSchedule(enter=8).cost(LLAVA_7B).flops_ratio
    for budget in (0.25, 0.4, most - 0.01):
        at = hidrop.at_budget(LLAVA_7B, budget)
        assert at.enter == 8 and at.cost(LLAVA_7B).flops_ratio == pytest.approx(budget, rel=0.005)
    with pytest.raises(ValueError, match=rf"above {most:.3f}, .* enter at layer 8: give less, or 1 for dense"):
        hidrop.at_budget(LLAVA_7B, 0.9)
    assert hidrop.at_budget(LLAVA_7B, 1.0) == PruningSchedule()
