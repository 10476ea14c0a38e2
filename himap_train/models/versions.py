"""What differs between the releases of transformers that work here, 5.20 to 5.24: said once, by what a release has."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.utils import output_capturing

CACHE = "cache" if "cache" in inspect.signature(LlamaDecoderLayer.forward).parameters else "past_key_values"
"""The keyword of the key-value cache, and its name in outputs; 5.24 renamed it in all decoders."""


def given_cache(given: Mapping[str, Any]) -> Cache | None:
    """The cache among keyword arguments, by either name."""
    return given.get("past_key_values") if given.get("cache") is None else given["cache"]


def feature_layers(config: Any) -> int | list[int] | tuple[int, ...]:
    """Layers of the vision tower that the projector takes; -1 where a config does not say."""
    # VipLLaVA's had a plural of its own before 5.23
    named = [getattr(config, name, None) for name in ("vision_feature_layer", "vision_feature_layers")]
    return next((layers for layers in named if layers is not None), -1)


def asked_states(layers: int | list[int] | tuple[int, ...]) -> bool | int | list[int] | tuple[int, ...]:
    """What `output_hidden_states` of a tower takes to give at least these layers."""
    # towers that keep only what is asked for counted no layer from the end before there was this function
    return layers if hasattr(output_capturing, "select_hidden_states") else True


def chosen_states(states: tuple[Tensor, ...], asked: bool | int | list[int] | tuple[int, ...]) -> tuple[Any, ...]:
    """The states that `output_hidden_states` asks for, None in other places; before 5.23 it asks for all or none."""
    if isinstance(asked, bool) or not hasattr(output_capturing, "select_hidden_states"):
        return states
    indices = [asked] if isinstance(asked, int) else asked
    wanted = {index % len(states) for index in indices if -len(states) <= index < len(states)}
    return tuple(state if number in wanted else None for number, state in enumerate(states))


def decoder_output(
    hidden: Tensor, cache: Cache | None, states: tuple[Any, ...] | None = None
) -> BaseModelOutputWithPast:
    """What a text decoder returns.

    Args:
        hidden: (B, S, D), normed.
        cache: Filled, or None.
        states: (B, S, D) before each layer and at the end, where they are asked for.
    """
    named: dict[str, Any] = {CACHE: cache}
    return BaseModelOutputWithPast(last_hidden_state=hidden, hidden_states=states, **named)


def checkpoint_activations(decoder: Any) -> None:
    """Let a text decoder run its layers again in the backward pass, in training mode, without reentrant autograd."""
    # 5.23 gave it its present name
    enable = getattr(decoder, "activation_checkpointing_enable", None) or decoder.gradient_checkpointing_enable
    enable({"use_reentrant": False})
