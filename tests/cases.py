"""Ragged batches for decoder tests, written as strings: "t3 i16 t4 a2" is text, a 16-token image, text, an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

IMAGE_ID = 4
RAGGED = ("t3 i16 t4", "t9", "t2 i9 t3 i16 t5", "i7 t1", "t5 i12")  # no text before, no text after, none at all
TURNS = ("t2 i16 t4 a3 t5 i12 t3 a2", "t4 a2 t2 i16 t3 a4 t5 a2", "t1 i9 t2 a1 i7 i5 t3 a2", "t2 i16 t4 a3 t5 a2")
RAGGED_ANSWERS = ("t3 i16 t4 a3", "t5 a4", "t2 i9 t3 i16 t5 a1", "i7 t1 a6 t2", "t5 i12 a2")


def toy_readings(features: Tensor) -> Tensor:
    """What the tower looked at and its keys, as if the features (n, D) said so: (n, 1 + D)."""
    return torch.cat([features[:, :1].sigmoid(), features], dim=1).float()


@dataclass
class Case:
    """A padded batch; `features` are the decoder-side image features (n, D), one per image."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    features: list[Tensor]

    def inputs(self, labels: bool = False) -> dict[str, Any]:
        """Keyword arguments of the model."""
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.features:
            encoded = BaseModelOutputWithPooling(pooler_output=list(self.features))
            encoded.tower_readings = toy_readings(torch.cat(self.features))
            inputs["mm_encoder_outputs"] = {"image": encoded}
        return inputs | ({"labels": self.labels} if labels else {})

    def naive(self, labels: bool = False) -> dict[str, Any]:
        """Keyword arguments of `naive_forward`."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "image_features": self.features}
        return inputs | ({"labels": self.labels} if labels else {})

    def columns(self, row: int) -> Tensor:
        """Columns of a row that are not padding."""
        return self.attention_mask[row].nonzero()[:, 0]


def make_row(model: LlavaForConditionalGeneration, spec: str, seed: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """ids (T,), labels (T,) and image features of one row; the seed decides the content, kind by kind."""
    draws = {kind: torch.Generator().manual_seed(1000 * seed + index) for index, kind in enumerate("tia")}
    ids, labels, features = [], [], []
    for segment in spec.split():
        kind, length = segment[0], int(segment[1:])
        if kind == "i":
            width = model.config.text_config.hidden_size
            features.append(0.3 * torch.randn(length, width, generator=draws[kind]))
            ids.append(torch.full((length,), IMAGE_ID))
        else:
            ids.append(torch.randint(5, 264, (length,), generator=draws[kind]))
        labels.append(ids[-1] if kind == "a" else torch.full((length,), -100))
    return torch.cat(ids), torch.cat(labels), features


def make_case(
    model: LlavaForConditionalGeneration, rows: tuple[str, ...] | list[str], side: str = "right", seed: int = 0
) -> Case:
    """Rows padded on one side. The content of row `b` depends on `seed + b` only, so that it can be made alone."""
    made = [make_row(model, spec, seed + b) for b, spec in enumerate(rows)]
    length = max(len(ids) for ids, _, _ in made)

    def padded(values: list[Tensor], fill: int) -> Tensor:
        gaps = [(length - len(v), 0) if side == "left" else (0, length - len(v)) for v in values]
        return torch.stack([pad(v, gap, value=fill) for v, gap in zip(values, gaps, strict=True)])

    return Case(
        input_ids=padded([ids for ids, _, _ in made], 0),
        attention_mask=padded([torch.ones_like(ids) for ids, _, _ in made], 0),
        labels=padded([labels for _, labels, _ in made], -100),
        features=[feature for _, _, features in made for feature in features],
    )
