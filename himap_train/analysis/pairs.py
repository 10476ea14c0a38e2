"""Kinds of tokens, and which token sees which, for what looks at pairs of them.

Shapes: B rows, L columns, H heads, D head width, 4 kinds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from himap_train.data.encode import IGNORED
from himap_train.evaluation.samples import EncodedBatch
from himap_train.models.families import family_of
from himap_train.models.stock import base_model, text_decoder

SYSTEM, IMAGE, INSTRUCTION, ANSWER = KINDS = (0, 1, 2, 3)
"""Text before the first image, and marks between tiles; image tokens; other text of the prompt; what is predicted."""


def kinds_of(model: nn.Module, batch: EncodedBatch) -> Tensor:
    """Which token is of which kind, (B, 4, L) of 0 and 1; padding is of none."""
    ids, valid = batch.texts["input_ids"], batch.texts["attention_mask"].bool()
    base = base_model(model)
    image = (ids == base.config.image_token_id) & valid
    text, before = valid & ~image, image.cumsum(1) == 0
    if family_of(base).marks_tiles:
        before = before | (image.flip(1).cumsum(1).flip(1) > 0)
    answer = text & (batch.labels != IGNORED)
    return torch.stack([text & ~answer & before, image, text & ~answer & ~before, answer], 1).float()


def visible_pairs(model: nn.Module, batch: EncodedBatch) -> Tensor:
    """Which token sees which, (B, L, L) bool: those up to itself that are not padding.

    Raises:
        ValueError: The decoder has a sliding window, and the samples are longer.
    """
    valid = batch.texts["attention_mask"].bool()
    length, window = valid.shape[1], getattr(text_decoder(model).config, "sliding_window", None)
    if window is not None and length > window:
        raise ValueError(f"samples of {length} tokens in a sliding window of {window}: give shorter ones")
    causal = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=valid.device)  # so that no row of padding is without any
    return causal & (valid.unsqueeze(1) | itself)


def softmax_attention(query: Tensor, key: Tensor, scaling: float, visible: Tensor) -> Tensor:
    """Attention weights (B, H, L, L) of queries (B, H, L, D) on keys (B, H or 1, L, D)."""
    logits = (query @ key.mT * scaling).masked_fill(~visible.unsqueeze(1), -torch.inf)
    return logits.softmax(-1)
