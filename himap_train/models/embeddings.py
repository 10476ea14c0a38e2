"""Text and images as one sequence of embeddings, and what all processes must run alike to get it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from himap_train.models.image_features import encode, encode_nothing, project


def weights_are_spread(base: nn.Module) -> bool:
    """Whether ZeRO-3 keeps the weights: then all processes must call the same modules in the same order, or hang."""
    return hasattr(next(base.parameters()), "ds_id")


def merged_embeddings(
    base: LlavaForConditionalGeneration,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    encoded: dict[str, Any] | None,
    image_features: Tensor | None,
) -> Tensor:
    """Embeddings (B, S, D) with image features in their places.

    The same modules in the same order for every kind of batch: in training every rank must call the same ones, forward
    and backward, and give every parameter a gradient, or ZeRO-3 hangs and DDP stops. With the tower's features given,
    if only those of no image, no rank calls the tower.
    """
    features = unused = None
    if encoded is not None:
        features = torch.cat(list(encoded["image"].pooler_output))
    elif image_features is not None and len(image_features) > 0:
        features = project(base, image_features)
    elif image_features is None and pixel_values is not None and len(pixel_values) > 0:
        features = encode(base, pixel_values)
    elif torch.is_grad_enabled() or weights_are_spread(base):
        unused = encode_nothing(base) if image_features is None else project(base, _one_row(image_features))
    embeddings: Tensor = base.get_input_embeddings()(input_ids)
    if features is not None:
        features = features.to(embeddings.device, embeddings.dtype)
        places = base.model.get_placeholder_mask(input_ids, inputs_embeds=embeddings, image_features=features)
        return embeddings.masked_scatter(places, features)
    return embeddings if unused is None else embeddings + 0 * unused.sum().to(embeddings.dtype)


def _one_row(image_features: Tensor) -> Tensor:
    """(0, T, W) -> (1, 1, W) of zeros."""
    return image_features.new_zeros(1, 1, image_features.shape[-1])
