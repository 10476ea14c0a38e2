"""Stages that keep a share of the attention: against a naive sum in every kind of batch, training and decoding."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from cases import RAGGED, RAGGED_ANSWERS, TURNS, make_case
from checks import (
    assert_equals_naive,
    assert_ragged_equal_naive,
    assert_rows_equal_the_row_alone,
    assert_same_kept,
    run,
)
from decoding import assert_decodes_as_naive
from device_waits import forward_waits
from gradient_checks import CHECKPOINTING, NAMES, assert_gradients_equal_naive
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cases import QUICK, check, dialogues, models, prompts, seeds, sides
from tiny import tiny_llava
from torch import Tensor

from himap_train import AttentionMass, Mass, PruningSchedule, PruningStage, install_pruning, record_pruning
from himap_train.models.install import pruning_of
from himap_train.pruning.layout import TokenLayout, build_layout
from himap_train.pruning.ranks import image_ranks, select, tokens_for_mass
from himap_train.pruning.removal import plan_removals, settle_mass

pytestmark = pytest.mark.core

CRITERIA = ["instruction", "image", "image_debiased", "last_token"]


def by_mass(*stages: tuple[Any, ...], positions: str = "keep") -> PruningSchedule:
    """Stages as (layer, criterion, size): a tuple is (mass, at_least, at_most), a float a ratio, an int a count."""
    made = []
    for layer, criterion, size in stages:
        sizes = {tuple: "keep", float: "keep_ratio", int: "keep_count"}
        value = AttentionMass(*size) if isinstance(size, tuple) else size
        made.append(PruningStage(layer, criterion, **{sizes[type(size)]: value}))
    return PruningSchedule(tuple(made), positions)


SCHEDULES = {
    "alone": by_mass((2, "instruction", (0.7,))),
    "then ratio": by_mass((2, "instruction", (0.8, 0.1, 0.9)), (4, "image", 0.125)),
    "then mass": by_mass((2, "instruction", (0.9,)), (3, "last_token", (0.6, 0.1))),
    "after ratio": by_mass((1, "image", 0.6), (4, "instruction", (0.5, 0.0, 0.3))),
    "then stride": by_mass((2, "last_token", (0.9,)), (4, "stride", 0.25)),
    "then count": by_mass((1, "image_debiased", (0.6,)), (2, "image", 3)),
    "renumbered": by_mass((2, "instruction", (0.8,)), (4, "image", (0.5,)), positions="renumber"),
}


def numbers(kept: list[list[Tensor]]) -> list[list[int]]:
    return [[len(row) for row in stage] for stage in kept]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_the_oracle(name: str, attn: str) -> None:
    assert_ragged_equal_naive(tiny_llava(attn=attn), SCHEDULES[name])


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("text", ["mistral", "qwen2"])
def test_criteria_and_decoders_equal_the_oracle(text: str, criterion: str) -> None:
    model = tiny_llava(text)
    case = make_case(model, ["t3 i16 t4"] * 8, seed=3)
    kept = assert_equals_naive(model, by_mass((2, criterion, (0.8,))), case)
    assert len(set(numbers(kept)[0])) > 2, "the point is that samples of one size keep numbers of their own"


@pytest.mark.parametrize("labels", [False, True], ids=["prompt", "labels"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_equal_the_row_alone(side: str, labels: bool) -> None:
    model = install_pruning(tiny_llava("qwen2"), SCHEDULES["then mass"])
    rows = (*RAGGED_ANSWERS, *TURNS) if labels else RAGGED
    assert_rows_equal_the_row_alone(model, rows, side, labels)


def test_fewer_with_less_mass_and_bounds_bind() -> None:
    model, rows = tiny_llava(), ["t3 i16 t4"] * 8

    def kept(*keep: float) -> list[int]:
        plan = install_pruning(model, by_mass((2, "instruction", keep)))
        return [row - 7 for row in numbers(run(plan, make_case(model, rows))[1])[0]]

    free = kept(0.7)
    assert all(a <= b <= c for a, b, c in zip(kept(0.3), free, kept(0.95), strict=True))
    assert 1 <= min(free) < max(free) < 16
    middle = (min(free) + max(free)) // 2
    bound = middle / 16
    assert kept(0.7, bound) == [max(one, middle) for one in free]
    assert kept(0.7, 0.0, bound) == [min(one, middle) for one in free]
    assert kept(0.7, bound, bound) == [middle] * 8
    assert kept(1e-9) == [1] * 8 and kept(1e-9, 0.0, 0.001) == [1] * 8


def test_an_image_token_that_predicts_an_answer_stays_and_counts() -> None:
    model = tiny_llava()
    for spec, labels in (("t3 i16", False), ("t3 i16 a4", True), ("i16 a4", True)):
        kept = assert_equals_naive(model, by_mass((2, "instruction", (0.01,))), make_case(model, [spec]), labels)
        assert (2 if spec[0] == "t" else -1) + 16 in kept[0][0].tolist()


@pytest.mark.parametrize("name", ["then ratio", "then mass", "renumbered"])
def test_decoding_equals_the_oracle(name: str) -> None:
    assert_decodes_as_naive(SCHEDULES[name])


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("prompt", ["t3 i16 t5", "t2 i9 t3 i16 t2", "t4 i16"])
def test_teacher_forcing_keeps_what_generate_keeps(prompt: str, criterion: str) -> None:
    model = install_pruning(tiny_llava(), by_mass((2, criterion, (0.8,)), (4, criterion, (0.6,))))
    case = make_case(model, [prompt])
    length = case.input_ids.shape[1]
    with record_pruning(model) as trace:
        model.generate(**case.inputs(), max_new_tokens=3, do_sample=False)
    for answer in ("a1", "a30"):
        _, kept = run(model, make_case(model, [f"{prompt} {answer}"]), labels=True)
        assert_same_kept([[row[row < length] for row in stage] for stage in kept], trace.kept)


@pytest.mark.parametrize("reentrant", CHECKPOINTING, ids=NAMES)
@pytest.mark.parametrize("name", ["then ratio", "then mass"])
def test_gradients_equal_the_oracle(name: str, reentrant: bool | None) -> None:
    assert_gradients_equal_naive(SCHEDULES[name], reentrant)


def test_counts_of_each_row_and_a_batch_without_images() -> None:
    model = install_pruning(tiny_llava(), SCHEDULES["then mass"])
    case = make_case(model, RAGGED)
    _, kept = run(model, case)
    images = [[int((case.input_ids[b, row] == 4).sum()) for b, row in enumerate(stage)] for stage in kept]
    last = pruning_of(model).last
    assert [rows.tolist() for rows in last.kept_rows] == images
    assert last.image_rows.tolist() == [16, 0, 25, 7, 12] and last.image_tokens == 60
    assert last.kept == [sum(stage) for stage in images]
    run(model, make_case(model, ["t4", "t9"]))
    assert pruning_of(model).last.kept == [0, 0]


@pytest.mark.parametrize("labels", [False, True], ids=["prompt", "training"])
@pytest.mark.parametrize("name", ["alone", "then ratio", "then mass", "then stride"])
def test_one_more_transfer_for_each_mass_stage_and_no_other_wait(
    name: str, labels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, found = (forward_waits(plan, labels, monkeypatch) for plan in (PruningSchedule(), SCHEDULES[name]))
    assert found.waits == dense.waits
    assert found.transfers == 1 + sum(isinstance(stage.keep, Mass) for stage in SCHEDULES[name].stages)


def layout_of(groups: list[int], padding: int) -> tuple[TokenLayout, Any]:
    """A row of images of these sizes, an answer behind each, with padding on the left."""
    ids = "p" * padding + "".join("i" * size + "ta" for size in groups)
    image, text = (torch.tensor([[letter == kind for letter in ids]]) for kind in "ip")
    return build_layout(image, ~text, torch.tensor([[letter == "a" for letter in ids]]))


scores = st.lists(st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0, 3.0]) | st.floats(2**-20, 4.0, width=32), min_size=1)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(scores.filter(lambda s: len(s) <= 7), min_size=1, max_size=3), st.floats(0.01, 1.0), st.integers(0, 5))
def test_no_smaller_set_holds_the_mass(groups: list[list[float]], mass: float, padding: int) -> None:
    layout, counts = layout_of([len(group) for group in groups], padding)
    row = torch.full(layout.image.shape, 7.0)  # what is not an image token is not read
    row[layout.image] = torch.tensor([score for group in groups for score in group])
    stage = PruningStage(2, "instruction", keep=AttentionMass(mass))
    plan = settle_mass(plan_removals((stage,), counts), 2, row, layout)
    kept_counts = plan[2].after.current
    keep = select(image_ranks(row, layout, kept_counts.shape[1]), layout, kept_counts)
    for number, group in enumerate(groups):
        mine = layout.image[0] & (layout.group[0] == number)
        kept, wanted = row[0, mine & keep[0]].double().tolist(), mass * sum(group) * (1 - 1e-8)
        assert len(kept) == plan[2].after.current[0, number]
        assert sum(kept) >= wanted
        smaller = combinations(torch.tensor(group).double().tolist(), len(kept) - 1)
        assert len(kept) == 1 or not sum(group) or all(sum(some) < mass * sum(group) for some in smaller)
    assert bool(keep[0, layout.valid[0] & ~layout.image[0]].all())


def test_equal_scores_are_counted_as_a_ratio_would() -> None:
    layout, _ = layout_of([10], padding=3)
    for tenths in range(1, 11):
        assert tokens_for_mass(torch.full(layout.image.shape, 0.1), layout, tenths / 10, groups=1).item() == tenths


@st.composite
def mass_schedules(draw: st.DrawFn) -> PruningSchedule:
    """Up to three stages of four layers, each by mass or by ratio, in no order of sizes that would be refused."""
    layers = sorted(draw(st.sets(st.integers(1, 3), min_size=1)))
    sizes = st.sampled_from([(0.3,), (0.55,), (0.9, 0.2), (0.97,)])
    stages = [(layer, draw(st.sampled_from(CRITERIA)), draw(sizes)) for layer in layers]
    if draw(st.booleans()):
        stages[-1] = (layers[-1], draw(st.sampled_from(["image", "stride"])), 0.3)
    return by_mass(*stages, positions=draw(st.sampled_from(["keep", "renumber"])))


@settings(QUICK, max_examples=40)
@given(
    models,
    mass_schedules(),
    st.lists(prompts, min_size=1, max_size=4) | st.lists(dialogues, min_size=1, max_size=3),
    sides,
    seeds,
)
def test_any_batch_equals_the_oracle(model: Any, plan: PruningSchedule, rows: list[str], side: str, seed: int) -> None:
    check(model, plan, rows, side, seed)
