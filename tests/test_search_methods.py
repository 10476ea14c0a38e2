"""The methods find what is planted, keep to their allowance, try nothing twice and do the same again."""

from __future__ import annotations

import statistics

import pytest
from transformers import LlamaConfig, LlavaConfig

from himap_train import PruningSchedule
from himap_train.search.proposals import search, search_budget
from himap_train.search.space import Space
from himap_train.search.trials import Trials

TEXT = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=12, num_attention_heads=4)
SPACE = Space(LlavaConfig(text_config=TEXT), 0.45, image_tokens=144, text_tokens=15)
FLOW = (1.0,) * 12


def planted(layers: tuple[int, ...], splits: tuple[float, ...], space: Space = SPACE):
    """A loss without noise that is lowest at one point: distance of the image tokens of every layer, and criteria."""
    target = space.schedule(space.point(layers, splits))
    counts = space.layer_counts(target)

    def loss(schedule: PruningSchedule) -> float:
        distance = sum(abs(a - b) for a, b in zip(space.layer_counts(schedule), counts, strict=True)) / 144
        wrong = {(s.layer, s.criterion) for s in schedule.stages} ^ {(s.layer, s.criterion) for s in target.stages}
        return distance + 0.02 * len(wrong)

    return loss, target


@pytest.mark.parametrize("optimum", [((2, 7), (0.25,)), ((1, 4), (0.0,)), ((3, 3), (0.5,))])
def test_a_planted_optimum_is_found(optimum: tuple) -> None:
    loss, target = planted(*optimum)
    trials = Trials(SPACE, loss, limit=50)
    search("coordinate", trials, starts=[])
    assert trials.best.loss == 0.0, f"{trials.best} for {target}"
    assert statistics.median(trial.loss for trial in trials.done) > 1.0


def test_free_criteria_are_searched() -> None:
    free = Space(LlavaConfig(text_config=TEXT), 0.45, 144, 15, criteria=["instruction", "image"], free_criteria=True)
    target = free.schedule(free.point((2, 6), (0.25,), ("image", "instruction")))

    def loss(schedule: PruningSchedule) -> float:
        pairs = zip(schedule.stages, target.stages, strict=False)
        return 2.0 - sum(a.criterion == b.criterion for a, b in pairs)

    trials = Trials(free, loss, limit=20)
    search("coordinate", trials, [free.point((2, 6), (0.25,))])
    assert [stage.criterion for stage in trials.best.schedule.stages] == ["image", "instruction"]


def test_the_trials_are_always_the_same_and_none_twice() -> None:
    loss, _ = planted((2, 7), (0.25,))
    runs = []
    for _ in range(2):
        calls: list[PruningSchedule] = []
        trials = Trials(SPACE, lambda schedule: calls.append(schedule) or loss(schedule), limit=25)  # noqa: B023
        search("coordinate", trials, [SPACE.point((1, 3), (0.5,))])
        assert [trial.schedule for trial in trials.done] == calls
        assert len(set(calls)) == len(calls) == 25
        assert all(SPACE.meets_budget(schedule) for schedule in calls)
        runs.append(calls)
    assert runs[0] == runs[1]


def test_flow_tries_its_suggestion_alone() -> None:
    loss, _ = planted((2, 7), (0.25,))
    found = search_budget(SPACE, loss, "flow", 60, FLOW)
    assert len(found.done) == 1
    assert found.best.origin == "start"
    schedule, its_loss = found.baseline
    assert its_loss == loss(schedule)


def test_a_search_is_never_worse_than_the_preset() -> None:
    preset = search_budget(SPACE, lambda schedule: 0.0, "flow", 1, FLOW).baseline[0]
    counts = SPACE.layer_counts(preset)

    def loss(schedule: PruningSchedule) -> float:
        return sum(abs(a - b) > 1 for a, b in zip(SPACE.layer_counts(schedule), counts, strict=True))

    assert search_budget(SPACE, loss, "coordinate", 3, FLOW).best.loss == 0


def test_ctrl_c_keeps_the_trials_that_are_done() -> None:
    calls = []

    def loss(schedule: PruningSchedule) -> float:
        calls.append(schedule)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return float(len(calls))

    trials = Trials(SPACE, loss, limit=20)
    search("coordinate", trials, [])
    assert trials.interrupted
    assert [trial.loss for trial in trials.done] == [1.0, 2.0, 3.0]


def test_ctrl_c_before_the_first_trial_goes_through() -> None:
    def loss(schedule: PruningSchedule) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search("coordinate", Trials(SPACE, loss, limit=20), [])


def test_a_budget_between_whole_tokens_is_refused() -> None:
    coarse = Space(LlavaConfig(text_config=TEXT), 0.6, image_tokens=3, text_tokens=1, stages=1)
    with pytest.raises(ValueError, match="only 3 image tokens"):
        search("coordinate", Trials(coarse, lambda schedule: 0.0, limit=5), [])
