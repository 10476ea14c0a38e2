"""What the decoder's layers run on, and everything that belongs to a token moved at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from himap_train.models.cache import StageFacts, as_stored, mark_stage
from himap_train.models.families.positions import LayerInputs
from himap_train.pruning.layout import TokenLayout
from himap_train.pruning.learned.marginal import Marginal
from himap_train.pruning.token_map import TokenMap, scatter_back


@dataclass(frozen=True)
class Tokens:
    """What the layers run on.

    Attributes:
        hidden: (B, L, D).
        rotary: Cosines and sines, (B, L, D) or (1, L, D).
        mask: In the form that the attention implementation takes; None where a causal kernel needs none.
        positions: (B, L), as the stock layers get them; None after a removal: numbers with gaps are never shown to
            transformers, which would read them as packed sequences.
        added: What is added to image tokens between layers.
        marginal: What gives learned keep ratios their gradient.
    """

    hidden: Tensor
    rotary: tuple[Tensor, Tensor]
    mask: Tensor | None
    positions: Tensor | None
    added: LayerInputs | None = None
    marginal: Marginal | None = None

    def run(self, layer: Any, number: int, call: dict[str, Any]) -> Tokens:
        """Through one decoder layer."""
        marginal = {} if self.marginal is None else {"marginal": self.marginal}
        hidden: Tensor = layer(
            self.hidden,
            attention_mask=self.mask,
            position_embeddings=self.rotary,
            position_ids=self.positions,
            **call,
            **marginal,
        )
        if self.added is not None and number < len(self.added.planes):
            plane = self.added.planes[number].to(hidden.device, hidden.dtype)
            hidden = torch.where(self.added.image.unsqueeze(2), hidden + plane, hidden)
        return replace(self, hidden=hidden)


@dataclass(frozen=True)
class Prefill:
    """What all removals of one prefill have in common.

    Attributes:
        decoder: The text decoder.
        cache: What decoding will go on from; None where nothing is cached.
        lengths: (B,) long, tokens of each row at the start.
        start: (B, 1), where positions are counted anew from; None where every token keeps its own.
        unread: Whether some image is ranked by no text.
    """

    decoder: Any
    cache: Cache | None
    lengths: Tensor
    start: Tensor | None = None
    unread: bool = False


def first_positions(positions: Any, layout: TokenLayout) -> Tensor:
    """Position number of each row's first real token: (B, 1)."""
    first = layout.valid.long().argmax(1, keepdim=True)
    return cast(Tensor, positions.expand(first.shape[0], -1).gather(1, first))


def removed(
    prefill: Prefill, number: int, tokens: Tokens, layout: TokenLayout, moved: TokenMap
) -> tuple[Tokens, TokenLayout]:
    """The tokens after a removal before layer `number`; rows come out packed to the left.

    Raises:
        ValueError: None would be left.
    """
    if not moved.index.shape[1]:
        raise ValueError(
            f"the batch would run layer {number} without a token: it holds images or padding alone; add text"
        )
    decoder, cache = prefill.decoder, prefill.cache
    hidden, marginal, valid = moved.states(tokens.hidden), tokens.marginal, moved.valid
    if marginal is not None:
        marginal = marginal.gather(moved)
        valid = valid & ~marginal.shadow  # as padding: nothing keeps it, ranks by it or reads it at the end
    layout = layout.gather(replace(moved, valid=valid))
    if prefill.start is not None:
        positions = prefill.start + torch.arange(hidden.shape[1], device=hidden.device)
        rotary = decoder.rotary_emb(hidden, position_ids=positions)
    else:
        rotary = (moved.gather(tokens.rotary[0]), moved.gather(tokens.rotary[1]))
    added = tokens.added
    if added is not None:  # planes of layers that have run are not moved: they keep their places in the tuple
        planes = tuple(plane if layer < number else moved.states(plane) for layer, plane in enumerate(added.planes))
        added = LayerInputs(planes, moved.gather(added.image) & valid) if number < len(planes) else None
    # After a removal padding lies behind each row, so a causal kernel without any mask is exact.
    mask = causal_mask(decoder, hidden, None, cache, layer=number)
    if cache is not None:
        hidden_slots = tokens.hidden.shape[1] - hidden.shape[1] if number == 0 else 0
        slots = None if moved.full else valid
        dropped = prefill.lengths - valid.sum(1)
        facts = StageFacts(slots, dropped, prefill.start is not None, hidden_slots, prefill.unread)
        mark_stage(cache, number, facts)
    return Tokens(hidden, rotary, mask, None, added, marginal), layout


def entered(
    prefill: Prefill, number: int, whole: Tokens, whole_layout: TokenLayout, tokens: Tokens, layout: TokenLayout
) -> Tokens:
    """All tokens where image tokens come in late: text as it is now, images as the projector made them.

    Args:
        prefill: Of all removals.
        number: The layer before which they come in.
        whole: Before the first layer.
        whole_layout: Before the first layer.
        tokens: The text that has run so far.
        layout: Layout of the text.
    """
    if prefill.cache is not None:
        slots = None if bool(whole_layout.valid.all()) else whole_layout.valid
        none = torch.zeros_like(prefill.lengths)
        mark_stage(prefill.cache, number, StageFacts(slots, none, unread=prefill.unread))
    text = scatter_back(tokens.hidden, layout.columns, layout.valid, whole.hidden.shape[1])
    return replace(whole, hidden=torch.where(whole_layout.image.unsqueeze(2), whole.hidden, text))


def causal_mask(
    decoder: Any,
    hidden: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None,
    positions: Tensor | None = None,
    layer: int | None = None,
) -> Tensor | None:
    """In the form that the attention implementation takes; None where a causal kernel needs none."""
    with as_stored(cache, layer):  # layer 0 by name: where others slide, transformers would ask the first that doesn't
        mask: Any = create_causal_mask(decoder.config, hidden, attention_mask, cache, positions, layer_idx=layer or 0)
    return mask
