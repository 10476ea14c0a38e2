"""Final decoder states for losses, and what all processes must run alike to get them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from himap_train.models.attention import OwnAttention
from himap_train.models.families import family_of
from himap_train.models.families.base import Images
from himap_train.models.families.tower_reading import packed, unpacked, with_readings
from himap_train.models.stock import base_model
from himap_train.models.tower import cached_width


def weights_are_spread(base: nn.Module) -> bool:
    """Whether ZeRO-3 keeps the weights: then all processes must call the same modules in the same order, or hang."""
    return hasattr(next(base.parameters()), "ds_id")


@contextmanager
def own_weights_whole(base: Any) -> Iterator[None]:
    """Inside, what the inner model holds itself (LLaVA-NeXT's `image_newline`) is whole under ZeRO-3 too.

    DeepSpeed gathers a weight for the forward of its module, and images are encoded outside that of the model:
    `generate` does so once for all beams. All processes must come here together.
    """
    with whole_weights(base.model.parameters(recurse=False)):
        yield


@contextmanager
def whole_weights(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, those of the weights that ZeRO-3 spreads are whole. All processes must come here together."""
    spread = [weight for weight in weights if hasattr(weight, "ds_id")]
    if not spread:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(spread):
        yield


def hidden_states(
    model: nn.Module,
    *,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    images: Images | None = None,
    labels: Tensor | None = None,
    mm_encoder_outputs: dict[str, Any] | None = None,
    image_features: Tensor | None = None,
    own_attention: OwnAttention | None = None,
) -> Tensor:
    """Final decoder states (B, S, D), normed; rows of dropped tokens are zero. For losses that need few rows of logits.

    The same modules in the same order for every kind of batch: in training every rank must call the same ones, forward
    and backward, and give every parameter a gradient, or ZeRO-3 hangs and DDP stops. With the tower's features given,
    if only those of no image, no rank calls the tower.

    Args:
        model: A model of a known family or a PeftModel around one, pruned or stock.
        input_ids: (B, S), image placeholders expanded.
        attention_mask: (B, S), 0 at padding.
        images: As the family's forward takes them, by keyword; None or empty for a batch of text alone.
        labels: (B, S), -100 where nothing is predicted.
        mm_encoder_outputs: Image features computed before, as the stock forward takes them.
        image_features: (tokens of all images, width), what `features_to_cache` gave, in place of pixels: the vision
            tower does not run. Of no images, (0, width), for a batch of text alone.
        own_attention: What computes the attention in the kernel's place, where a schedule without stages is installed.
    """
    base = base_model(model)
    family = family_of(base)
    images = images or {}
    encoded = None
    if mm_encoder_outputs is not None:
        encoded = mm_encoder_outputs["image"]
    elif image_features is not None and len(image_features) > 0:
        encoded = _from_cache(base, image_features)
    elif image_features is None and images:
        with own_weights_whole(base):
            encoded = family.encode_images(base, images)
    elif torch.is_grad_enabled() or weights_are_spread(base):
        if image_features is None:
            with own_weights_whole(base):
                encoded = _without_rows(encode_nothing(base))
        elif family.projects_cached:
            blank = image_features.new_zeros(1, image_features.shape[-1])
            encoded = _without_rows(_from_cache(base, blank))
    inputs: dict[str, Any] = family.forward_inputs(base.config, input_ids, images) | family.position_inputs(images)
    if encoded is not None:
        inputs["mm_encoder_outputs"] = {"image": encoded}
    if labels is not None and getattr(family.decoder(base), "himap_pruning", None) is not None:
        inputs["supervised_mask"] = labels != -100
    if own_attention is not None:
        inputs["own_attention"] = own_attention
    hidden: Tensor = base.model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs
    ).last_hidden_state
    return hidden


def prompt_inputs(base: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """A batch of prompts (`input_ids`, `attention_mask`, `images`) as `forward` and `generate` take it."""
    given = {name: batch[name] for name in ("input_ids", "attention_mask")} | batch["images"]
    given |= family_of(base).forward_inputs(base.config, batch["input_ids"], batch["images"])
    return {name: values.to(base.device) for name, values in given.items()}


def encode_nothing(base: Any) -> Any:
    """Features of an empty image: what a batch of text runs where other processes run images."""
    family = family_of(base)
    return family.encode_images(base, family.empty_images(base))


def encode_and_read(base: Any, images: Images) -> Any:
    """As `Family.encode_images`, with what the tower looks at where the family tells: for any schedule that follows."""
    family = family_of(base)
    if base.config.vision_config.model_type not in family.towers:
        return family.encode_images(base, images)
    return with_readings(family, base, images, partial(base.get_image_features, **images, return_dict=True))


def features_to_cache(base: Any, images: Images, readings: bool = False) -> list[Tensor]:
    """What can be kept of each of these images in place of its pixels, (T, W): the tower's features, where the family
    `projects_cached`; else, of one image, all that the decoder gets of it. `readings`: what the tower looks at as well,
    as a schedule needs that `uses_tower`, which then must be installed.
    """
    family = family_of(base)
    if family.projects_cached:
        return list(family.tower_features(base, images, readings))
    with own_weights_whole(base):
        encoded = family.encode_images(base, images)
    planes = encoded.pooler_output, *(getattr(encoded, "deepstack_features", None) or ())
    features = torch.cat([_in_a_row(plane) for plane in planes], dim=-1)
    return [packed(features, encoded.tower_readings) if readings else features]


def _from_cache(base: Any, stored: Tensor) -> Any:
    """Encoded images from `features_to_cache` of all of them, one behind the other."""
    family, config = family_of(base), base.config
    features, readings = unpacked(stored.to(base.device), cached_width(config))
    if family.projects_cached:
        features = family.project(base, features)
    joined = family.joins_images(config)
    planes: Any = [plane if joined else [plane] for plane in features.split(config.text_config.hidden_size, dim=-1)]
    encoded: Any = BaseModelOutputWithPooling(pooler_output=planes[0])
    encoded.tower_readings = readings
    if planes[1:]:
        encoded.deepstack_features = planes[1:]
    return encoded


def _in_a_row(nested: Any) -> Tensor:
    """(N, D) of features that come an image or a tile at a time."""
    return (nested if isinstance(nested, Tensor) else torch.cat(list(nested))).flatten(0, -2)


def _without_rows(encoded: Any) -> Any:
    """The features of no image, from those of one: merged as any are, so that the backward pass is in the same order
    too, and gives what made them gradients of zero.
    """
    none = copy(encoded)
    none.pooler_output = _no_rows(encoded.pooler_output)
    if getattr(encoded, "tower_readings", None) is not None:
        none.tower_readings = encoded.tower_readings[:0]
    if getattr(encoded, "deepstack_features", None) is not None:
        none.deepstack_features = _no_rows(encoded.deepstack_features)
    return none


def _no_rows(nested: Any) -> Any:
    return nested[:0] if isinstance(nested, Tensor) else [_no_rows(part) for part in nested]
