"""The few rows of attention that rank, in blocks, against the whole map."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from himap_train.pruning.methods import attention as scoring
from himap_train.pruning.methods.attention import attention_blocks

LENGTH, SCALING = 260, 0.25


def whole_map(query: Tensor, key: Tensor, valid: Tensor) -> Tensor:
    """(B, L, L): softmax over the visible columns, averaged over heads, in fp64."""
    share = query.shape[1] // key.shape[1]
    logits = query.double() @ key.double().repeat_interleave(share, dim=1).transpose(2, 3) * SCALING
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & valid[:, None, None, :]
    return logits.masked_fill(~visible, -math.inf).softmax(-1).mean(1)


@pytest.mark.parametrize("logits", [1, 2**14, 2**20, 2**30], ids=["single rows", "small", "default", "all at once"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_blocks_give_the_rows_of_the_whole_map(kv_heads: int, logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_CPU_LOGITS", logits)
    draw = torch.Generator().manual_seed(kv_heads)
    query, key = (torch.randn(2, heads, LENGTH, 8, generator=draw) for heads in (4, kv_heads))
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[0, :9] = False  # left padding
    # Rows that end with the sequence, as tightly as they can: 230, and 215 with the rest filled up by column 0.
    rows = torch.zeros(2, 230, dtype=torch.long)
    rows[0] = torch.arange(30, LENGTH)
    rows[1, :215] = torch.arange(45, LENGTH)
    expected = whole_map(query, key, valid)
    found = torch.full((2, 230, LENGTH), -1.0)
    for part, attention in attention_blocks(query, key, rows, valid, SCALING, fewest=215):
        found[:, part] = torch.nn.functional.pad(attention, (0, LENGTH - attention.shape[2]))
    for row, count in ((0, 230), (1, 215)):
        torch.testing.assert_close(found[row, :count].double(), expected[row, rows[row, :count]], atol=1e-6, rtol=1e-5)
    assert not found.isnan().any()
