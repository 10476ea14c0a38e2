"""Tokens of the data that the frozen embeddings were never trained on: LoRA cannot teach them."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor

_AS_INITIALIZED = 1e-2
"""Distance from the mean row, over that of most rows: transformers draws new rows at 3e-5 of it."""
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
