"""Which vision tower and projector they are and what they are given: all that decides the features of an image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from himap_train.models.families import family_of, family_of_config
from himap_train.models.families.base import Family
from himap_train.models.families.tower_reading import feature_width
from himap_train.models.versions import feature_layers


def check_caches(family: Family, trains_projector: bool) -> None:
    """Raises ValueError where a family's features cannot be cached: other images change them, or what is kept comes
    behind a projector that is trained.
    """
    if not family.caches_features:
        raise ValueError(
            f"data.cache_image_features does not go with family {family.name}, which cuts an image otherwise where its "
            "conversation has several; set data.cache_image_features to null"
        )
    if trains_projector and not family.projects_cached:
        raise ValueError(
            f"data.cache_image_features keeps what the projector gives with family {family.name}, and the projector is "
            "trained; set model.projector to freeze, or data.cache_image_features to null"
        )


def check_frozen(base: Any) -> None:
    """Raises ValueError where features cannot be cached, as `check_caches` says or because the tower is trained."""
    family = family_of(base)
    projectors = [base.get_submodule(name) for name in family.projector_names]
    check_caches(family, any(weight.requires_grad for part in projectors for weight in part.parameters()))
    trained = [name for name, weight in family.vision(base).named_parameters() if weight.requires_grad]
    if trained:
        raise ValueError(
            f"data.cache_image_features needs a frozen vision tower; {len(trained)} of its tensors are trained, the "
            f"first is {trained[0]}. Freeze the tower, or set data.cache_image_features to null"
        )


def cached_width(config: Any) -> int:
    """Numbers kept of an image token: what the projector takes, or what it gives, with DeepStack's planes."""
    if family_of_config(config).projects_cached:
        return feature_width(config)
    planes = 1 + len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
    return int(planes * config.text_config.hidden_size)


def images_at_once(family: Family) -> int:
    """How many images the tower takes at a time while features are cached; one where each has a shape of its own."""
    return 32 if family.projects_cached else 1


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
    """SHA-256 over names, types, shapes and values of the tensors of the tower, and of the projector where what is kept
    comes behind it.

    Under ZeRO-3, where each process holds a part of them, all processes must call it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_makers(base), key=lambda item: item[0]):
        values = _whole(tensor).detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _makers(base: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of all that makes cached features."""
    family = family_of(base)
    tower = family.vision(base)
    yield from (*tower.named_parameters(), *tower.named_buffers())
    if not family.projects_cached:
        for place in family.projector_names:
            part = base.get_submodule(place)
            yield from ((f"{place}.{name}", tensor) for name, tensor in part.named_parameters())
        yield from base.model.named_parameters(recurse=False)


def _whole(tensor: Tensor) -> Tensor:
    if not hasattr(tensor, "ds_id"):
        return tensor
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([tensor]):
        return tensor.detach().clone()
