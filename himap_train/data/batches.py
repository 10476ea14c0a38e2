"""Encoded conversations -> one padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NotRequired, TypedDict

import torch

from himap_train.data.encode import IGNORED, Sample

PaddingSide = Literal["left", "right"]


class Batch(TypedDict):
    """B conversations, S positions. `labels` only for training, `answers` only for generation."""

    ids: list[str]
    meta: list[dict[str, str]]
    input_ids: torch.Tensor  # (B, S)
    attention_mask: torch.Tensor  # (B, S), 1 where a token is
    pixel_values: torch.Tensor | None  # (images of all rows, 3, H, W), rows in order; None for text-only
    image_features: NotRequired[torch.Tensor]  # (images of all rows, T, W), in place of pixel_values in every batch
    labels: NotRequired[torch.Tensor]  # (B, S), -100 where not supervised
    answers: NotRequired[list[str]]
    dropped_exchanges: NotRequired[int]  # questions with their answers that did not fit into max_length
    window_tokens: NotRequired[int]  # training: supervised tokens of the whole accumulation window, see `Windows`
    waited_seconds: NotRequired[float]  # training: how long the process waited for the batch


def collate(
    samples: Sequence[Sample],
    pad_token_id: int,
    padding_side: PaddingSide = "right",
    pad_to_multiple_of: int | None = None,
) -> Batch:
    """Pads samples to the longest.

    Args:
        samples: all from `encode` (then the batch has labels), or all from `encode_prompt` (then it has answers).
        pad_token_id: fills `input_ids` outside the samples.
        padding_side: "right" for training, "left" for generation.
        pad_to_multiple_of: round the length up, for tensor cores.

    Raises:
        ValueError: nothing to batch, or the images have different sizes.
    """
    if not samples:
        raise ValueError("collate got no samples")
    length = max(len(sample["input_ids"]) for sample in samples)
    if pad_to_multiple_of:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    rows = [sample["input_ids"] for sample in samples]
    batch: Batch = {
        "ids": [sample["id"] for sample in samples],
        "meta": [sample["meta"] for sample in samples],
        "input_ids": _pad(rows, length, pad_token_id, padding_side),
        "attention_mask": _pad([torch.ones_like(row) for row in rows], length, 0, padding_side),
        "pixel_values": _join_images(samples),
    }
    if "image_features" in samples[0]:
        batch["image_features"] = torch.cat([sample["image_features"] for sample in samples])
    if "labels" in samples[0]:
        batch["labels"] = _pad([sample["labels"] for sample in samples], length, IGNORED, padding_side)
        batch["dropped_exchanges"] = sum(sample.get("dropped_exchanges", 0) for sample in samples)
    if "answer" in samples[0]:
        batch["answers"] = [sample["answer"] for sample in samples]
    return batch


def pad_token_id_of(tokenizer: object) -> int:
    """The tokenizer's pad token, or eos where it has none: padding is masked, so its id plays no part."""
    pad: int | None = getattr(tokenizer, "pad_token_id", None)
    eos: int | None = getattr(tokenizer, "eos_token_id", None)
    if pad is None and eos is None:
        raise ValueError("the tokenizer has neither a pad nor an eos token; set tokenizer.pad_token")
    return pad if pad is not None else int(eos)  # type: ignore[arg-type]


def _pad(rows: Sequence[torch.Tensor], length: int, value: int, side: PaddingSide) -> torch.Tensor:
    """Rows of different lengths -> (B, length)."""
    padded = rows[0].new_full((len(rows), length), value)
    for target, row in zip(padded, rows, strict=True):
        target[length - len(row) if side == "left" else 0 :][: len(row)] = row
    return padded


def _join_images(samples: Sequence[Sample]) -> torch.Tensor | None:
    parts = [(sample["id"], sample["pixel_values"]) for sample in samples]
    images = [(name, values) for name, values in parts if values is not None]
    if not images:
        return None
    shapes = {tuple(values.shape[1:]): name for name, values in images}
    if len(shapes) > 1:
        found = ", ".join(f"{shape} (sample {name!r})" for shape, name in shapes.items())
        raise ValueError(f"images of different sizes in one batch: {found}; use an image processor with a fixed size")
    return torch.cat([values for _, values in images])
