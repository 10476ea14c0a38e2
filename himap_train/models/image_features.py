"""The two halves of transformers' `LlavaModel.get_image_features`: the vision tower, then the projector.

Apart, because the tower's half is the same in every epoch and can be kept on disk, while the projector is trained.
N images, T tokens an image, W width of what the projector takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration


def tower_features(base: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """What the projector takes, (N, T, W), in the dtype in which it computes.

    Args:
        base: The LLaVA.
        pixel_values: (N, 3, height, width).
    """
    # Copied from transformers 5.23 LlavaModel.get_image_features, whose decorator turns the config's layers into
    # `output_hidden_states`; changes marked "HiMAP:".
    layers: Any = base.config.vision_feature_layer
    strategy = base.config.vision_feature_select_strategy
    outputs = base.model.vision_tower(pixel_values, return_dict=True, output_hidden_states=layers)
    chosen = [outputs.hidden_states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    if strategy == "default":
        chosen = [states[:, 1:] for states in chosen]
    features = torch.cat(chosen, dim=-1)
    # HiMAP: under autocast the tower's residual stream may be wider than the projector's first product, which rounds it
    # in any case.
    device = features.device.type
    return features.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else features


def project(base: LlavaForConditionalGeneration, features: Tensor) -> Tensor:
    """Image features (N * T, D) of the decoder's width from those of the tower (N, T, W)."""
    projected: Tensor = base.model.multi_modal_projector(features.to(base.device))
    return projected.flatten(0, 1)


def encode(base: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """Image features (tokens of all images, D) through both halves, as the stock model computes them."""
    return torch.cat(list(base.model.get_image_features(pixel_values=pixel_values).pooler_output))


def encode_nothing(base: LlavaForConditionalGeneration) -> Tensor:
    """Features (tokens, D) of an empty image: what a batch of text runs where other processes run images."""
    return encode(base, empty_image(base))


def empty_image(base: LlavaForConditionalGeneration) -> Tensor:
    """(1, 3, height, width) of zeros, on the model's device."""
    vision: Any = base.config.vision_config
    blank = torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size, device=base.device)
    return blank.to(base.model.vision_tower.dtype)
