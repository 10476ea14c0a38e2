"""A stock LLaVA in and out of pruning: load it, install a schedule, record what is kept, remove it again.

`install_pruning` puts two functions on the instance and leaves classes, weights and state dict alone: the model's own
`forward`, which tells the decoder where the image tokens and the answers are, and the decoder's (see `decoder`). No
hook is used, because Lightning's DeepSpeed strategy takes every hook off every module before each validation.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from himap_train.models.attention import PREFIX, register_attention
from himap_train.models.decoder import DECODERS, pruned_forward
from himap_train.models.embeddings import merged_embeddings
from himap_train.models.installed import InstalledPruning, PruningTrace
from himap_train.models.loading import load_llava
from himap_train.pruning.schedule import PruningSchedule

__all__ = [
    "base_llava",
    "change_schedule",
    "hidden_states",
    "install_pruning",
    "load_llava",
    "pruning_of",
    "record_pruning",
    "remove_pruning",
]
_SIGNATURE = inspect.signature(LlavaForConditionalGeneration.forward)


def base_llava(model: nn.Module) -> LlavaForConditionalGeneration:
    """The LLaVA itself, also from inside a PeftModel.

    Raises:
        TypeError: If there is none.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, LlavaForConditionalGeneration):
        raise TypeError(
            f"expected a LlavaForConditionalGeneration (or a PeftModel around one), got {type(base).__name__}"
        )
    return base


def pruning_of(model: nn.Module) -> InstalledPruning | None:
    """What is installed on a model, None where it is stock."""
    return getattr(_decoder(model), "himap_pruning", None)


def install_pruning(model: nn.Module, schedule: PruningSchedule) -> Any:
    """Prune image tokens inside the decoder of `model` from now on, in every forward and in `generate`.

    Args:
        model: A LlavaForConditionalGeneration or a PeftModel around one. A schedule that it has is replaced.
        schedule: What to remove where. Without stages the model computes bit for bit what the stock model does.

    Returns:
        The same object.

    Raises:
        TypeError: If `model` is not a LLaVA.
        ValueError: If its decoder or attention implementation is not supported, or a stage lies outside the decoder.
    """
    base, decoder = base_llava(model), _decoder(model)
    if type(decoder) not in DECODERS:
        names = ", ".join(cls.__name__ for cls in DECODERS)
        raise ValueError(f"the text decoder is a {type(decoder).__name__}; pruning works with {names}")
    schedule.validate_for(decoder.config.num_hidden_layers)
    remove_pruning(model)
    stock_attention = decoder.config._attn_implementation
    decoder.config._attn_implementation = register_attention(stock_attention)
    decoder.himap_pruning = InstalledPruning(schedule, stock_attention)
    # Partials, not closures: a deep copy of the model then runs on the copy's own weights, and it can be pickled.
    decoder.forward = partial(pruned_forward, decoder)
    base.forward = partial(_llava_forward, base)
    return model


def remove_pruning(model: nn.Module) -> Any:
    """Give the stock model back; nothing happens if it is stock already. Returns the same object."""
    base, decoder = base_llava(model), _decoder(model)
    pruning = pruning_of(model)
    if pruning is not None:
        if decoder.config._attn_implementation == PREFIX + pruning.stock_attention:  # else it was changed since
            decoder.config._attn_implementation = pruning.stock_attention
        del decoder.himap_pruning, decoder.forward, base.forward
    return model


def change_schedule(model: nn.Module, schedule: PruningSchedule, ratios: Tensor | None = None) -> None:
    """Run another schedule from the next forward on, where one is installed; nothing is installed anew.

    Args:
        model: As in `install_pruning`.
        schedule: What runs.
        ratios: Its keep ratio of each layer, (layers,) fp32, where these get a gradient; see `pruning.marginal`. The
            schedule then has a stage at each layer from its first on.

    Raises:
        ValueError: Nothing is installed, or a stage lies outside the decoder.
    """
    pruning = pruning_of(model)
    if pruning is None:
        raise ValueError("no schedule to change: call install_pruning(model, schedule) first")
    schedule.validate_for(_decoder(model).config.num_hidden_layers)
    pruning.schedule, pruning.ratios, pruning.last = schedule, ratios, None


