"""Weights of the base model that are trained in place, beside LoRA: the vision tower's and the decoder's.

PEFT's `modules_to_save` would hold each of them twice. Trained in place they are saved under their own names in the
adapter's file, from which PEFT itself loads them; without the adapter the model is then not its base any more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from himap_train.models.families import family_of
from himap_train.models.features import whole_weights


def used_in_tower(model: Any) -> dict[str, nn.Parameter]:
    """The vision tower's parameters that image features depend on, without those of the projector.

    Layers behind the one that the projector takes get no gradient, for which DDP would wait. Which they are is seen on
    one blank image; on the meta device all count as used.
    """
    family = family_of(model)
    tower = {
        name: weight
        for name, weight in model.named_parameters()
        if name.startswith(f"{family.vision_name}.")
        and not name.startswith(tuple(f"{p}." for p in family.projector_names))
    }
    if model.device.type == "meta":
        return tower
    before = {name: weight.requires_grad for name, weight in tower.items()}
    for weight in tower.values():
        weight.requires_grad_(True)
    text = set(family.decoder(model).parameters())
    with torch.enable_grad(), whole_weights(weight for weight in model.model.parameters() if weight not in text):
        encoded = family.encode_images(model, family.empty_images(model))
        features = _tensors([encoded.pooler_output, getattr(encoded, "deepstack_features", None)])
        total = torch.stack([feature.float().sum() for feature in features]).sum()
        gradients = torch.autograd.grad(total, list(tower.values()), allow_unused=True)
    for name, weight in tower.items():
        weight.requires_grad_(before[name])
    return {name: weight for (name, weight), g in zip(tower.items(), gradients, strict=True) if g is not None}


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif nested is not None:
        for part in nested:
            yield from _tensors(part)


def train_decoder(base: Any) -> None:
    """Train the text decoder with embeddings and head.

    Raises:
        ValueError: Its weights are quantised.
    """
    for module in (family_of(base).decoder(base), base.lm_head):
        for name, weight in module.named_parameters():
            if not weight.is_floating_point():
                raise ValueError(f"decoder='train' needs weights in full precision; {name} is {weight.dtype}")
            weight.requires_grad_(True)


def trained_in_place(model: nn.Module) -> set[str]:
    """Names of the parameters that are or were trained and belong to the base model itself."""
    return getattr(model, "himap_trained_in_place", set[str]()) | {
        name
        for name, weight in model.named_parameters()
        if weight.requires_grad and "lora_" not in name and ".modules_to_save." not in name
    }


def remember_in_place(model: Any, saved: Collection[str]) -> None:
    """Let a loaded model know which of its adapter's tensors are the base's own: PEFT freezes them like all others."""
    model.himap_trained_in_place = {name for name, _ in model.named_parameters() if name in saved}
