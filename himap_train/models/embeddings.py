"""Text and images as one sequence of embeddings, and what all processes must run alike to get it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration


def weights_are_spread(base: nn.Module) -> bool:
    """Whether ZeRO-3 keeps the weights: then all processes must call the same modules in the same order, or hang."""
    return hasattr(next(base.parameters()), "ds_id")


def encode_nothing(base: LlavaForConditionalGeneration) -> Tensor:
    """Features (tokens, D) of an empty image: what a batch of text runs where other processes run images."""
    vision: Any = base.config.vision_config
    blank = torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size, device=base.device)
    features = base.model.get_image_features(pixel_values=blank.to(base.model.vision_tower.dtype)).pooler_output
    return torch.cat(list(features))


def merged_embeddings(
    base: LlavaForConditionalGeneration, input_ids: Tensor, pixel_values: Tensor | None, encoded: dict[str, Any] | None
) -> Tensor:
    """Embeddings (B, S, D) with image features in their places.

    The same modules in the same order for every kind of batch: in training every rank must call the same ones, forward
    and backward, and give every parameter a gradient, or ZeRO-3 hangs and DDP stops.
    """
    if encoded is None and pixel_values is not None and pixel_values.shape[0] > 0:
        encoded = {"image": base.model.get_image_features(pixel_values=pixel_values)}
    unused = None
    if encoded is None and (torch.is_grad_enabled() or weights_are_spread(base)):
        unused = encode_nothing(base)
    embeddings: Tensor = base.get_input_embeddings()(input_ids)
    if encoded is not None:
        features = torch.cat(list(encoded["image"].pooler_output)).to(embeddings.device, embeddings.dtype)
        places = base.model.get_placeholder_mask(input_ids, inputs_embeds=embeddings, image_features=features)
        return embeddings.masked_scatter(places, features)
    return embeddings if unused is None else embeddings + 0 * unused.sum().to(embeddings.dtype)
