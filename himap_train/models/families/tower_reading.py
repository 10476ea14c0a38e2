"""What a CLIP or SigLIP tower looks at, from its states: for methods that rank image tokens by it.

Read is the layer whose output the projector takes (of several the deepest). Its queries and keys are computed once
more: a hundredth of the tower, where attention maps would slow all of its layers down.

Shapes: C crops, T patches and class token, W width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from himap_train.models.versions import asked_states, feature_layers

TOWERS = ("clip_vision_model", "siglip_vision_model")
"""`model_type` of the vision configs whose towers are built alike."""
_ROWS = 128
"""Rows of attention in memory at once."""


def read_layer(config: Any) -> int:
    """Number of the layer that is read, and place of its input in the tower's hidden states; config of the model.

    Raises:
        ValueError: The projector takes the patch embeddings, which come before all layers.
    """
    layers, depth = feature_layers(config), config.vision_config.num_hidden_layers
    deepest = max(layer % (depth + 1) for layer in ([layers] if isinstance(layers, int) else layers))
    if deepest == 0:
        raise ValueError("the projector takes the tower's patch embeddings: there is no attention before to rank by")
    return deepest - 1


@torch.no_grad()
def read_crops(config: Any, tower: Any, states: Any, class_token: bool, drops_first: bool) -> Tensor:
    """Attention that each patch receives and its key, both means over heads: (C, T, 1 + W) fp32.

    Args:
        config: Of the model.
        tower: Of one of the kinds in `TOWERS`.
        states: Its hidden states; the input of `read_layer` is read.
        class_token: Whether the first token is one, which then ranks; it counts as seen most itself.
        drops_first: Whether the projector is not given the first token.
    """
    before = read_layer(config)
    layer = next(part for name, part in tower.named_modules() if name.endswith("encoder.layers"))[before]
    attention, normed = layer.self_attn, layer.layer_norm1(states[before])
    query, key = (
        projection(normed).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj)
    )
    rows = query[:, :, :1] if class_token else query
    total = torch.zeros(normed.shape[:2], device=normed.device)
    for part in rows.split(_ROWS, dim=2):
        logits = (part @ key.transpose(2, 3)).float() * attention.scale
        total += logits.softmax(-1).sum((1, 2))
    score = total / (attention.num_heads * rows.shape[2])
    if class_token:
        score[:, 0] = 1.0
    readings = torch.cat([score.unsqueeze(2), key.float().mean(1)], dim=2)
    return readings[:, drops_first:]


def with_readings(family: Any, base: Any, images: Any, encode: Callable[..., Any]) -> Any:
    """What `encode` gives, `get_image_features` with all it takes of `images` but `output_hidden_states`; on it, as
    `tower_readings`, what `Family.read_tower` reads.
    """
    encoded = encode(output_hidden_states=states_to_read(base.config, images.get("vision_feature_layer")))
    encoded.tower_readings = family.read_tower(base, images, encoded.hidden_states)
    return encoded


def states_to_read(config: Any, other: Any = None) -> Any:
    """What `output_hidden_states` must be: features and what is read; all where `other` layers are taken."""
    layers = feature_layers(config)
    asked = [read_layer(config), *([layers] if isinstance(layers, int) else layers)]
    return True if other is not None else asked_states(asked)


def feature_width(config: Any) -> int:
    """Width of what the projector takes."""
    layers = feature_layers(config)
    return int((1 if isinstance(layers, int) else len(layers)) * config.vision_config.hidden_size)


def packed(features: Tensor, readings: Tensor) -> Tensor:
    """Features (..., W) and readings (..., R) fp32 in one tensor of the features' dtype: every bit of both is kept."""
    return torch.cat([features, readings.contiguous().view(features.dtype)], dim=-1)


def unpacked(stored: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """Features (..., `width`), and the readings where `packed` has put them beside."""
    if stored.shape[-1] == width:
        return stored, None
    return stored[..., :width].contiguous(), stored[..., width:].contiguous().view(torch.float32)
