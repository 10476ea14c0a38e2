"""A stock model in and out of pruning: install a schedule, record what is kept, remove it again.

`install_pruning` puts three functions on the instance and leaves classes, weights and state dict alone: the forward of
the whole model, which knows the answers from the labels; that of the inner model (`model.model`), which fused losses
and other trainers call directly and which knows where the images are; and the decoder's (see `decoder`). No hook is
used, because Lightning's DeepSpeed strategy takes every hook off every module before each validation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from himap_train.models.attention import PREFIX, register_attention
from himap_train.models.decoder import pruned_forward
from himap_train.models.families import family_of
from himap_train.models.families.base import Family
from himap_train.models.inputs import check_media
from himap_train.models.installed import InstalledPruning, PruningTrace
from himap_train.models.stock import base_model, text_decoder
from himap_train.pruning.schedule import PruningSchedule


def pruning_of(model: nn.Module) -> InstalledPruning | None:
    """What is installed on a model, None where it is stock."""
    return getattr(text_decoder(model), "himap_pruning", None)


def install_pruning(model: nn.Module, schedule: PruningSchedule, cpu_blocks: bool = True) -> Any:
    """Prune image tokens inside the decoder of `model` from now on, in every forward and in `generate`.

    Args:
        model: A stock model of a known family (see `himap_train.models.families`) or a PeftModel around one. A schedule
            that it has is replaced.
        schedule: What to remove where. Without stages the model computes bit for bit what the stock model does.
        cpu_blocks: Whether SDPA runs in blocks on a CPU, see `cpu_attention`.

    Returns:
        The same object.

    Raises:
        TypeError: If `model` is of no known family.
        ValueError: If its decoder or attention implementation is not supported, a stage lies outside the decoder, or
            the family cannot do what the schedule asks for.
    """
    base, decoder = base_model(model), text_decoder(model)
    family = family_of(base)
    check_decoder(family, decoder)
    check_schedule(family, decoder, schedule)
    remove_pruning(model)
    stock_attention = decoder.config._attn_implementation
    decoder.config._attn_implementation = register_attention(stock_attention)
    decoder.himap_pruning = InstalledPruning(
        schedule, family, family.image_token_id(base.config), stock_attention, cpu_blocks=cpu_blocks
    )
    # Objects, not closures: a deep copy of the model then runs on the copy's own weights, and it can be pickled.
    decoder.forward = partial(pruned_forward, decoder)
    base.model.forward = _Forward(_inner_forward, base.model)
    base.forward = _Forward(_whole_forward, base)
    return model


def remove_pruning(model: nn.Module) -> Any:
    """Give the stock model back; nothing happens if it is stock already. Returns the same object."""
    base, decoder = base_model(model), text_decoder(model)
    pruning = pruning_of(model)
    if pruning is not None:
        if decoder.config._attn_implementation == PREFIX + pruning.stock_attention:  # else it was changed since
            decoder.config._attn_implementation = pruning.stock_attention
        del decoder.himap_pruning, decoder.forward, base.model.forward, base.forward
    return model


def check_decoder(family: Family, decoder: nn.Module) -> None:
    """Raise ValueError where the layer loop does not run a decoder of this kind."""
    config: Any = decoder.config
    if config.model_type not in family.decoder_types:
        raise ValueError(
            f"the text decoder is a {type(decoder).__name__} ({config.model_type}); pruning works in family "
            f"{family.name} with {', '.join(family.decoder_types)}"
        )


def check_schedule(family: Family, decoder: nn.Module, schedule: PruningSchedule) -> None:
    """Raise ValueError where a schedule does not fit a decoder, or its family cannot do what it asks for."""
    config: Any = decoder.config
    schedule.validate_for(config.num_hidden_layers)
    if schedule.positions == "renumber" and not family.renumbers:
        raise ValueError(
            f"positions 'renumber' is not defined for family {family.name}, whose position numbers have three axes: "
            "give positions 'keep'"
        )


def change_schedule(model: nn.Module, schedule: PruningSchedule) -> None:
    """Run another schedule from the next forward on, where one is installed; nothing is installed anew.

    Raises:
        ValueError: Nothing is installed, or the schedule does not fit.
    """
    _changeable(model, schedule).schedule = schedule


@contextmanager
def running(model: nn.Module, schedule: PruningSchedule, ratios: Tensor | None = None) -> Iterator[None]:
    """Run another schedule inside the block; afterwards the model has its own back. A backward may come after it.

    Args:
        model: As in `install_pruning`.
        schedule: What runs.
        ratios: Its keep ratio of each layer, (layers,) fp32, where these get a gradient; see `pruning.learned`. The
            schedule then has a stage at each layer from its first on.

    Raises:
        ValueError: Nothing is installed, or the schedule does not fit.
    """
    pruning = _changeable(model, schedule)
    own = pruning.schedule, pruning.ratios
    # No counts: a dense schedule leaves none, and would seem to keep what the last one did.
    pruning.schedule, pruning.ratios, pruning.last = schedule, ratios, None
    try:
        yield
    finally:
        pruning.schedule, pruning.ratios = own


def _changeable(model: nn.Module, schedule: PruningSchedule) -> InstalledPruning:
    """What is installed, and can run a schedule; errors as `change_schedule` says."""
    pruning = pruning_of(model)
    if pruning is None:
        raise ValueError("no schedule to change: call install_pruning(model, schedule) first")
    check_schedule(pruning.family, text_decoder(model), schedule)
    return pruning


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


class _Forward:
    """A forward in the place of a model's own, with the signature of that one: `generate` looks at it."""

    def __init__(self, forward: Callable[..., Any], module: nn.Module) -> None:
        self.forward, self.module = forward, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        stock = _signature(type(self.module).forward)
        return stock.replace(parameters=list(stock.parameters.values())[1:])


def _given(self: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a call of the stock forward was given, by name."""
    return _signature(type(self).forward).bind_partial(self, *args, **kwargs).arguments


_signature = cache(inspect.signature)


def _whole_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The stock forward, which passes keyword arguments that it does not know on to the inner model."""
    labels = _given(self, args, kwargs).get("labels")
    if labels is not None and "supervised_mask" not in kwargs:
        kwargs["supervised_mask"] = labels != -100
    return type(self).forward(self, *args, **kwargs)


def _inner_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The inner model's forward, which passes keyword arguments that it does not know on to the decoder."""
    given, pruning = _given(self, args, kwargs), self.language_model.himap_pruning
    if not pruning.schedule.dense:
        check_media(pruning.family, self.config, given)
    if "image_token_mask" not in kwargs:
        where = _image_tokens(self, given)
        if where is not None:
            kwargs["image_token_mask"] = where
    return type(self).forward(self, *args, **kwargs)


def _image_tokens(inner: Any, given: dict[str, Any]) -> Tensor | None:
    """Where the images are, (B, S) bool; None where the caller merged them into the embeddings already."""
    image_id = inner.config.image_token_id
    if given.get("input_ids") is not None:
        return cast(Tensor, given["input_ids"] == image_id)
    embeds = given.get("inputs_embeds")
    if embeds is None or (given.get("pixel_values") is None and given.get("mm_encoder_outputs") is None):
        return None
    placeholder = inner.get_input_embeddings()(torch.tensor(image_id, device=embeds.device))
    return cast(Tensor, (embeds == placeholder).all(-1))
