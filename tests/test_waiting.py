"""Stages that wait until a row's text has read its image: against the oracle in every kind of batch, and their cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import RAGGED, RAGGED_ANSWERS, make_case
from checks import STATES, assert_equals_naive, assert_same_kept, run
from cost_toys import LLAVA_7B
from decoding import LOGITS, STEPS, decode, naive_decode, random_tokens
from device_waits import tainted
from evaluation_toys import QUIET, Source, conversation
from gradient_checks import (
    CHECKPOINTING,
    NAMES,
    assert_same_gradients,
    batches,
    gradients,
    naive_gradients,
    trainable,
    with_leaves,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive_generate
from random_cases import QUICK, check, dialogues, models, prompts, seeds, sides
from tiny import tiny_llava, tiny_processor

from himap_train import Mass, PruningSchedule, PruningStage, install_pruning
from himap_train.evaluation.compare import compare
from himap_train.evaluation.tables import markdown_table
from himap_train.models.features import hidden_states
from himap_train.pruning.cost import schedule_cost
from himap_train.pruning.learned.ratios import KeepRatios

pytestmark = pytest.mark.core

TURNS = ("t2 i16 t4 a3 t5 i12 t3 a2", "t4 a2 t2 i16 t3 a4 t5 a2", "t1 i9 t2 a1 i7 i5 t3 a2", "t2 i16 t4 a3 t5 a2")


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
    model = tiny_llava(attn=attn)
    assert_equals_naive(model, SCHEDULES[name], make_case(model, RAGGED, "left", seed=1))
    assert_equals_naive(model, SCHEDULES[name], make_case(model, RAGGED_ANSWERS, "right", seed=2), labels=True)
    assert_equals_naive(model, SCHEDULES[name], make_case(model, TURNS), labels=True)


def test_rows_of_one_batch_act_at_layers_of_their_own_and_as_when_alone() -> None:
    model, rows = install_pruning(tiny_llava(), SCHEDULES["instruction"]), ["t3 i16 t4", "t1 i9 t3"] * 6
    case = make_case(model, rows, "left")
    states, kept = run(model, case)
    assert len(set(acts_at(kept, case.attention_mask.sum(1).tolist()))) > 2, "the point is that they differ"
    for b, spec in enumerate(rows):
        alone_states, alone_kept = run(model, make_case(model, [spec], seed=b))
        columns = case.columns(b)
        torch.testing.assert_close(states[b, columns], alone_states[0], **STATES)
        assert_same_kept([[stage[b]] for stage in kept], [[columns[stage[0]]] for stage in alone_kept])


def test_a_share_that_no_row_reaches_waits_for_the_last_layer_and_1_for_none() -> None:
    model, rows = tiny_llava(), ["t3 i16 t4"] * 4
    for below, stage in ((1e-6, 3), (1.0, 0)):
        plan = install_pruning(model, schedule(waits(1, 4, below, "instruction", 0.5)))
        assert acts_at(run(plan, make_case(model, rows))[1], [23] * 4) == [stage] * 4


@pytest.mark.parametrize("name", ["then image", "stride", "exit"])
def test_decoding_equals_the_oracle(name: str) -> None:
    model, plan = tiny_llava(), SCHEDULES[name]
    case, tokens = make_case(model, RAGGED, "left", seed=4), random_tokens(len(RAGGED))
    expected = naive_decode(model, plan, case, tokens)
    made = naive_generate(model, plan, case.naive(), STEPS)
    install_pruning(model, plan)
    found, _ = decode(model, case, tokens, chunk=2, give_positions=True)
    torch.testing.assert_close(found, expected, **LOGITS)
    answer = model.generate(**case.inputs(), max_new_tokens=STEPS, do_sample=False)
    assert torch.equal(answer[:, case.input_ids.shape[1] :], made)


@pytest.mark.parametrize("reentrant", CHECKPOINTING, ids=NAMES)
def test_gradients_equal_the_oracle(reentrant: bool | None) -> None:
    model, plan = trainable(reentrant), SCHEDULES["then image"]
    cases = batches(model)
    expected = naive_gradients(plan, cases)
    install_pruning(model, plan)
    for loss in [model(**with_leaves(case).inputs(labels=True)).loss for case in cases]:
        loss.backward()
    assert_same_gradients(gradients(model, cases), expected)


def test_one_transfer_for_each_layer_that_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for plan in (PruningSchedule(), SCHEDULES["then image"]):
        model = install_pruning(tiny_llava(), plan)
        case = make_case(model, ["t3 i16 t4 a2", "t1 i9 t2 a1", "t4 a3"])
        with tainted(model, [case.input_ids, case.attention_mask, case.labels, *case.features], monkeypatch) as mode:
            hidden_states(model, **case.inputs(True))
        found.append(mode.waits)
    assert found[0] == found[1] and mode.transfers == 1 + 2


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
