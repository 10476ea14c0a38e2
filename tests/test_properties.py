"""Random schedules on random batches against the naive masked decoder (hypothesis)."""

from __future__ import annotations

import torch
from cases import make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive_forward, naive_loss
from random_cases import QUICK, check, dialogues, models, one_image_turn, prompts, schedules, seeds, sides
from transformers import LlavaForConditionalGeneration

from himap_train import PruningSchedule, install_pruning

LOGITS = {"atol": 1e-3, "rtol": 1e-4}
GRADIENT = 2e-4


@settings(QUICK, max_examples=100)
@given(models, schedules(), st.lists(prompts, min_size=1, max_size=4), sides, seeds)
def test_prompts(
    model: LlavaForConditionalGeneration, plan: PruningSchedule, rows: list[str], side: str, seed: int
) -> None:
    check(model, plan, rows, side, seed)


@settings(QUICK, max_examples=60)
@given(models, schedules(), st.lists(one_image_turn, min_size=1, max_size=4), sides, seeds)
def test_answers(
    model: LlavaForConditionalGeneration, plan: PruningSchedule, rows: list[str], side: str, seed: int
) -> None:
    check(model, plan, rows, side, seed)


@settings(QUICK, max_examples=60)
@given(models, schedules(counts=False), st.lists(dialogues, min_size=1, max_size=3), sides, seeds)
def test_turns(
    model: LlavaForConditionalGeneration, plan: PruningSchedule, rows: list[str], side: str, seed: int
) -> None:
    check(model, plan, rows, side, seed)


@settings(QUICK, max_examples=50)
@given(models, schedules(), st.lists(prompts, min_size=1, max_size=4), st.integers(1, 3), seeds)
def test_decoding(
    model: LlavaForConditionalGeneration, plan: PruningSchedule, rows: list[str], chunk: int, seed: int
) -> None:
    case = make_case(model, rows, "left", seed)
    prompt, mask = case.input_ids.shape[1], case.attention_mask
    tokens = torch.randint(5, 264, (len(rows), 3), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([case.input_ids, tokens], dim=1)
    full = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    install_pruning(model, plan)
    with torch.no_grad():
        numbers = (full.cumsum(dim=1) - 1).clamp(min=0)
        out = model(**case.inputs(), position_ids=numbers[:, :prompt], use_cache=True)
        logits = [out.logits[:, -1:]]
        for start in range(0, 3, chunk):
            part, end = tokens[:, start : start + chunk], prompt + min(start + chunk, 3)
            positions, cache = numbers[:, prompt + start : end], out.past_key_values
            out = model(input_ids=part, attention_mask=full[:, :end], position_ids=positions, past_key_values=cache)
            logits.append(out.logits)
        expected = naive_forward(model, plan, ids, full, case.features, prompt=prompt).hidden[:, prompt - 1 :]
        torch.testing.assert_close(torch.cat(logits, dim=1), model.lm_head(expected), **LOGITS)


@settings(QUICK, max_examples=25)
@given(models, schedules(), st.lists(one_image_turn, min_size=1, max_size=3), sides, seeds)
def test_gradients(
    model: LlavaForConditionalGeneration, plan: PruningSchedule, rows: list[str], side: str, seed: int
) -> None:
    case = make_case(model, rows, side, seed)
    weights = dict(model.model.language_model.layers.named_parameters())
    install_pruning(model, plan)
    loss = model(**case.inputs(labels=True)).loss
    found = torch.autograd.grad(loss, list(weights.values()))
    naive = naive_loss(model, naive_forward(model, plan, **case.naive(labels=True)).hidden, case.labels)
    expected = torch.autograd.grad(naive, list(weights.values()))
    for name, ours, theirs in zip(weights, found, expected, strict=True):
        assert float((ours - theirs).abs().max()) <= GRADIENT * float(theirs.abs().max()) + 1e-6, name


@settings(QUICK, max_examples=100)
@given(schedules())
def test_dict_form_is_lossless(plan: PruningSchedule) -> None:
    assert PruningSchedule.from_dict(plan.to_dict()) == plan
