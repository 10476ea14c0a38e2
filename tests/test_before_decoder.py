"""Stages before the decoder and image tokens that enter late, against the naive masked decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import RAGGED, RAGGED_ANSWERS, make_case
from checks import assert_equals_naive
from decoding import LOGITS, STEPS, decode, naive_decode, random_tokens
from naive import naive_forward, naive_generate, naive_loss
from tiny import tiny_llava

from himap_train import PruningSchedule, PruningStage, install_pruning, load_llava, record_pruning
from himap_train.data.scene_questions import SceneQuestions
from himap_train.evaluation.evaluate import evaluate
from himap_train.models.versions import checkpoint_activations
from himap_train.pruning.learned.ratios import KeepRatios
from himap_train.pruning.reading import fit_preset, read_schedule

pytestmark = pytest.mark.core

FIRST = (PruningStage(0, "stride", 0.5),)
PLANS = {
    "stride": PruningSchedule(FIRST),
    "first-k": PruningSchedule((PruningStage(0, "first-k", 0.3),)),
    "divprune": PruningSchedule((PruningStage(0, "divprune", 0.3),)),
    "average-pool": PruningSchedule((PruningStage(0, "average-pool", 0.25),)),
    "coverage": PruningSchedule((PruningStage(0, "coverage", 0.3),)),
    "sparsevlm": PruningSchedule((PruningStage(2, {"name": "sparsevlm", "recycle": 0.8}, 0.4),)),
    "stratified": PruningSchedule((PruningStage(2, {"name": "image_stratified", "window": 2}, 0.4),)),
    "visionzip": PruningSchedule((PruningStage(0, {"name": "visionzip", "contextual": 0.4}, 0.5),)),
    "coverage, dart": PruningSchedule((PruningStage(0, "coverage", 0.7), PruningStage(2, "dart", 0.5))),
    "nothing left": PruningSchedule((PruningStage(0, "stride", 0.0),)),
    "then himap": PruningSchedule((*FIRST, PruningStage(1, "instruction", 0.3), PruningStage(3, "image", 0.1))),
    "renumber": PruningSchedule((*FIRST, PruningStage(2, "last_token", 0.2)), positions="renumber"),
    "enter": PruningSchedule(enter=2),
    "enter, filter, exit": PruningSchedule(
        (PruningStage(3, "last_token", 0.5), PruningStage(4, "image", 0.2), PruningStage(5, "stride", 0.0)), enter=2
    ),
    "enter filtered": PruningSchedule((PruningStage(2, "divprune", 0.5), PruningStage(3, "instruction", 0.2)), enter=2),
}


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest) -> PruningSchedule:
    return PLANS[request.param]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labels", [False, True], ids=["prompt", "labels"])
def test_ragged_batch_equals_the_oracle(plan: PruningSchedule, labels: bool, side: str) -> None:
    model = tiny_llava()
    assert_equals_naive(model, plan, make_case(model, RAGGED_ANSWERS if labels else RAGGED, side), labels)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_the_oracle(plan: PruningSchedule, checkpointing: bool) -> None:
    model, oracle = tiny_llava(), tiny_llava()
    case = make_case(model, RAGGED_ANSWERS, "right")
    expected = naive_forward(oracle, plan, **case.naive(labels=True))
    naive_loss(oracle, expected.hidden, case.labels).backward()
    install_pruning(model, plan)
    if checkpointing:
        checkpoint_activations(model.model.language_model)
        model.train()
    model(**case.inputs(labels=True)).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), oracle.parameters(), strict=True):
        if "language_model" in name or "lm_head" in name:
            assert ours.grad is not None and theirs.grad is not None, name
            error = (ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max()
            assert float(error) < 1e-3, f"{name}: {error}"


@pytest.mark.parametrize("give_positions", [False, True])
@pytest.mark.parametrize("chunk", [1, 3])
def test_token_by_token_equals_the_oracle(plan: PruningSchedule, chunk: int, give_positions: bool) -> None:
    model = tiny_llava()
    case = make_case(model, RAGGED if give_positions else ["t3 i16 t4"], "left")
    tokens = random_tokens(len(case.input_ids))
    expected = naive_decode(model, plan, case, tokens)
    found, _ = decode(install_pruning(model, plan), case, tokens, chunk, give_positions)
    torch.testing.assert_close(found, expected, **LOGITS)


def test_generate_equals_the_oracle_and_the_row_alone(plan: PruningSchedule) -> None:
    model = tiny_llava()
    case = make_case(model, RAGGED, "left")
    expected = naive_generate(model, plan, case.naive(), STEPS)
    install_pruning(model, plan)
    made = model.generate(**case.inputs(), max_new_tokens=STEPS, do_sample=False)
    assert torch.equal(made[:, case.input_ids.shape[1] :], expected)
    beams = model.generate(**case.inputs(), max_new_tokens=STEPS, do_sample=False, num_beams=3)
    for row, spec in enumerate(RAGGED):
        alone = make_case(model, [spec], "left")
        columns = case.columns(row)
        alone.input_ids = case.input_ids[row : row + 1, columns]
        before = sum(s.count("i") for s in RAGGED[:row])
        alone.features = case.features[before : before + spec.count("i")]
        alone.attention_mask = torch.ones_like(alone.input_ids)
        found = model.generate(**alone.inputs(), max_new_tokens=STEPS, do_sample=False, num_beams=3)
        assert torch.equal(found[0, len(columns) :], beams[row, case.input_ids.shape[1] :]), spec


def lengths(cache: Any) -> list[int]:
    return [layer.keys.shape[-2] for layer in cache.layers]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stride", [15] * 6),
        ("nothing left", [7] * 6),
        ("then himap", [15, 12, 12, 9, 9, 9]),
        ("enter", [7, 7, 23, 23, 23, 23]),
        ("enter, filter, exit", [7, 7, 23, 15, 10, 7]),
        ("enter filtered", [7, 7, 15, 10, 10, 10]),
    ],
)
def test_cache_lengths_in_every_layer_and_positions_of_the_whole_prompt(name: str, expected: list[int]) -> None:
    model = install_pruning(tiny_llava(), PLANS[name])
    case = make_case(model, ["t3 i16 t4"])
    with torch.no_grad():
        cache = model(**case.inputs(), use_cache=True).past_key_values
    assert lengths(cache) == expected
    assert cache.get_seq_length() == 23  # what generation counts on from
    made = model.generate(**case.inputs(), max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True)
    assert lengths(made.past_key_values) == [n + STEPS - 1 for n in expected]
    assert made.past_key_values.get_seq_length() == 23 + STEPS - 1


def test_removed_tokens_are_in_no_layer() -> None:
    """Every layer runs on 8 image tokens of 16, and the kept columns are those of the batch."""
    model = install_pruning(tiny_llava(), PLANS["stride"])
    seen: list[int] = []
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    case = make_case(model, ["t3 i16 t4"])
    with torch.no_grad(), record_pruning(model) as trace:
        model(**case.inputs())
    assert seen == [15] * 6
    assert trace.kept[0][0].tolist() == [0, 1, 2, *range(4, 19, 2), *range(19, 23)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"enter": 9}, "image tokens enter at layer 9, but the decoder has layers 0 to 5"),
        ({"enter": -1}, "enter is -1; expected a layer"),
        (
            {"enter": 3, "stages": [{"layer": 2, "criterion": "stride", "keep_ratio": 0.5}]},
            "behind the stage at layer 2",
        ),
        ({"enter": 3, "stages": [{"layer": 3, "criterion": "image", "keep_ratio": 0.5}]}, "no image tokens yet"),
        ({"enter": 3, "positions": "renumber"}, "give positions 'keep'"),
        ({"entre": 3}, "unknown key 'entre'; did you mean 'enter'"),
    ],
)
def test_impossible_entries_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        install_pruning(tiny_llava(), PruningSchedule.from_dict(given))


def test_written_scaled_and_priced() -> None:
    plan = PLANS["enter, filter, exit"]
    assert PruningSchedule.from_dict(plan.to_dict()) == plan and plan.to_dict()["enter"] == 2
    assert "enter" not in PLANS["stride"].to_dict()
    published = PruningSchedule((PruningStage(10, "last_token", 0.37), PruningStage(24, "stride", 0.0)), enter=8)
    scaled = published.scaled_to(8)
    assert (scaled.enter, [stage.layer for stage in scaled.stages]) == (2, [3, 6])
    assert PruningSchedule(FIRST).scaled_to(4) == PruningSchedule(FIRST)
    assert fit_preset(read_schedule("divprune"), 8).stages[0].layer == 0
    config = tiny_llava().config
    assert plan.cost(config, 16, 7).image_tokens_per_layer == (0, 0, 16, 8, 3, 0)
    half = PruningSchedule(FIRST).at_budget(config, 0.6, 100, 20)
    assert half.stages[0].layer == 0 and abs(half.cost(config, 100, 20).flops_ratio - 0.6) < 0.02
    assert plan.at_budget(config, 0.5).enter == 2
    with pytest.raises(ValueError, match="above .*what all image tokens cost that enter at layer 2"):
        plan.at_budget(config, 0.99)


def test_learned_ratios_say_that_they_need_a_layer_before() -> None:
    config = tiny_llava().config
    with pytest.raises(ValueError, match="first_layer is 0; expected a layer of the decoder, 1 to 5.*layer before"):
        KeepRatios(config, 0.5, first_layer=0, switch_layer=2)
    with pytest.raises(ValueError, match="chooses a set"):
        KeepRatios(config, 0.5, first_layer=1, switch_layer=2, shallow="divprune")


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "expected"), [(27, 87.1), (40, 88.1), (54, 89.9)])
def test_an_even_choice_before_the_decoder_gives_the_figures_that_were_measured(tokens: int, expected: float) -> None:
    """`embedded:test?scenes=700&seed=11`, training-free, positions kept; standard error 1.2."""
    model, processor = load_llava("embedded")
    install_pruning(model, PruningSchedule((PruningStage(0, "stride", keep_count=tokens),)))
    result = evaluate(model, processor, SceneQuestions("test", scenes=700, seed=11), batch_size=64, progress=False)
    assert abs(100 * result.overall.score - expected) < 1.5
