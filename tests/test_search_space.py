"""Candidates of a search: all at the budget, degenerate ones among them; what cannot be searched is refused."""

from __future__ import annotations

import itertools

import pytest
from cost_toys import LLAVA_7B
from transformers import LlamaConfig, LlavaConfig

from himap_train.search.flow import handed_over, kept_flow, suggest
from himap_train.search.proposals import _spread, preset_at_budget, starting_points
from himap_train.search.space import Space

TEXT = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4)
CONFIG = LlavaConfig(text_config=TEXT)


def space(budget: float = 0.4, **options: object) -> Space:
    return Space(CONFIG, budget, image_tokens=144, text_tokens=15, **options)


@pytest.mark.parametrize("budget", [0.25, 0.4, 0.6, 0.9])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_every_candidate_meets_the_budget(budget: float, stages: int) -> None:
    searched, seen = space(budget, stages=stages), set()
    for point in itertools.islice(_spread(searched), 40):
        schedule = searched.schedule(point)
        if schedule is None:
            continue
        seen.add(schedule)
        assert schedule.cost(CONFIG, 144, 15).flops_ratio == pytest.approx(budget, rel=0.01)
        counts = schedule.cost(CONFIG, 144, 15).image_tokens_per_layer
        assert all(counts[stage.layer] < counts[stage.layer - 1] for stage in schedule.stages), "a stage does nothing"
        assert all(round(stage.keep_ratio * 144) == counts[stage.layer] for stage in schedule.stages)
    assert len(seen) >= 8 if stages > 1 else len(seen) >= searched.deepest_first


def test_degenerate_shapes_are_candidates() -> None:
    searched = space()
    alone = searched.schedule(searched.point((1, 4), (1.0,)))
    assert [(s.layer, s.criterion) for s in alone.stages] == [(1, "instruction")]
    everything = searched.schedule(searched.point((4, 1), (0.0,)))
    assert [(s.layer, s.criterion) for s in everything.stages] == [(1, "instruction"), (4, "image")]
    assert everything.stages[1].keep_ratio == 0
    deep = searched.schedule(searched.point((1, 1), (0.5,)))
    assert [(s.layer, s.criterion) for s in deep.stages] == [(1, "image")]
    assert searched.schedule(searched.point((1, 2), (0.01,))).stages[0].keep_ratio < 1


def test_a_first_layer_too_deep_for_the_budget_is_no_candidate() -> None:
    searched = space(0.4)
    assert searched.deepest_first == 2
    assert searched.schedule(searched.point((3, 5), (0.5,))) is None
    assert searched.schedule(searched.point((2, 5), (0.5,))) is not None


def test_coarse_counts_that_miss_the_budget_are_no_candidates() -> None:
    coarse = Space(CONFIG, 0.5, image_tokens=4, text_tokens=2, stages=1)
    assert coarse.schedule(coarse.point((1,), ())) is None


def test_free_criteria() -> None:
    searched = space(criteria=["image", "random"], free_criteria=True)
    assert [s.criterion for s in searched.schedule(searched.point((1, 3), (0.3,))).stages] == ["image", "image"]
    criteria = {point.criteria for point in itertools.islice(_spread(searched), 60)}
    assert criteria == set(itertools.product(["image", "random"], repeat=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.05}, "Give at least"),
        ({"budget": 1.3}, "above 1"),
        ({"budget": 1.0}, "dense"),
        ({"criteria": ["instruction", "imagee"]}, "did you mean 'image'"),
        ({"criteria": ["image"]}, "1 criteria .image. for 2 stages"),
        ({"stages": 8}, "give 1 to 7"),
        ({"stages": 0}, "give 1 to 7"),
    ],
)
def test_what_cannot_be_searched_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        space(**options)


def test_layers_from_the_flow() -> None:
    early = (0.1, 0.1, 0.3, 0.1, 0.4, 0.0, 0.0, 0.0)
    assert (handed_over(early), handed_over(early, 0.1), handed_over(early, 0.4)) == (5, 1, 3)
    assert suggest(early, space()).layers == (1, 5), "all that is left leaves where nothing flows any more"
    assert suggest(early, space(stages=3)).layers == (1, 5, 5)
    assert [stage.layer for stage in space(stages=3).schedule(suggest(early, space(stages=3))).stages] == [1, 5]
    at_once = (0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert suggest(at_once, space(0.4)).layers == (1, 3), "an earlier cut leaves more at layer 2"
    late = (0.0,) * 7 + (1.0,)
    alone = space(0.4).schedule(suggest(late, space(0.4)))
    assert [(s.layer, s.criterion) for s in alone.stages] == [(1, "instruction")], "what flows last needs tokens there"
    assert suggest(early, space(stages=1)).layers == (1,)


def test_no_other_candidate_keeps_more_of_the_flow() -> None:
    searched, flow = space(0.5), (0.06, 0.03, 0.17, 0.04, 0.22, 0.02, 0.04, 0.01)
    schedule = searched.schedule(suggest(flow, searched))
    most = kept_flow(flow, searched, schedule)
    counts = schedule.cost(CONFIG, 144, 15).image_tokens_per_layer
    by_hand = sum(given * (count / 144) ** 0.5 for given, count in zip(flow, counts, strict=True)) / 0.59
    assert most == pytest.approx(by_hand)
    tried = [searched.schedule(searched.point((first, last), (split,)))
             for first in range(1, 7) for last in range(first + 1, 8) for split in (0.0, 0.25, 0.5, 1.0)]  # fmt: skip
    others = [kept_flow(flow, searched, one) for one in tried if one is not None]
    assert len(others) > 20
    assert max(others) <= most + 0.01  # whole tokens


def test_the_search_starts_from_the_preset_at_the_budget() -> None:
    searched = Space(LLAVA_7B, 0.45, image_tokens=576, text_tokens=115)
    preset = preset_at_budget(searched)
    start = starting_points(searched, (1.0,) * 32, preset)[-1]
    ours, theirs = (one.cost(LLAVA_7B).image_tokens_per_layer for one in (searched.schedule(start), preset))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1
    assert preset_at_budget(Space(LLAVA_7B, 0.2, image_tokens=576, text_tokens=115)) is None


def test_layers_before_the_decoder_are_candidates_for_criteria_that_read_nothing_there() -> None:
    searched = space(0.25, criteria=("instruction", "stride", "divprune"), free_criteria=True)
    assert searched.earliest == 0 and space().earliest == 1
    first = searched.schedule(searched.point((0, 4), (0.5,), ("stride", "instruction")))
    assert first is not None and [(s.layer, s.criterion) for s in first.stages] == [(0, "stride"), (4, "instruction")]
    assert first.cost(CONFIG, 144, 15).flops_ratio == pytest.approx(0.25, rel=0.01)
    assert searched.schedule(searched.point((0, 4), (0.5,), ("instruction", "stride"))) is None
    assert searched.schedule(searched.point((0, 0), (0.5,), ("divprune", "instruction"))) is None
    found = [searched.schedule(point) for point in itertools.islice(_spread(searched), 60)]
    assert {schedule.stages[0].layer for schedule in found if schedule is not None} == {0, 1}
    with pytest.raises(ValueError, match="first of them 0"):
        space(0.01, criteria=("stride", "stride"))
