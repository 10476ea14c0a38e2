"""Which text ranks which image tokens: answers and later turns never do."""

from __future__ import annotations

import pytest
import torch
from cases import make_case
from checks import assert_equals_naive, assert_same_kept, run, two_stages
from tiny import tiny_llava

from himap_train import install_pruning


@pytest.mark.parametrize("criterion", ["instruction", "last_token", "image", "image_debiased", "stride"])
@pytest.mark.parametrize("prompt", ["t3 i16 t5", "t2 i9 t3 i16 t2", "t4 i16"])
def test_teacher_forcing_keeps_what_the_prefill_keeps(prompt: str, criterion: str) -> None:
    model = tiny_llava()
    install_pruning(model, two_stages(criterion, criterion))
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


@pytest.mark.parametrize("criterion", ["instruction", "image", "image_debiased", "last_token", "stride"])
def test_every_turn_ranks_its_own_images(criterion: str) -> None:
    model = tiny_llava()
    rows = ("t2 i16 t4 a3 t5 i12 t3 a2", "t4 a2 t2 i16 t3 a4 t5 a2", "t1 i9 t2 a1 i7 i5 t3 a2", "t2 i16 t4 a3 t5 a2")
    kept = assert_equals_naive(model, two_stages(criterion, criterion), make_case(model, rows), labels=True)
    in_second_turn = (kept[0][0] >= 30) & (kept[0][0] < 42)
    assert int(in_second_turn.sum()) == 6  # half of its own 12


def test_a_later_turn_does_not_choose_what_an_earlier_one_sees() -> None:
    model = install_pruning(tiny_llava(), two_stages())
    _, first = run(model, make_case(model, ["t2 i16 t4 a3"]), labels=True)
    _, both = run(model, make_case(model, ["t2 i16 t4 a3 t5 i12 t3 a2"]), labels=True)
    assert_same_kept([[row[row < 25] for row in stage] for stage in both], first)


def test_an_image_token_that_predicts_an_answer_stays() -> None:
    model = tiny_llava()
    for spec, labels in (("t3 i16", False), ("t3 i16 a4", True), ("i16 a4", True)):
        case = make_case(model, [spec])
        for criterion in ("instruction", "image", "stride", "random"):
            plan = two_stages(criterion, criterion)
            _, kept = run(install_pruning(model, plan), case, labels)
            last_image = int((case.input_ids[0] == 4).nonzero().max())
            assert last_image in kept[-1][0].tolist()
            assert int((case.input_ids[0, kept[-1][0]] == 4).sum()) == 2  # it takes one of the places
        assert_equals_naive(model, two_stages(), case, labels)


def test_equal_scores_go_to_the_earlier_token() -> None:
    model = tiny_llava()
    for layer in (1, 3):
        model.model.language_model.layers[layer].self_attn.q_proj.weight.data.zero_()  # uniform attention
    case = make_case(model, ["t3 i16 t5"])
    kept = assert_equals_naive(model, two_stages("instruction", "last_token"), case)
    assert [row[0].tolist() for row in kept] == [[*range(11), *range(19, 24)], [*range(5), *range(19, 24)]]
