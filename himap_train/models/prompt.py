"""What the prompt of a forward pass is: known, never guessed.

Only the prompt may choose what the model looks at. In training the labels say where it ends, and the forward of the
whole model sees them; in `generate` it is what was passed in, and drafted or generated tokens behind it are not. Both
are told to the decoder through a context, because what lies between (stock code, other trainers' forwards) passes on
only the keywords that it knows. A context belongs to one thread, as one call of a model does.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from himap_train.pruning.layout import TokenCounts
from himap_train.pruning.places import TokenGrid


@dataclass(frozen=True)
class Whole:
    """A running forward of the whole model.

    Attributes:
        supervised: (B, S) bool, what its labels supervise; None where it has none.
    """

    supervised: Tensor | None


_whole: ContextVar[Whole | None] = ContextVar("himap_whole", default=None)
_prompt_length: ContextVar[int | None] = ContextVar("himap_prompt_length", default=None)
_grids: ContextVar[Sequence[TokenGrid] | None] = ContextVar("himap_grids", default=None)
_images: ContextVar[Tensor | None] = ContextVar("himap_images", default=None)


LABELS = ("labels", "shift_labels")
"""Keywords of the whole model's forward that say what is predicted."""


@contextmanager
def forward_of_whole(supervised: Tensor | None) -> Iterator[None]:
    """Inside, the forward of the whole model runs, with these tokens supervised, (B, S) bool."""
    token = _whole.set(Whole(supervised))
    try:
        yield
    finally:
        _whole.reset(token)


@contextmanager
def generation(
    prompt_length: int | None, grids: Sequence[TokenGrid] | None = None, images: Tensor | None = None
) -> Iterator[None]:
    """Inside, `generate` runs on prompts of this many columns, padding included, with image tokens at `images` (B, S)
    bool, and images of these grids; None where it was not told.
    """
    tokens = _prompt_length.set(prompt_length), _grids.set(grids), _images.set(images)
    try:
        yield
    finally:
        _prompt_length.reset(tokens[0])
        _grids.reset(tokens[1])
        _images.reset(tokens[2])


def images_of_prompt(embeds: Tensor) -> Tensor | None:
    """Where the image tokens of embedded prompts (B', S, D) are, as `generate` was told: (B', S) bool, each of its B
    prompts as often as it searches from one; None where it was not told, or these are no whole prompts.
    """
    images = _images.get()
    if images is None or images.shape[1] != embeds.shape[1] or len(embeds) % len(images):
        return None
    return images.repeat_interleave(len(embeds) // len(images), dim=0).to(embeds.device)


def grids_of_prompt() -> Sequence[TokenGrid] | None:
    """Those of the images that `generate` was given; None where it does not run or is not told."""
    return _grids.get()


def running_whole() -> Whole | None:
    """The forward of the whole model that runs, None where the inner model was called directly."""
    return _whole.get()


def supervised_by(given: Mapping[str, Any]) -> Tensor | None:
    """What a call supervises, (B, S) bool: by `supervised_mask`, which overrules labels, `labels` or `shift_labels`."""
    mask, labels, shifted = (given.get(name) for name in ("supervised_mask", *LABELS))
    if mask is not None:
        return torch.as_tensor(mask).bool()
    if labels is not None:
        return torch.as_tensor(labels != -100)
    if shifted is not None:  # its column i is what column i predicts
        return nn.functional.pad(shifted[..., :-1] != -100, (1, 0))
    return None


def labels_of_text(given: Mapping[str, Any], image: Tensor) -> dict[str, Tensor]:
    """The labels of a call, and the shifted ones, without those at image tokens (B, S) bool, which are no text."""
    following = nn.functional.pad(image[:, 1:], (0, 1))
    return {
        name: given[name].masked_fill(at.to(given[name].device), -100)
        for name, at in zip(LABELS, (image, following), strict=True)
        if given.get(name) is not None and given[name].shape == at.shape  # others are refused by name later
    }


def known_prompt(supervised_mask: Tensor | None, decoder: nn.Module, hidden: Tensor, image: Tensor) -> Tensor | None:
    """What is not prompt in a prefill or training forward, (B, S) bool; None where all of it is.

    Args:
        supervised_mask: (B, S) as passed to the decoder, if it was.
        decoder: The text decoder.
        hidden: (B, S, D), what its first layer takes.
        image: (B, S) bool, image tokens; where there is none there is nothing to choose.

    Raises:
        ValueError: Nothing says what the prompt is, or it comes in pieces.
    """
    length = hidden.shape[1]
    whole = running_whole()
    if supervised_mask is None and whole is not None:
        supervised_mask = whole.supervised
    if supervised_mask is not None:
        supervised_mask = torch.as_tensor(supervised_mask)
        if supervised_mask.shape != hidden.shape[:2]:
            raise ValueError(
                f"supervised_mask or labels have shape {tuple(supervised_mask.shape)}, the batch "
                f"{tuple(hidden.shape[:2])}; pass one entry per token"
            )
        return supervised_mask.to(hidden.device).bool()
    prompt = _prompt_length.get()
    if prompt is not None:
        if length < prompt and bool(image.any()):
            raise ValueError(
                f"the prompt of {prompt} tokens arrives in pieces, here {length}: image tokens would be chosen before "
                "the question was read; leave `prefill_chunk_size` unset"
            )
        if length <= prompt:
            return None
        return (torch.arange(length, device=hidden.device) >= prompt).expand(len(hidden), length)
    records = torch.is_grad_enabled() and (hidden.requires_grad or any(w.requires_grad for w in decoder.parameters()))
    if records and bool(image.any()):
        raise ValueError(
            "this forward records a gradient but has neither labels nor supervised_mask, so the answers in it would "
            "choose the image tokens that they are predicted from. Pass labels, or supervised_mask (B, S) bool, true "
            "where a token is an answer (labels != -100), e.g. where a trainer keeps the labels for a loss of its own; "
            "for inference use torch.no_grad()"
        )
    return None


def drafted(cached: int) -> bool:
    """Whether `generate` runs, and what stands behind this many columns is what it made or drafted itself."""
    prompt = _prompt_length.get()
    return prompt is not None and cached >= prompt


def check_continued(cached: int, new: int, unread: bool) -> None:
    """Refuse, or warn of, prompt text behind images that were chosen before any text was there to ask for them.

    Args:
        cached: Columns in the cache, as the caller counts them.
        new: Columns behind it.
        unread: Whether some image of the cache was ranked by no text.

    Raises:
        ValueError: It is certain, because `generate` knows what its prompt is.
    """
    prompt = _prompt_length.get()
    text = "the images in this KV cache were chosen before any text was there to ask for something, and text follows: "
    if unread and prompt is not None and cached < prompt:
        raise ValueError(text + "pass images and question in one prefill, without a cache")
    if unread and prompt is None and new > 1:
        warnings.warn(
            text + "if that is a question, pass images and question in one prefill; if they are answers or drafts, all "
            "is well",
            stacklevel=2,
        )


def warn_of_labels(counts: TokenCounts) -> None:
    """Say once each what labels do that is seldom meant."""
    if counts.supervised_images:
        warnings.warn(
            "labels supervise image tokens: ignored, images are never predicted; set labels to -100 there", stacklevel=2
        )
    if counts.unread:
        warnings.warn(
            "no prompt text stands between the images and what is supervised (captions, or labels that cover the "
            "question too): the last prompt token ranks the image tokens; pass supervised_mask (B, S) bool, true at "
            "answers alone, which overrules the labels",
            stacklevel=2,
        )
