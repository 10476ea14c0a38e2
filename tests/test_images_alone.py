"""Batches without text, without anything to predict, of padding or of nothing: computed, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_llava
from transformers.modeling_outputs import BaseModelOutputWithPooling

from himap_train import PruningSchedule, PruningStage, install_pruning, record_pruning

pytestmark = pytest.mark.core

IMAGE = [4] * 16
BATCHES: dict[str, tuple[list[list[int]], list[list[int]] | None]] = {
    "images alone": ([IMAGE, IMAGE], None),
    "one row of images alone": ([[*IMAGE, 7, 8], [*IMAGE, 0, 0]], [[1] * 18, [1] * 16 + [0] * 2]),
    "padding on the left": ([[0, 0, *IMAGE], [7, 8, *IMAGE]], [[0] * 2 + [1] * 16, [1] * 18]),
    "a row of padding": ([[*IMAGE, 7, 8], [0] * 18], [[1] * 18, [0] * 18]),
    "one token": ([[7]], None),
}


def forward(model: Any, ids: torch.Tensor, mask: list[list[int]] | None, **more: Any) -> Any:
    images = int((ids == 4).sum()) // 16
    features = [torch.randn(16, 32, generator=torch.Generator().manual_seed(n)) for n in range(images)]
    given = {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}} if images else {}
    return model(input_ids=ids, attention_mask=None if mask is None else torch.tensor(mask), **given, **more)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", BATCHES)
def test_rows_that_a_stage_would_empty_keep_their_last_token(name: str, layer: int) -> None:
    """With nothing supervised, as a batch of prompts in training, a row keeps what it keeps without labels."""
    ids, mask = torch.tensor(BATCHES[name][0]), BATCHES[name][1]
    model = install_pruning(tiny_llava(), PruningSchedule((PruningStage(layer, "random", 0.0),)))
    with record_pruning(model) as trace, torch.no_grad():
        plain = forward(model, ids, mask).logits
    kept = [row.tolist() for row in trace.kept[0]]
    model.train()
    with record_pruning(model) as trace:
        trained = forward(model, ids, mask, supervised_mask=torch.zeros_like(ids, dtype=torch.bool)).logits
    assert [row.tolist() for row in trace.kept[0]] == kept
    assert trained.isfinite().all() and torch.equal(plain, trained)
    trained.sum().backward()
    assert all(row or not any(real) for row, real in zip(kept, mask or [[1]] * len(kept), strict=True))


@pytest.mark.parametrize("shape", [(0, 5), (1, 0)])
def test_empty_batches_are_refused(shape: tuple[int, int]) -> None:
    model = install_pruning(tiny_llava(), PruningSchedule((PruningStage(2, "random", 0.0),)))
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=rf"an empty batch: inputs of shape \({shape[0]}, {shape[1]}\)"),
    ):
        forward(model, torch.zeros(shape, dtype=torch.long), None)


def test_late_images_need_a_text() -> None:
    model = install_pruning(tiny_llava(), PruningSchedule((), enter=2))
    with torch.no_grad(), pytest.raises(ValueError, match="would run layer 0 without a token: it holds images or"):
        forward(model, torch.tensor([IMAGE]), None)
    with torch.no_grad():
        assert forward(model, torch.tensor(BATCHES["one row of images alone"][0]), None).logits.isfinite().all()
