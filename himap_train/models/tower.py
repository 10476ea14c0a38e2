"""Which vision tower it is and what it is given: all that decides the features of an image."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from himap_train.models.families import family_of
from himap_train.models.versions import feature_layers


def check_frozen(base: Any) -> None:
    """Raises ValueError where features cannot be cached: the family has no fixed ones, or the tower is trained."""
    family = family_of(base)
    if not family.caches_features:
        raise ValueError(
            f"data.cache_image_features does not go with family {family.name}, whose images have features of many "
            "shapes; set data.cache_image_features to null"
        )
    trained = [name for name, p in family.vision(base).named_parameters() if p.requires_grad]
    if trained:
        raise ValueError(
            f"data.cache_image_features needs a frozen vision tower; {len(trained)} of its tensors are trained, the "
            f"first is {trained[0]}. Freeze the tower, or set data.cache_image_features to null"
        )


def tower_facts(base: Any, image_processor: Any, aspect_ratio: str, precision: str) -> dict[str, Any]:
    """All that decides what the features of an image are, as plain values."""
    vision: Any = base.config.vision_config
    return {
        "tower": tower_digest(base),
        "tower_config": vision.to_dict(),
        "feature_layer": feature_layers(base.config),
        "select_strategy": getattr(base.config, "vision_feature_select_strategy", "default"),  # VipLLaVA has none
        "image_processor": {"class": type(image_processor).__name__, **image_processor.to_dict()},
        "image_aspect_ratio": aspect_ratio,
        "precision": precision,
    }


def facts_key(facts: dict[str, Any]) -> str:
    """The name of the subfolder for these facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def tower_digest(base: Any) -> str:
    """SHA-256 over names, types, shapes and values of the tower's tensors.

    Under ZeRO-3, where each process holds a part of them, all processes must call it.
    """
    digest = hashlib.sha256()
    tower = family_of(base).vision(base)
    for name, tensor in sorted([*tower.named_parameters(), *tower.named_buffers()], key=lambda item: item[0]):
        values = _whole(tensor).detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _whole(tensor: Tensor) -> Tensor:
    if not hasattr(tensor, "ds_id"):
        return tensor
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([tensor]):
        return tensor.detach().clone()
