"""Tokens of the data that the frozen embeddings or the frozen lm_head do not know: LoRA cannot teach them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

_AS_INITIALIZED = 1e-2
"""Distance from the mean row, over that of most rows: transformers draws new rows at 3e-5 of it."""
_ONE_WAY = 0.8
"""Cosine to the mean direction of all rows: training pushes those that are never wanted all the same way."""
_SHOWN = 8


def untrained_rows(embeddings: Tensor, rows: Tensor) -> Tensor:
    """Which of `rows` are as nobody trained them: all equal in themselves, equal to another row, or at the mean.

    Args:
        embeddings: (V, D).
        rows: (N,), below V.

    Returns:
        (N,) bool.
    """
    values = embeddings.detach().float()
    mean = values.mean(0)
    distances = (values - mean).norm(dim=1)
    signature = values.double() @ torch.randn(
        values.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).to(values.device)
    _, which, counts = signature.unique(return_inverse=True, return_counts=True)
    flat = values[rows].amax(1) == values[rows].amin(1)
    return (flat | (counts[which][rows] > 1) | (distances[rows] < _AS_INITIALIZED * distances.median())).cpu()


def unseen_tokens_warning(token_ids: Set[int], embeddings: Tensor, processor: Any) -> str | None:
    """What to tell a user whose data use tokens that the embeddings do not know; None where all is well.

    Args:
        token_ids: Those of the examined records.
        embeddings: (V, D); empty where they are spread over processes, about which nothing is said.
        processor: The checkpoint's; its image token, whose embedding is never read, does not count.
    """
    used = torch.tensor(sorted(token_ids - {processor.image_token_id}), dtype=torch.long)
    if not embeddings.numel() or embeddings.ndim != 2 or not len(used):
        return None
    inside = used[used < len(embeddings)]
    found = used[used >= len(embeddings)].tolist()
    found += inside[untrained_rows(embeddings, inside.to(embeddings.device))].tolist()
    if not found:
        return None
    names = ", ".join(f"{processor.tokenizer.convert_ids_to_tokens(number)!r} ({number})" for number in found[:_SHOWN])
    return (
        f"warning: the data use {len(found)} tokens whose embedding was never trained: {names}. The embeddings are "
        "frozen, so the model cannot tell these apart; write them with words of the vocabulary, or train the "
        "embeddings first"
    )


def unproduced_tokens_warning(answer_ids: Mapping[int, int], lm_head: nn.Linear, processor: Any) -> str | None:
    """What to tell a user whose answers use words that the model has never said; None where all is well.

    Args:
        answer_ids: Tokens of the examined answers, and how often.
        lm_head: Of V tokens; about one that is trained, or spread over processes, nothing is said.
        processor: The checkpoint's.
    """
    rows = lm_head.weight.detach().float()
    if rows.ndim != 2 or not rows.numel() or not answer_ids or lm_head.weight.requires_grad:
        return None
    directions = normalize(rows, dim=1)
    alike = (directions @ normalize(directions.mean(0), dim=0) > _ONE_WAY).cpu()
    never = [number for number in sorted(answer_ids, key=lambda n: -answer_ids[n]) if bool(alike[number : number + 1])]
    if not never:
        return None
    share = sum(answer_ids[number] for number in never) / sum(answer_ids.values())
    return (
        f"warning: {100 * share:.0f} % of the answers' tokens are of words that this model has never produced: "
        f"{', '.join(repr(processor.tokenizer.convert_ids_to_tokens(number)) for number in never[:_SHOWN])}. "
        f"{int(alike.sum())} of the {len(rows)} rows of its frozen lm_head point the same way, so LoRA can hardly tell "
        "them apart; answer in other words, or train another model (--model.path)"
    )
