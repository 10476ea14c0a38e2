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
    images: dict[str, torch.Tensor]  # of all rows in order, as the family's model takes them; empty for text-only
    image_features: NotRequired[torch.Tensor]  # (image tokens of all rows, W), in place of pixels in every batch
    labels: NotRequired[torch.Tensor]  # (B, S), -100 where not supervised
    answers: NotRequired[list[str]]
    dropped_exchanges: NotRequired[int]  # questions with their answers that did not fit into max_length
    window_tokens: NotRequired[int]  # training: supervised tokens of the whole accumulation window, see `Windows`
    window_batches: NotRequired[int]  # training: micro-batches of that window that supervise something
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
        "images": _join_images(samples),
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


def _join_images(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    images = [(sample["id"], image) for sample in samples for image in sample["images"]]
    if not images:
        return {}
    return {name: _join([(who, image[name]) for who, image in images], name) for name in images[0][1]}


def _join(parts: Sequence[tuple[str, torch.Tensor]], name: str) -> torch.Tensor:
    """One behind the other. Crops (1, P, 3, H, W) of images that have fewer are filled up with zeros, as the stock
    processors do it.
    """
    values = [part for _, part in parts]
    if values[0].ndim == 5:
        most = max(part.shape[1] for part in values)
        values = [torch.nn.functional.pad(part, (0, 0) * 3 + (0, most - part.shape[1])) for part in values]
    shapes = {tuple(part.shape[1:]): who for (who, _), part in zip(parts, values, strict=True)}
    if len(shapes) > 1:
        found = ", ".join(f"{shape} (sample {who!r})" for shape, who in shapes.items())
        raise ValueError(
            f"images of different sizes in one batch: {name} {found}; use an image processor with a fixed size"
        )
    return torch.cat(values)
