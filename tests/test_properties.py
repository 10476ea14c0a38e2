"""Random schedules on random batches against the naive masked decoder (hypothesis)."""

from __future__ import annotations

from functools import cache

import torch
from cases import make_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from naive import naive_forward, naive_loss
from tiny import tiny_llava
from transformers import LlavaForConditionalGeneration

from himap_train import PruningSchedule, PruningStage, install_pruning, record_pruning
from himap_train.models.features import hidden_states

STATES = {"atol": 1e-4, "rtol": 1e-4}
LOGITS = {"atol": 1e-3, "rtol": 1e-4}
GRADIENT = 2e-4
LAYERS = 4
RATIOS = (0.0, 0.06, 0.125, 0.3, 0.5, 0.7, 1.0)
QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@cache
def model_of(text: str, attn: str) -> LlavaForConditionalGeneration:
    return tiny_llava(text, layers=LAYERS, attn=attn)


models = st.builds(model_of, st.sampled_from(["llama", "mistral", "qwen2"]), st.sampled_from(["sdpa", "eager"]))


@st.composite
def schedules(draw: st.DrawFn, counts: bool = True) -> PruningSchedule:
    layers = sorted(draw(st.sets(st.integers(1, LAYERS - 1), max_size=LAYERS - 1)))
    by_count = counts and draw(st.booleans())
    sizes = st.integers(0, 14) if by_count else st.sampled_from(RATIOS)
    keep = sorted(draw(st.lists(sizes, min_size=len(layers), max_size=len(layers))), reverse=True)
    how = st.sampled_from(["instruction", "image", "image_debiased", "last_token", "uniform"])
    stages = tuple(
        PruningStage(layer=layer, criterion=draw(how), **{"keep_count" if by_count else "keep_ratio": size})
        for layer, size in zip(layers, keep, strict=True)
    )
    return PruningSchedule(stages=stages, positions=draw(st.sampled_from(["keep", "renumber"])))


text = st.integers(1, 4).map("t{}".format)
image = st.integers(1, 9).map("i{}".format)
answer = st.integers(1, 3).map("a{}".format)
prompts = st.lists(text | image, min_size=1, max_size=4).map(" ".join)
dialogues = st.lists(st.tuples(prompts, answer).map(" ".join), min_size=1, max_size=2).map(" ".join)
one_image_turn = st.builds("{} {} t2 a2".format, prompts, answer)
sides = st.sampled_from(["left", "right"])
seeds = st.integers(0, 10_000)


def check(model: LlavaForConditionalGeneration, plan: PruningSchedule, rows: list[str], side: str, seed: int) -> None:
    labels = any("a" in row for row in rows)
    case = make_case(model, rows, side, seed)
    install_pruning(model, plan)
    with torch.no_grad(), record_pruning(model) as trace:
        found = hidden_states(model, **case.inputs(labels))
        expected = naive_forward(model, plan, **case.naive(labels))
    kept = [[row.tolist() for row in stage] for stage in trace.kept]
    assert kept == [[row.tolist() for row in stage] for stage in expected.kept]
    mask = case.attention_mask.bool()
    torch.testing.assert_close(found[mask], expected.hidden[mask], **STATES)


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
