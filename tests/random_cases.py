"""Random schedules and batches for hypothesis, and the comparison with the naive masked decoder."""

from __future__ import annotations

from functools import cache

import torch
from cases import make_case
from checks import STATES
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from naive import naive_forward
from tiny import tiny_llava
from transformers import LlavaForConditionalGeneration

from himap_train import PruningSchedule, PruningStage, install_pruning, record_pruning
from himap_train.models.features import hidden_states

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
    how = st.sampled_from(["instruction", "image", "image_debiased", "last_token", "stride"])
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
