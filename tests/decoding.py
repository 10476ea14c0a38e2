"""What tests of cached decoding share: prefill, tokens one by one, and the same from the oracle."""

from __future__ import annotations

from typing import Any

import torch
from cases import RAGGED, Case, make_case
from naive import naive_forward, naive_generate, naive_logits
from tiny import tiny_llava
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from himap_train import PruningSchedule, PruningStage, install_pruning

LOGITS = {"atol": 1e-3, "rtol": 1e-4}  # fp32; logits of this model are of the order of 10
SCORES = {"atol": 1e-4, "rtol": 1e-4}
STEPS = 5


def himap(positions: str = "keep", first: str = "instruction", second: str = "image") -> PruningSchedule:
    stages = (
        PruningStage(layer=2, criterion=first, keep_ratio=0.5),
        PruningStage(layer=4, criterion=second, keep_ratio=0.125),
    )
    return PruningSchedule(stages=stages, positions=positions)


def next_positions(mask: Tensor) -> Tensor:
    return mask.sum(dim=1, keepdim=True) - 1


def prompt_positions(mask: Tensor) -> Tensor:
    """As `generate` numbers a padded prompt; without them the model counts the padding too."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def decode(
    model: LlavaForConditionalGeneration, case: Case, tokens: Tensor, chunk: int, give_positions: bool
) -> tuple[Tensor, Any]:
    """Prefill, then `tokens` (B, N) in chunks, with the cache -> logits (B, N + 1, V) from the last prompt row on."""
    inputs, mask = case.inputs(), case.attention_mask
    if give_positions:
        inputs["position_ids"] = prompt_positions(mask)
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        logits = [out.logits[:, -1:]]
        for start in range(0, tokens.shape[1], chunk):
            part = tokens[:, start : start + chunk]
            mask = torch.cat([mask, torch.ones_like(part)], dim=1)
            positions = (mask.cumsum(dim=1) - 1)[:, -part.shape[1] :]
            extra = {"position_ids": positions} if give_positions else {}
            cache = out.past_key_values
            out = model(input_ids=part, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
            logits.append(out.logits)
    return torch.cat(logits, dim=1), out.past_key_values


def naive_decode(model: LlavaForConditionalGeneration, plan: PruningSchedule, case: Case, tokens: Tensor) -> Tensor:
    """The same logits from one pass of the oracle."""
    prompt = case.input_ids.shape[1]
    ids, mask = (
        torch.cat([case.input_ids, tokens], dim=1),
        torch.cat([case.attention_mask, torch.ones_like(tokens)], dim=1),
    )
    with torch.no_grad():
        out = naive_forward(model, plan, ids, mask, case.features, prompt=prompt)
    return naive_logits(model, out.hidden[:, prompt - 1 :])


def random_tokens(rows: int, length: int = STEPS) -> Tensor:
    return torch.randint(5, 264, (rows, length), generator=torch.Generator().manual_seed(9))


def assert_decodes_as_naive(plan: PruningSchedule) -> None:
    """Given tokens in chunks, and those that `generate` makes."""
    model = tiny_llava()
    case, tokens = make_case(model, RAGGED, "left", seed=4), random_tokens(len(RAGGED))
    expected = naive_decode(model, plan, case, tokens)
    made = naive_generate(model, plan, case.naive(), STEPS)
    install_pruning(model, plan)
    found, _ = decode(model, case, tokens, chunk=2, give_positions=True)
    torch.testing.assert_close(found, expected, **LOGITS)
    answer = model.generate(**case.inputs(), max_new_tokens=STEPS, do_sample=False)
    assert torch.equal(answer[:, case.input_ids.shape[1] :], made)
