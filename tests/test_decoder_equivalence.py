"""The pruned decoder against the naive masked decoder: which tokens stay, and what the states are."""

from __future__ import annotations

import pytest
import torch
from cases import RAGGED, RAGGED_ANSWERS, Case, make_case
from naive import naive_forward, naive_loss
from peft import LoraConfig, get_peft_model
from tiny import tiny_llava
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration

from himap_train import PruningSchedule, PruningStage, install_pruning, record_pruning, remove_pruning
from himap_train.models.llava import hidden_states, pruning_of

STATES = {"atol": 1e-4, "rtol": 1e-4}  # fp32, six layers, two orders of summation
LAYERS = 6


def schedule(criterion: str = "instruction", second: str = "image", positions: str = "keep") -> PruningSchedule:
    stages = (
        PruningStage(layer=2, criterion=criterion, keep_ratio=0.5),
        PruningStage(layer=4, criterion=second, keep_ratio=0.125),
    )
    return PruningSchedule(stages=stages, positions=positions)


def run(model: LlavaForConditionalGeneration, case: Case, labels: bool = False) -> tuple[Tensor, list[list[Tensor]]]:
    with torch.no_grad(), record_pruning(model) as trace:
        states = hidden_states(model, **case.inputs(labels))
    return states, trace.kept


def assert_same_kept(found: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    assert [[row.tolist() for row in stage] for stage in found] == [
        [row.tolist() for row in stage] for stage in expected
    ]


def assert_equals_naive(
    model: LlavaForConditionalGeneration, plan: PruningSchedule, case: Case, labels: bool = False
) -> list[list[Tensor]]:
    with torch.no_grad():
        expected = naive_forward(model, plan, **case.naive(labels))
    states, kept = run(install_pruning(model, plan), case, labels)
    assert_same_kept(kept, expected.kept)
    for row in range(len(states)):
        columns = case.columns(row)
        torch.testing.assert_close(states[row, columns], expected.hidden[row, columns], **STATES)
        dropped = [c for c in columns.tolist() if c not in kept[-1][row].tolist()] if kept else []
        assert not states[row, dropped].any(), f"row {row}: dropped columns are not zero"
    return kept


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
    kept = assert_equals_naive(model, schedule(), case, labels)
    images = [[int((case.input_ids[b, row] == 4).sum()) for b, row in enumerate(stage)] for stage in kept]
    assert images == [[8, 0, 13, 4, 6], [2, 0, 3, 1, 2]]  # half up of 16, 0, 25, 7, 12


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("criterion", ["instruction", "image", "image_debiased", "last_token", "uniform"])
def test_every_criterion_equals_the_oracle(criterion: str, positions: str) -> None:
    model = tiny_llava()
    for labels, side in ((False, "left"), (True, "right")):
        case = make_case(model, RAGGED_ANSWERS if labels else RAGGED, side, seed=3)
        assert_equals_naive(model, schedule(criterion, criterion, positions), case, labels)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_random_keeps_its_count_and_the_states_follow(positions: str) -> None:
    model = tiny_llava()
    case, plan = make_case(model, RAGGED, "left"), schedule("random", "random", positions)
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
        ((2, "uniform", {"keep_ratio": 0.0}),),
        ((1, "image_debiased", {"keep_count": 14}), (4, "instruction", {"keep_count": 5})),
        (
            (2, "instruction", {"keep_ratio": 1.0}),
            (3, "image", {"keep_ratio": 0.5}),
            (5, "uniform", {"keep_ratio": 0.0}),
        ),
    ],
    ids=["three-in-a-row", "at-least-one", "count-above-some-rows", "all-leave", "counts", "ratio-1-then-0"],
)
def test_schedules_equal_the_oracle(stages: tuple[tuple[int, str, dict[str, float]], ...]) -> None:
    model = tiny_llava()
    plan = PruningSchedule(stages=tuple(PruningStage(layer=at, criterion=how, **size) for at, how, size in stages))
    assert_equals_naive(model, plan, make_case(model, RAGGED, "left", seed=1))
    assert_equals_naive(model, plan, make_case(model, RAGGED_ANSWERS, "right", seed=2), labels=True)


