"""Stages that wait until a row's text has read its image: against the oracle in every kind of batch, and their cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import make_case
from checks import assert_ragged_equal_naive, assert_rows_equal_the_row_alone, run
from cost_toys import LLAVA_7B
from decoding import assert_decodes_as_naive
from device_waits import forward_waits
from evaluation_toys import QUIET, Source, conversation
from gradient_checks import CHECKPOINTING, NAMES, assert_gradients_equal_naive
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cases import QUICK, check, dialogues, models, prompts, seeds, sides
from tiny import tiny_llava, tiny_processor

from himap_train import Mass, PruningSchedule, PruningStage, install_pruning
from himap_train.evaluation.compare import compare
from himap_train.evaluation.tables import markdown_table
from himap_train.pruning.cost import schedule_cost
from himap_train.pruning.learned.ratios import KeepRatios

pytestmark = pytest.mark.core


def schedule(*stages: dict[str, Any], positions: str = "keep") -> PruningSchedule:
    return PruningSchedule.from_dict({"stages": list(stages), "positions": positions})


def waits(first: int, last: int, below: float, criterion: str, keep: float) -> dict[str, Any]:
    layers = {"first": first, "last": last, "attention_below": below}
    return {"layer": layers, "criterion": criterion, "keep_ratio": keep}


IMAGE = {"layer": 4, "criterion": "image", "keep_ratio": 0.125}
SCHEDULES = {
    "instruction": schedule(waits(1, 4, 0.72, "instruction", 0.5)),
    "then image": schedule(waits(1, 3, 0.72, "image", 0.5), IMAGE),
    "after ratio": schedule({**IMAGE, "layer": 1, "keep_ratio": 0.7}, waits(2, 5, 0.6, "last_token", 0.25)),
    "exit": schedule(waits(1, 5, 0.72, "stride", 0.0)),
    "stride": schedule(waits(1, 3, 0.72, "stride", 0.3), IMAGE, positions="renumber"),
    "divprune": schedule(waits(1, 4, 0.72, "divprune", 0.4)),
    "average-pool": schedule(waits(1, 4, 0.72, "average-pool", 0.25)),
    "sparsevlm": schedule(waits(1, 4, 0.72, "sparsevlm", 0.3)),
}


def acts_at(kept: list[list[torch.Tensor]], lengths: list[int]) -> list[int]:
    """At which of its stages each row lost tokens first."""
    stages = [[len(row) for row in stage] for stage in kept]
    return [next(number for number, stage in enumerate(stages) if stage[b] < lengths[b]) for b in range(len(lengths))]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_the_oracle(name: str, attn: str) -> None:
    assert_ragged_equal_naive(tiny_llava(attn=attn), SCHEDULES[name])


def test_rows_of_one_batch_act_at_layers_of_their_own_and_as_when_alone() -> None:
    model, rows = install_pruning(tiny_llava(), SCHEDULES["instruction"]), ["t3 i16 t4", "t1 i9 t3"] * 6
    case, kept = assert_rows_equal_the_row_alone(model, rows, "left")
    assert len(set(acts_at(kept, case.attention_mask.sum(1).tolist()))) > 2, "the point is that they differ"


def test_a_share_that_no_row_reaches_waits_for_the_last_layer_and_1_for_none() -> None:
    model, rows = tiny_llava(), ["t3 i16 t4"] * 4
    for below, stage in ((1e-6, 3), (1.0, 0)):
        plan = install_pruning(model, schedule(waits(1, 4, below, "instruction", 0.5)))
        assert acts_at(run(plan, make_case(model, rows))[1], [23] * 4) == [stage] * 4


@pytest.mark.parametrize("name", ["then image", "stride", "exit"])
def test_decoding_equals_the_oracle(name: str) -> None:
    assert_decodes_as_naive(SCHEDULES[name])


@pytest.mark.parametrize("reentrant", CHECKPOINTING, ids=NAMES)
def test_gradients_equal_the_oracle(reentrant: bool | None) -> None:
    assert_gradients_equal_naive(SCHEDULES["then image"], reentrant)


def test_one_transfer_for_each_layer_that_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, found = (forward_waits(plan, True, monkeypatch) for plan in (PruningSchedule(), SCHEDULES["then image"]))
    assert found.waits == dense.waits and found.transfers == 1 + 2


@st.composite
def any_waiting(draw: st.DrawFn) -> PruningSchedule:
    """A range of the three layers behind the first, and what may follow it."""
    first, last = sorted(draw(st.lists(st.integers(1, 3), min_size=2, max_size=2, unique=True)))
    stage = waits(first, last, draw(st.sampled_from([0.3, 0.5, 0.7])), draw(st.sampled_from(["image", "stride"])), 0.5)
    behind = [{**IMAGE, "layer": 3}] if last < 3 and draw(st.booleans()) else []
    return schedule(stage, *behind, positions=draw(st.sampled_from(["keep", "renumber"])))


@settings(QUICK, max_examples=40)
@given(models, any_waiting(), st.lists(prompts, min_size=1, max_size=4) | st.lists(dialogues, max_size=3), sides, seeds)
def test_any_batch_equals_the_oracle(model: Any, plan: PruningSchedule, rows: list[str], side: str, seed: int) -> None:
    check(model, plan, rows or ["t2 i4 t1"], side, seed)


def test_a_range_is_written_out_and_fits_other_decoders() -> None:
    found = schedule(waits(2, 16, 0.4, "instruction", 0.5), {**IMAGE, "layer": 20})
    assert [stage.attention_below for stage in found.stages] == [0.4] * 14 + [None, None]
    assert [stage.layer for stage in found.stages] == [*range(2, 17), 20]
    assert PruningSchedule.from_dict(found.to_dict()) == found
    scaled = found.scaled_to(8)
    assert [(stage.layer, stage.waits) for stage in scaled.stages] == [
        (1, True), (2, True), (3, True), (4, False), (5, False)
    ]  # fmt: skip
    assert schedule(waits(2, 6, 0.4, "instruction", 0.5)).scaled_to(16).stages[-1].layer == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"last": 2}, "stages.0..layer is .*two layers by rising depth"),
        ({"last": 10**9}, "two layers by rising depth"),
        ({"last": "4"}, "two layers by rising depth"),
        ({"lsat": 4}, "did you mean 'last'"),
        ({"attention_below": None}, "and a share"),
        ({"attention_below": 1.5}, "attention_below is 1.5 .* up to 1"),
        ({"attention_below": "half"}, "attention_below is 'half'"),
        ({"first": 0}, "a layer of 1 or more"),
    ],
)
def test_a_bad_range_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    stage = waits(2, 4, 0.4, "instruction", 0.5)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        schedule({**stage, "layer": {**stage["layer"], **changes}})


def test_what_does_not_go_with_waiting() -> None:
    with pytest.raises(ValueError, match="with keep_ratio or keep_count"):
        PruningStage(2, "instruction", keep=Mass(0.5), attention_below=0.3)
    with pytest.raises(ValueError, match="no 'last'"):
        schedule({**waits(2, 4, 0.4, "instruction", 0.5), "layer": {"first": 2}})


def test_cost_is_that_of_the_last_layer_or_of_what_was_kept() -> None:
    plan = schedule(waits(2, 4, 0.4, "uniform", 0.5))
    late, early = (PruningSchedule((PruningStage(layer, "uniform", 0.5),)).cost(LLAVA_7B) for layer in (4, 2))
    bound = plan.cost(LLAVA_7B)
    assert bound.upper_bound and bound.image_tokens_per_layer == late.image_tokens_per_layer
    looking = 2 * (2 * 115 * (576 + 115) * 4096)  # the logits of the text's rows, at two layers
    assert bound.flops == pytest.approx(late.flops + looking)
    measured = schedule_cost(plan, LLAVA_7B, kept=(288, 288, 288))
    assert not measured.upper_bound and measured.kv_bytes == early.kv_bytes
    for refused in (lambda: plan.at_budget(LLAVA_7B, 0.5), lambda: KeepRatios(LLAVA_7B, 0.5, 1, 8, start=plan)):
        with pytest.raises(ValueError, match="waits"):
            refused()


def test_an_evaluation_reports_what_each_sample_kept() -> None:
    model, plan = tiny_llava(), schedule(waits(1, 4, 0.4, "instruction", 0.25))
    photos = Source(conversation(number, f"what {'is this ' * (number % 3)}?") for number in range(8))
    row = compare(model, tiny_processor(), photos, {"waiting": plan}, **QUIET)[0]
    assert row.result.kept[-1] == 4 and max(row.result.kept_sd) > 0
    assert row.result.flops_ratio.mean < row.cost.flops_ratio
    assert "±" in markdown_table([row]).splitlines()[2].split("|")[-4]
