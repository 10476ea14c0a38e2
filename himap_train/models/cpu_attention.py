"""Causal attention on the CPU in blocks of query rows, which skips most of what the causal mask hides.

PyTorch's CPU kernel skips hidden keys in steps of 512, its key block: up to 512 tokens it computes the whole square.
Pruned sequences are short: at 403 tokens a quarter to a third of the time is spent on what is then masked. Here a block
of query rows gets only the keys up to its last row. The difference to the kernel in one piece is rounding.

In bf16 the kernel's backward also takes twice to three times as long as plain matrix products, so those are used. They
keep the attention weights for the backward pass, in half precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import repeat_kv

BLOCK = {torch.float32: 128, torch.bfloat16: 256}
"""Query rows of a block, by measurement."""
LONGEST = 1024
"""Beyond this many tokens the kernel's own skipping is as good, and less memory."""


def runs_in_blocks(query: Tensor, key: Tensor, attention_mask: Tensor | None, dropout: float) -> bool:
    """Whether `attend_in_blocks` computes what the stock function would, and is worth it."""
    length = query.shape[2]
    return (
        query.device.type == "cpu"
        and query.dtype in BLOCK
        and attention_mask is None
        and dropout == 0.0
        and (BLOCK[query.dtype] if query.dtype == torch.float32 else 1) < length <= LONGEST
        and length == key.shape[2]
    )


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention of (B, H, L, D) queries on (B, K, L, D) keys and values: (B, L, H, D)."""
    heads, length = query.shape[1:3]
    key, value = (repeat_kv(tokens, heads // key.shape[1]) for tokens in (key, value))
    attend = _kernel if query.dtype == torch.float32 else _products
    rows = BLOCK[query.dtype]
    blocks = [
        attend(query[:, :, start : start + rows], key[:, :, : start + rows], value[:, :, : start + rows], scaling)
        for start in range(0, length, rows)
    ]
    return torch.cat([block.transpose(1, 2) for block in blocks], dim=1)


def _kernel(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    if query.shape[2] == key.shape[2]:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    hidden = _hidden(query, key)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=~hidden, scale=scaling)


def _products(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    logits = (query @ key.transpose(2, 3)) * scaling
    # Only the last keys are hidden from any row of this block.
    own = logits[..., -query.shape[2] :]
    own.masked_fill_(_hidden(query, query), torch.finfo(logits.dtype).min)
    return logits.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def _hidden(query: Tensor, key: Tensor) -> Tensor:
    """Keys behind each query row, (rows, keys) bool, where the last row is that of the last key."""
    rows, keys = query.shape[2], key.shape[2]
    return torch.ones(rows, keys, dtype=torch.bool, device=query.device).triu_(keys - rows + 1)
