"""Attention in blocks of query rows is the stock attention: values, gradients, and where it is not used."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from himap_train.models.cpu_attention import BLOCK, LONGEST, CausalBlocks, runs_in_blocks

TOLERANCE = {torch.float32: {"atol": 2e-6, "rtol": 1e-5}, torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2}}
SCALING = 0.3


def tensors(length: int, dtype: torch.dtype, kv_heads: int = 4) -> list[Tensor]:
    draw = torch.Generator().manual_seed(length)
    return [torch.randn(2, heads, length, 16, generator=draw).to(dtype) for heads in (4, kv_heads, kv_heads)]


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """In fp64, head by head as the formula has it: (B, L, H, D)."""
    query, key, value = (tokens.double() for tokens in (query, key, value))
    share, length = query.shape[1] // key.shape[1], query.shape[2]
    future = torch.arange(length)[None, :] > torch.arange(length)[:, None]
    heads = []
    for head in range(query.shape[1]):
        logits = query[:, head] @ key[:, head // share].transpose(1, 2) * SCALING
        heads.append(logits.masked_fill(future, -math.inf).softmax(-1) @ value[:, head // share])
    return torch.stack(heads, dim=2)


@pytest.mark.parametrize("dtype", list(BLOCK), ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("length", [5, 63, 64, 65, 128, 256, 300, 513])
def test_values_and_gradients_are_those_of_the_formula(length: int, kv_heads: int, dtype: torch.dtype) -> None:
    ours, exact = (
        [part.requires_grad_() for part in parts]
        for parts in (tensors(length, dtype, kv_heads), [p.double() for p in tensors(length, dtype, kv_heads)])
    )
    out, expected = CausalBlocks().attend(*ours, SCALING), written_out(*exact)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    (out.float() * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    for mine, theirs in zip(ours, exact, strict=True):
        error = (mine.grad.double() - theirs.grad).abs().max() / theirs.grad.abs().max()
        assert error < (2e-6 if dtype == torch.float32 else 2e-2)


def test_gradients_are_added_where_keys_are_used_elsewhere_too_and_in_every_backward_pass() -> None:
    ours, stock = (
        [part.requires_grad_() for part in parts]
        for parts in (tensors(200, torch.float32), tensors(200, torch.float32))
    )
    results = [
        CausalBlocks().attend(*ours, SCALING),
        F.scaled_dot_product_attention(*stock, is_causal=True, scale=SCALING).transpose(1, 2),
    ]
    for out, (query, key, value) in zip(results, (ours, stock), strict=True):
        loss = out.square().sum() + (query * key).sum() + (key[:, :, 70:] * value[:, :, 70:]).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    for mine, theirs in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=2e-5, rtol=1e-5)


def test_nothing_but_plain_causal_attention_runs_in_blocks() -> None:
    query, key, _ = tensors(200, torch.float32)
    assert runs_in_blocks(query, key, None, 0.0)
    assert not runs_in_blocks(query, key, torch.ones(2, 1, 200, 200, dtype=torch.bool), 0.0)
    assert not runs_in_blocks(query, key, None, 0.1)
    assert not runs_in_blocks(query[:, :, -1:], key, None, 0.0)  # decoding
    assert not runs_in_blocks(query[:, :, -9:], key, None, 0.0)  # behind a cache
    assert not runs_in_blocks(query[:, :, :64], key[:, :, :64], None, 0.0)  # a single block
    assert not runs_in_blocks(query.half(), key.half(), None, 0.0)
    assert not runs_in_blocks(query.to("meta"), key.to("meta"), None, 0.0)
    long = torch.empty(1, 1, LONGEST[torch.float32] + 1, 1)
    assert not runs_in_blocks(long, long, None, 0.0)
