"""The pruned decoder against the naive masked decoder: which tokens stay, and what the states are."""

from __future__ import annotations

import pytest
import torch
from cases import RAGGED, RAGGED_ANSWERS, make_case
from checks import STATES, assert_equals_naive, assert_rows_equal_the_row_alone, assert_same_kept, run, two_stages
from naive import naive_forward
from tiny import tiny_llava
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from himap_train import PruningSchedule, PruningStage, install_pruning

pytestmark = pytest.mark.core


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_without_stages_the_oracle_is_the_stock_model(text: str, attn: str) -> None:
    model = tiny_llava(text, attn=attn)
    for side in ("left", "right"):
        case = make_case(model, RAGGED, side)
        with torch.no_grad():
            stock = model.model(**case.inputs()).last_hidden_state
            naive = naive_forward(model, PruningSchedule(), **case.naive()).hidden
        mask = case.attention_mask.bool()
        torch.testing.assert_close(naive[mask], stock[mask], **STATES)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labels", [False, True], ids=["prompt", "labels"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
def test_ragged_batch_equals_the_oracle(text: str, attn: str, labels: bool, side: str) -> None:
    model = tiny_llava(text, attn=attn)
    case = make_case(model, RAGGED_ANSWERS if labels else RAGGED, side)
    kept = assert_equals_naive(model, two_stages(), case, labels)
    images = [[int((case.input_ids[b, row] == 4).sum()) for b, row in enumerate(stage)] for stage in kept]
    assert images == [[8, 0, 13, 4, 6], [2, 0, 3, 1, 2]]  # half up of 16, 0, 25, 7, 12


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("criterion", ["instruction", "image", "image_debiased", "last_token", "stride"])
def test_every_criterion_equals_the_oracle(criterion: str, positions: str) -> None:
    model = tiny_llava()
    for labels, side in ((False, "left"), (True, "right")):
        case = make_case(model, RAGGED_ANSWERS if labels else RAGGED, side, seed=3)
        assert_equals_naive(model, two_stages(criterion, criterion, positions), case, labels)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_random_keeps_its_count_and_the_states_follow(positions: str) -> None:
    model = tiny_llava()
    case, plan = make_case(model, RAGGED, "left"), two_stages("random", "random", positions)
    install_pruning(model, plan)
    drawn = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        states, kept = run(model, case)
        drawn.append(kept[1][2].tolist())
    assert drawn[0] == drawn[2] != drawn[1]
    images = [[int((case.input_ids[b, row] == 4).sum()) for b, row in enumerate(stage)] for stage in kept]
    assert images == [[8, 0, 13, 4, 6], [2, 0, 3, 1, 2]]
    with torch.no_grad():
        expected = naive_forward(model, plan, **case.naive(), kept=kept)
    assert_same_kept(kept, expected.kept)
    for row in range(len(RAGGED)):
        columns = case.columns(row)
        torch.testing.assert_close(states[row, columns], expected.hidden[row, columns], **STATES)


@pytest.mark.parametrize(
    "stages",
    [
        (
            (1, "instruction", {"keep_ratio": 0.9}),
            (2, "last_token", {"keep_ratio": 0.6}),
            (3, "image", {"keep_ratio": 0.3}),
        ),
        ((3, "image", {"keep_ratio": 0.01}),),
        ((5, "instruction", {"keep_count": 10}),),
        ((2, "stride", {"keep_ratio": 0.0}),),
        ((1, "image_debiased", {"keep_count": 14}), (4, "instruction", {"keep_count": 5})),
        (
            (2, "instruction", {"keep_ratio": 1.0}),
            (3, "image", {"keep_ratio": 0.5}),
            (5, "stride", {"keep_ratio": 0.0}),
        ),
    ],
    ids=["three-in-a-row", "at-least-one", "count-above-some-rows", "all-leave", "counts", "ratio-1-then-0"],
)
def test_schedules_equal_the_oracle(stages: tuple[tuple[int, str, dict[str, float]], ...]) -> None:
    model = tiny_llava()
    plan = PruningSchedule(stages=tuple(PruningStage(layer=at, criterion=how, **size) for at, how, size in stages))
    assert_equals_naive(model, plan, make_case(model, RAGGED, "left", seed=1))
    assert_equals_naive(model, plan, make_case(model, RAGGED_ANSWERS, "right", seed=2), labels=True)


@pytest.mark.parametrize("criterion", ["instruction", "image", "stride"])
@pytest.mark.parametrize("labels", [False, True], ids=["prompt", "labels"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_equal_the_row_alone(side: str, labels: bool, criterion: str) -> None:
    model = tiny_llava("qwen2")
    rows = RAGGED_ANSWERS if labels else RAGGED
    install_pruning(model, two_stages(criterion, criterion))
    assert_rows_equal_the_row_alone(model, rows, side, labels)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_without_images_is_the_stock_model(side: str) -> None:
    model = tiny_llava()
    case = make_case(model, ["t9", "t4", "t6"], side)
    with torch.no_grad():
        stock = model.model(**case.inputs()).last_hidden_state
    states, kept = run(install_pruning(model, two_stages()), case)
    mask = case.attention_mask.bool()
    torch.testing.assert_close(states[mask], stock[mask], **STATES)
    assert_same_kept(kept, [[case.columns(b) for b in range(3)]] * 2)


@pytest.mark.parametrize("kv_heads", [16, 4, 1])
def test_many_heads_of_their_own_width(kv_heads: int) -> None:
    """More heads than are scored at once, and a head width that is not hidden size / heads."""
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=16,
        num_key_value_heads=kv_heads, head_dim=6, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=4)
    model = LlavaForConditionalGeneration(config).eval()
    assert_equals_naive(model, two_stages(), make_case(model, RAGGED, "left"))


def test_a_mask_of_ones_may_be_left_out() -> None:
    model = install_pruning(tiny_llava(), two_stages())
    inputs = make_case(model, ["t3 i16 t4", "t1 i16 t6"]).inputs()
    with torch.no_grad():
        given = model(**inputs).logits
        del inputs["attention_mask"]
        assert torch.equal(model(**inputs).logits, given)
