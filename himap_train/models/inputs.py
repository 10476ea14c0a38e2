"""Inputs that a pruned decoder cannot run on are refused, with the way out."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from himap_train.models.cache import check_cache
from himap_train.models.families.base import Family
from himap_train.models.versions import given_cache

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_OF_THE_HEAD = ("num_items_in_batch", "ignore_index", "shift_labels", "logits_to_keep")
"""What stock heads and trainers give to the loss; the heads hand all of it on to the decoder."""
_NO_CHANGE: dict[str, tuple[Any, ...]] = {
    "return_dict": (True,),
    "output_router_logits": (False,),
    "is_causal": (True,),
}
"""Options with the values under which they ask for what the loop does anyway."""
_NO_MAPS = "output_attentions is not available under pruning: the layers have different lengths"
_OTHER_MEDIA = ("video", "audio", "second_per_grid", "input_features")


def check_media(family: Family, config: Any, given: dict[str, Any]) -> None:
    """Refuse what is neither text nor image: it would be in no mask, and pruned as text or never.

    Args:
        family: Family of the model.
        config: Configuration of the model.
        given: What the inner model's forward was called with.

    Raises:
        ValueError: Names what it is.
    """
    named = {**given, **given.get("kwargs", {}), **(given.get("mm_encoder_outputs") or {})}
    found = [name for name, value in named.items() if value is not None and any(m in name for m in _OTHER_MEDIA)]
    ids, video_id = given.get("input_ids"), getattr(config, "video_token_id", None)
    cache = given_cache(named)
    if ids is not None and video_id is not None and (cache is None or not cache.get_seq_length()):
        found += ["video tokens in input_ids"] if bool((ids == video_id).any()) else []
    if found:
        raise ValueError(
            f"pruning in family {family.name} is for images and text, but there are {', '.join(sorted(found))}; leave "
            "them out, or run the model dense: remove_pruning(model)"
        )


def check_image_mask(image_token_mask: Tensor | None, inputs_embeds: Tensor) -> Tensor:
    """Where the image tokens of a prefill are, (B, S) bool on the device of the embeddings (B, S, D).

    Raises:
        ValueError: They are not given, or not one entry per token.
    """
    if image_token_mask is None:
        raise ValueError(
            "the decoder is pruned but was not told where the image tokens are; call the model itself "
            "with input_ids, or pass image_token_mask (B, S) with inputs_embeds, to the model or to generate()"
        )
    if image_token_mask.shape != inputs_embeds.shape[:2]:
        raise ValueError(
            f"image_token_mask has shape {tuple(image_token_mask.shape)}, the batch {tuple(inputs_embeds.shape[:2])}; "
            "pass one entry per token"
        )
    return image_token_mask.to(inputs_embeds.device).bool()


def check_options(family: Family, options: dict[str, Any]) -> None:
    """Refuse every keyword that nothing reads: a swallowed one is a silently wrong model.

    Args:
        family: Family of the model.
        options: What the decoder was called with beside what the loop has read.

    Raises:
        ValueError: Names the keyword.
    """
    for name, value in options.items():
        if value is None or name in _OF_THE_HEAD:
            continue
        if name == "output_attentions" and value:
            raise ValueError(_NO_MAPS)
        if name in _PACKED:
            raise ValueError(f"packed rows ({name}) cannot be pruned: pass one sequence per row")
        if name != "output_attentions" and not any(value is same for same in _NO_CHANGE.get(name, ())):
            raise ValueError(
                f"{name} means nothing to a pruned decoder of family {family.name}, and is not ignored in silence; "
                "leave it out, or run the model dense: remove_pruning(model)"
            )


def check_inputs(
    decoder: Any,
    attention_mask: Any,
    position_ids: Tensor | None,
    cache: Cache | None,
    inputs_embeds: Tensor,
) -> None:
    """Refuse what would be computed wrongly.

    Args:
        decoder: The text decoder.
        attention_mask: As the caller passed it.
        position_ids: As the caller passed it.
        cache: As the caller passed it.
        inputs_embeds: (B, S, D), the new tokens.

    Raises:
        ValueError: With the way out.
    """
    if decoder.config.output_attentions:
        raise ValueError(f"{_NO_MAPS}; the decoder's config asks for it")
    if cache is not None:
        check_cache(cache)  # first: a static cache brings a mask of its own
    if not inputs_embeds.numel():
        raise ValueError(f"an empty batch: inputs of shape {(*inputs_embeds.shape[:2],)}, expected a row and a token")
    total_length = inputs_embeds.shape[1] + (0 if cache is None else cache.get_seq_length())
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2):
        raise ValueError("a pruned decoder builds its own masks: pass attention_mask as (batch, length), 0 at padding")
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