@contextmanager
def record_pruning(model: nn.Module) -> Iterator[PruningTrace]:
    """Record what the last prefill or training forward inside the block keeps.

    Raises:
        ValueError: If no schedule is installed.
    """
    pruning = pruning_of(model)
    if pruning is None:
        raise ValueError("nothing to record: call install_pruning(model, schedule) first")
    trace = PruningTrace()
    pruning.traces.append(trace)
    try:
        yield trace
    finally:
        # By identity: two traces that have recorded nothing yet are equal.
        pruning.traces[:] = [other for other in pruning.traces if other is not trace]


def hidden_states(
    model: nn.Module,
    *,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    pixel_values: Tensor | None = None,
    labels: Tensor | None = None,
    mm_encoder_outputs: dict[str, Any] | None = None,
    image_features: Tensor | None = None,
) -> Tensor:
    """Final decoder states (B, S, D), normed; rows of dropped tokens are zero. For losses that need few rows of logits.

    Args:
        model: LLaVA or PeftModel around one, pruned or stock.
        input_ids: (B, S), image placeholders expanded.
        attention_mask: (B, S), 0 at padding.
        pixel_values: (images, 3, height, width); None or no images for a batch of text alone.
        labels: (B, S), -100 where nothing is predicted.
        mm_encoder_outputs: Image features computed before, as the stock forward takes them.
        image_features: (images, tokens, width), what the projector takes (see `tower_features`), in place of
            `pixel_values`: the vision tower does not run. Of no images, (0, tokens, width), for a batch of text alone.
    """
    base = base_llava(model)
    merged = merged_embeddings(base, input_ids, pixel_values, mm_encoder_outputs, image_features)
    inputs: dict[str, Any] = {"inputs_embeds": merged, "attention_mask": attention_mask, "use_cache": False}
    if pruning_of(base) is not None:
        inputs |= _masks(base, input_ids, labels)
    return base.model(**inputs).last_hidden_state


def _masks(base: LlavaForConditionalGeneration, input_ids: Tensor, labels: Tensor | None) -> dict[str, Tensor | None]:
    """What the pruned decoder must know beside its stock inputs."""
    return {
        "image_token_mask": input_ids == base.config.image_token_id,
        "supervised_mask": None if labels is None else labels != -100,
    }


@wraps(LlavaForConditionalGeneration.forward, assigned=("__doc__",))  # its signature; the name stays, for pickle
def _llava_forward(self: LlavaForConditionalGeneration, *args: Any, **kwargs: Any) -> Any:
    """The stock forward, which passes keyword arguments that it does not know on to the decoder."""
    given = _SIGNATURE.bind_partial(self, *args, **kwargs).arguments
    input_ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if input_ids is None and embeds is not None and "image_token_mask" not in kwargs:
        input_ids = _placeholder_ids(self, embeds, given)
    if input_ids is not None:
        kwargs = _masks(self, input_ids, given.get("labels")) | kwargs
    return type(self).forward(self, *args, **kwargs)


def _placeholder_ids(base: LlavaForConditionalGeneration, embeds: Tensor, given: dict[str, Any]) -> Tensor | None:
    """Ids (B, S) that mark the placeholders among embeddings; None where the caller merged the images already."""
    if given.get("pixel_values") is None and given.get("mm_encoder_outputs") is None:
        return None
    image_id = base.config.image_token_id
    placeholder = base.get_input_embeddings()(torch.tensor(image_id, device=embeds.device))
    return torch.where((embeds == placeholder).all(-1), image_id, image_id + 1)


def _decoder(model: nn.Module) -> Any:
    return cast(Any, base_llava(model).model.language_model)
