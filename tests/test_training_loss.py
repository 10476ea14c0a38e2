"""The chunked loss against Hugging Face's own, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llava
from torch import nn
from training_toys import CountingHead, collate, sample

from himap_train.models.features import hidden_states
from himap_train.models.loss import supervised_loss

FP32 = {"atol": 1e-6, "rtol": 1e-5}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [0, 1, 4, 1000])
def test_loss_and_gradients_equal_hugging_face(chunk: int) -> None:
    batch = collate([sample(0, answer=5), sample(1, answer=2), sample(2, answer=3, image=False)])
    batch.pop("ids")
    images = batch.pop("images")
    stock, ours = tiny_llava(), tiny_llava()
    expected = stock(**batch, **images).loss
    total, count = supervised_loss(hidden_states(ours, **batch, images=images), batch["labels"], ours.lm_head, chunk)
    assert int(count) == 10
    torch.testing.assert_close(total / count, expected, **FP32)
    expected.backward()
    (total / count).backward()
    reference, found = gradients(stock), gradients(ours)
    assert set(found) == set(reference)
    for name in reference:
        torch.testing.assert_close(found[name], reference[name], atol=1e-6, rtol=1e-3, msg=name)


def test_lm_head_sees_supervised_rows_only_and_a_chunk_at_a_time() -> None:
    head = CountingHead()
    labels = torch.full((2, 50), -100)
    labels[:, 40:45] = 7
    supervised_loss(torch.randn(2, 50, 8), labels, head, chunk=4)
    assert head.rows == [4, 4, 2]


def test_first_column_is_never_a_target() -> None:
    """There is no row that would predict it."""
    labels = torch.full((1, 5), -100)
    labels[0, 0] = 3
    assert int(supervised_loss(torch.randn(1, 5, 8), labels, nn.Linear(8, 20))[1]) == 0


def test_nothing_supervised_gives_zero_with_a_graph() -> None:
    head = nn.Linear(8, 20)
    hidden = torch.randn(1, 5, 8, requires_grad=True)
    total, count = supervised_loss(hidden, torch.full((1, 5), -100), head)
    total.backward()
    assert total == 0 and count == 0
    assert head.weight.grad is not None and not head.weight.grad.any()
