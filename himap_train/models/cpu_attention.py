"""Causal attention on the CPU in blocks of query rows, which skips most of what the causal mask hides.

PyTorch's CPU kernel skips hidden keys in steps of 512, its key block: up to 512 tokens it computes the whole square.
Pruned sequences are short: at 403 tokens a quarter to a third of the time is spent on what is then masked. Here a block
of query rows gets only the keys up to its last row. The difference to the kernel in one piece is rounding.

In bf16 the kernel's backward also takes twice to three times as long as plain matrix products, so those are used. They
keep the attention weights for the backward pass, in half precision.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import repeat_kv

BLOCK = {torch.float32: 64, torch.bfloat16: 256}
"""Query rows of a block, by measurement."""
LONGEST = {torch.float32: 2048, torch.bfloat16: 1024}
"""Beyond this many tokens the kernel's own skipping is as good (fp32), or the kept weights take too much (bf16)."""


def runs_in_blocks(query: Tensor, key: Tensor, attention_mask: Tensor | None, dropout: float) -> bool:
    """Whether `CausalBlocks` computes what the stock function would, and is worth it."""
    length = query.shape[2]
    return (
        query.device.type == "cpu"
        and query.dtype in BLOCK
        and attention_mask is None
        and dropout == 0.0
        and (BLOCK[query.dtype] if query.dtype == torch.float32 else 1) < length <= LONGEST[query.dtype]
        and length == key.shape[2]
    )


class _WholeAndFirst(torch.autograd.Function):
    """Tokens and the first of them, whose gradient is added to that of all where it lies.

    That of a slice is first filled up with zeros to the length of all, once for each block.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
        ctx.length = length
        return tokens.view_as(tokens), tokens[:, :, :length]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, whole: Tensor, first: Tensor) -> tuple[Tensor, None]:
        # `whole` comes from one attention call, which made it for this alone.
        whole[:, :, : ctx.length] += first
        return whole, None


def _whole_and_first(tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(B, H, L, D) and, of these, (B, H, length, D)."""
    if not tokens.requires_grad or not length:
        return tokens, tokens[:, :, :length]
    first: tuple[Tensor, Tensor] = _WholeAndFirst.apply(tokens, length)
    return first


class CausalBlocks:
    """Attention in blocks for the layers of one forward pass, which share a mask."""

    def __init__(self) -> None:
        self._shared: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Causal attention of (B, H, L, D) queries on (B, K, L, D) keys and values: (B, L, H, D)."""
        heads, length = query.shape[1:3]
        key, value = (repeat_kv(tokens, heads // key.shape[1]) for tokens in (key, value))
        attend = self._kernel if query.dtype == torch.float32 else self._products
        blocks: list[Tensor] = []
        # From the last block to the first: each block's keys are some of those of the block behind it.
        for rows in reversed(query.split(BLOCK[query.dtype], dim=2)):
            length -= rows.shape[2]
            key, fewer_keys = _whole_and_first(key, length)
            value, fewer_values = _whole_and_first(value, length)
            blocks.insert(0, attend(rows, key, value, scaling).transpose(1, 2))
            key, value = fewer_keys, fewer_values
        return torch.cat(blocks, dim=1)

    def _kernel(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        if query.shape[2] == key.shape[2]:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        mask = self._mask(query, key.shape[2])
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)

    def _products(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        logits = (query @ key.transpose(2, 3)) * scaling
        # Only the last keys are hidden from any row of this block.
        logits[..., -query.shape[2] :].add_(self._mask(query, query.shape[2]))
        return logits.softmax(-1) @ value  # in fp32 inside; what is kept for the backward pass is not

    def _mask(self, query: Tensor, keys: int) -> Tensor:
        """Minus infinity at keys behind each query row, (rows, keys), where the last row is that of the last key."""
        shared = self._shared
        if shared is None or shared.shape[1] < keys or shared.dtype != query.dtype:
            self._shared = shared = _last_rows_mask(BLOCK[query.dtype], max(keys, BLOCK[query.dtype]), query)
        return shared[-query.shape[2] :, -keys:]


def _last_rows_mask(rows: int, keys: int, like: Tensor) -> Tensor:
    return torch.full((rows, keys), -torch.inf, dtype=like.dtype, device=like.device).triu(keys - rows + 1)