@pytest.mark.parametrize("criterion", ["instruction", "image", "uniform"])
@pytest.mark.parametrize("labels", [False, True], ids=["prompt", "labels"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_equal_the_row_alone(side: str, labels: bool, criterion: str) -> None:
    model = tiny_llava("qwen2")
    rows = RAGGED_ANSWERS if labels else RAGGED
    install_pruning(model, schedule(criterion, criterion))
    case = make_case(model, rows, side)
    states, kept = run(model, case, labels)
    for b, spec in enumerate(rows):
        alone_states, alone_kept = run(model, make_case(model, [spec], seed=b), labels)
        columns = case.columns(b)
        torch.testing.assert_close(states[b, columns], alone_states[0], **STATES)
        assert_same_kept([[stage[b]] for stage in kept], [[columns[stage[0]]] for stage in alone_kept])


@pytest.mark.parametrize("criterion", ["instruction", "last_token", "image", "image_debiased", "uniform"])
@pytest.mark.parametrize("prompt", ["t3 i16 t5", "t2 i9 t3 i16 t2", "t4 i16"])
def test_teacher_forcing_keeps_what_the_prefill_keeps(prompt: str, criterion: str) -> None:
    model = tiny_llava()
    install_pruning(model, schedule(criterion, criterion))
    prefill = make_case(model, [prompt])
    _, expected = run(model, prefill)
    length = prefill.input_ids.shape[1]
    for answer, seed in (("a1", 0), ("a4", 1), ("a30", 2)):
        case = make_case(model, [f"{prompt} {answer}"])
        answers = torch.randint(5, 264, case.labels[:, length:].shape, generator=torch.Generator().manual_seed(seed))
        case.input_ids[:, length:] = case.labels[:, length:] = answers
        _, kept = run(model, case, labels=True)
        assert_same_kept([[row[row < length] for row in stage] for stage in kept], expected)
        assert all(len(stage[0]) - len(row[0]) == answers.numel() for stage, row in zip(kept, expected, strict=True))


@pytest.mark.parametrize("criterion", ["instruction", "image", "image_debiased", "last_token", "uniform"])
def test_every_turn_ranks_its_own_images(criterion: str) -> None:
    model = tiny_llava()
    rows = ("t2 i16 t4 a3 t5 i12 t3 a2", "t4 a2 t2 i16 t3 a4 t5 a2", "t1 i9 t2 a1 i7 i5 t3 a2", "t2 i16 t4 a3 t5 a2")
    kept = assert_equals_naive(model, schedule(criterion, criterion), make_case(model, rows), labels=True)
    in_second_turn = (kept[0][0] >= 30) & (kept[0][0] < 42)
    assert int(in_second_turn.sum()) == 6  # half of its own 12


def test_a_later_turn_does_not_choose_what_an_earlier_one_sees() -> None:
    model = install_pruning(tiny_llava(), schedule())
    _, first = run(model, make_case(model, ["t2 i16 t4 a3"]), labels=True)
    _, both = run(model, make_case(model, ["t2 i16 t4 a3 t5 i12 t3 a2"]), labels=True)
    assert_same_kept([[row[row < 25] for row in stage] for stage in both], first)


def test_an_image_token_that_predicts_an_answer_stays() -> None:
    model = tiny_llava()
    for spec, labels in (("t3 i16", False), ("t3 i16 a4", True), ("i16 a4", True)):
        case = make_case(model, [spec])
        for criterion in ("instruction", "image", "uniform", "random"):
            plan = schedule(criterion, criterion)
            _, kept = run(install_pruning(model, plan), case, labels)
            last_image = int((case.input_ids[0] == 4).nonzero().max())
            assert last_image in kept[-1][0].tolist()
            assert int((case.input_ids[0, kept[-1][0]] == 4).sum()) == 2  # it takes one of the places
        assert_equals_naive(model, schedule(), case, labels)


def test_equal_scores_go_to_the_earlier_token() -> None:
    model = tiny_llava()
    for layer in (1, 3):
        model.model.language_model.layers[layer].self_attn.q_proj.weight.data.zero_()  # uniform attention
    case = make_case(model, ["t3 i16 t5"])
    kept = assert_equals_naive(model, schedule("instruction", "last_token"), case)
    assert [row[0].tolist() for row in kept] == [[*range(11), *range(19, 24)], [*range(5), *range(19, 24)]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_without_images_is_the_stock_model(side: str) -> None:
    model = tiny_llava()
    case = make_case(model, ["t9", "t4", "t6"], side)
    with torch.no_grad():
        stock = model.model(**case.inputs()).last_hidden_state
    states, kept = run(install_pruning(model, schedule()), case)
    mask = case.attention_mask.bool()
    torch.testing.assert_close(states[mask], stock[mask], **STATES)
    assert_same_kept(kept, [[case.columns(b) for b in range(3)]] * 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_model_call_has_full_length_and_the_loss_of_the_oracle(side: str) -> None:
    model = tiny_llava()
    case, plan = make_case(model, RAGGED_ANSWERS, side), schedule()
    install_pruning(model, plan)
    with torch.no_grad():
        out = model(**case.inputs(labels=True))
        expected = naive_loss(model, naive_forward(model, plan, **case.naive(labels=True)).hidden, case.labels)
    assert out.logits.shape[:2] == case.input_ids.shape
    torch.testing.assert_close(out.loss, expected, **STATES)
    shifted = cross_entropy(out.logits[:, :-1].flatten(0, 1), case.labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, shifted, **STATES)


def test_pixels_and_precomputed_features_give_the_same() -> None:
    model = install_pruning(tiny_llava(), schedule())
    case = make_case(model, ["t3 i16 t4", "t9", "t1 i16 t2 i16 t3"], "left")
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        case.features = list(model.get_image_features(pixels).pooler_output)
        expected = naive_forward(model, schedule(), **case.naive())
        plain = {"input_ids": case.input_ids, "attention_mask": case.attention_mask, "pixel_values": pixels}
        with record_pruning(model) as trace:
            states = hidden_states(model, **plain)
        logits = model(**plain).logits
    assert_same_kept(trace.kept, expected.kept)
    mask = case.attention_mask.bool()
    torch.testing.assert_close(states[mask], expected.hidden[mask], **STATES)
    torch.testing.assert_close(logits[mask], model.lm_head(expected.hidden)[mask], atol=1e-3, rtol=1e-4)


def test_train_and_eval_are_the_same_to_the_last_bit() -> None:
    model = install_pruning(tiny_llava(), schedule())
    case = make_case(model, RAGGED_ANSWERS)
    expected = model.eval()(**case.inputs(labels=True))
    found = model.train()(**case.inputs(labels=True))
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert_same_kept(run(model.train(), case, labels=True)[1], run(model.eval(), case, labels=True)[1])


def test_pruning_does_not_depend_on_hooks() -> None:
    model = install_pruning(tiny_llava(), schedule())
    case = make_case(model, RAGGED)
    before, kept_before = run(model, case)
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module._backward_hooks.clear()
    after, kept_after = run(model, case)
    assert torch.equal(before, after)
    assert_same_kept(kept_after, kept_before)


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_is_in_the_scores(order: str) -> None:
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q|k|v|o)_proj", init_lora_weights=False)
    base, plan = tiny_llava(), schedule()
    if order == "before":
        install_pruning(base, plan)
    torch.manual_seed(0)
    model = get_peft_model(base, config).eval()
    if order == "after":
        assert install_pruning(model, plan) is model
    case = make_case(base, RAGGED, "left")
    with torch.no_grad():
        expected = naive_forward(base, plan, **case.naive())
        without = naive_forward(tiny_llava(), plan, **case.naive())
    states, kept = run(model, case)
    assert_same_kept(kept, expected.kept)
    mask = case.attention_mask.bool()
    torch.testing.assert_close(states[mask], expected.hidden[mask], **STATES)
    assert any(a.tolist() != b.tolist() for a, b in zip(kept[0], without.kept[0], strict=True))
    remove_pruning(model)
    assert pruning_of(model) is None


def test_counts_of_the_last_forward() -> None:
    model = install_pruning(tiny_llava(), schedule())
    pruning = pruning_of(model)
    assert pruning is not None and pruning.last is None and pruning.schedule == schedule()
    run(model, make_case(model, RAGGED))
    assert (pruning_of(model).last.image_tokens, list(pruning_of(model).last.kept)) == (16 + 25 + 7 + 12, [31, 8])
    run(model, make_case(model, ["t4"]))
    assert (pruning_of(model).last.image_tokens, list(pruning_of(model).last.kept)) == (0, [0, 0])


def test_installing_again_replaces_the_schedule() -> None:
    model = install_pruning(tiny_llava(), schedule("last_token", "uniform"))
    case = make_case(model, RAGGED)
    run(model, case)
    assert_equals_naive(model, schedule(), case)
