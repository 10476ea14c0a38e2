"""Inputs that a pruned decoder cannot run on are refused, with the way out."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from himap_train.models.cache import check_cache


def check_image_mask(image_token_mask: Tensor | None, inputs_embeds: Tensor) -> Tensor:
    """Where the image tokens of a prefill are, (B, S) bool on the device of the embeddings (B, S, D).

    Raises:
        ValueError: They are not given, or not one entry per token.
    """
    if image_token_mask is None:
        raise ValueError(
            "the decoder is pruned but was not told where the image tokens are; call the model itself "
            "with input_ids, or pass image_token_mask (B, S) with inputs_embeds"
        )
    if image_token_mask.shape != inputs_embeds.shape[:2]:
        raise ValueError(
            f"image_token_mask has shape {tuple(image_token_mask.shape)}, the batch {tuple(inputs_embeds.shape[:2])}; "
            "pass one entry per token"
        )
    return image_token_mask.to(inputs_embeds.device)


def check_inputs(
    decoder: Any,
    attention_mask: Any,
    position_ids: Tensor | None,
    cache: Cache | None,
    total_length: int,
    kwargs: dict[str, Any],
) -> None:
    """Refuse what would be computed wrongly; takes the options out of `kwargs` that it has dealt with.

    Args:
        decoder: The text decoder.
        attention_mask: As the caller passed it.
        position_ids: As the caller passed it.
        cache: As the caller passed it.
        total_length: Cached and new tokens of a row, as the caller counts them.
        kwargs: The caller's further options.

    Raises:
        ValueError: With the way out.
    """
    if cache is not None:
        check_cache(cache)  # first: a static cache brings a mask of its own
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2):
        raise ValueError("a pruned decoder builds its own masks: pass attention_mask as (batch, length), 0 at padding")
    if kwargs.pop("output_attentions", False):
        raise ValueError("output_attentions is not available under pruning: the layers have different lengths")
    if attention_mask is not None and attention_mask.shape[1] != total_length:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns, cache and new tokens make {total_length}; while "
            "training with gradient checkpointing nothing is cached: call model.eval() before generate()"
        )
    if position_ids is not None and attention_mask is None and cache is None:
        # transformers reads such numbers as several sequences packed into one row wherever they do not rise by one.
        if bool((position_ids.diff(dim=1) != 1).any()):
            raise ValueError("packed rows (position_ids that start again) cannot be pruned: pass one sequence per row")
    window = getattr(decoder.config, "sliding_window", None)
    if window is not None and total_length > window:
        raise ValueError(
            f"the sequence has {total_length} tokens, more than the decoder's sliding window of {window}; "
            "a window over pruned tokens is not defined: shorten the sequence"
        )
