"""DART: what resembles a few pivots least (arXiv 2502.11494, EMNLP 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from himap_train.pruning.methods.base import Members, Method, Reads, Seen, Widths
from himap_train.pruning.names import field_names


@dataclass(frozen=True)
class Dart(Method):
    """Pivots, and for each of them the image tokens that are least like it, so that no two that stay say the same.

    Pivots are the image tokens and the tokens of the prompt's text after the image whose keys have the largest norm in
    the layer before; image pivots stay. The norm is L1, but of the lengths of the pairs of numbers that rotary
    embedding turns: that of the numbers themselves, as published, changes with a token's position, and so with the
    padding of its batch. Each pivot in turn, image before text, by falling norm,
    takes an equal share of what else stays (the first ones one more where it does not divide): the tokens that are left
    with the lowest cosine to it. Ties to the earlier token. Tokens that must stay are the first pivots. Published
    behind layer 2, on states behind the decoder's final norm, whose weight alone makes a difference to a cosine; here
    on the states as they are.

    Args:
        image_pivots: Image tokens among the pivots.
        text_pivots: Text tokens among the pivots; fewer where the prompt has fewer.

    Raises:
        ValueError: A number below 0, or no image pivot.
    """

    name: ClassVar[str] = "dart"
    reads: ClassVar[Reads] = Reads.KEYS
    ranks = False

    image_pivots: int = 10
    text_pivots: int = 5

    def __post_init__(self) -> None:
        """Check every field where it is set."""
        for name, least in zip(field_names(type(self)), (1, 0), strict=True):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"criterion dart: {name} is {value!r}; expected an integer of {least} or more")

    def choose(self, seen: Seen, kept: Tensor) -> Tensor:
        """Pivots first, then what each of them takes."""
        assert seen.keys is not None and seen.states is not None
        image, text = Members.of(seen.layout, seen.counts), Members.question(seen.layout, seen.counts)
        norms = torch.hypot(*seen.keys.float().chunk(2, dim=3)).sum((1, 3))
        device, must = norms.device, image.gather(seen.layout.protected) & image.real
        stay = kept.flatten().to(device, non_blocking=True)
        most = max(self.image_pivots, int(seen.counts.protected.max()))
        image_order = _by_norm(image.gather(norms).masked_fill(must, torch.inf), image.real)[:, :most]
        text_order = _by_norm(text.gather(norms), text.real)[:, : self.text_pivots]
        of_image = torch.minimum(must.sum(1).clamp(min=self.image_pivots), stay)
        of_text = text.real.sum(1).clamp(max=self.text_pivots)
        states = normalize(image.gather(seen.states).float(), dim=-1)
        words = normalize(text.gather(seen.states).float(), dim=-1)
        pivots = torch.cat([_rows(states, image_order), _rows(words, text_order)], dim=1)
        real = torch.cat([_below(of_image, image_order), _below(of_text, text_order)], dim=1)
        last = image.real.shape[1]
        places = torch.arange(image_order.shape[1], device=device).expand_as(image_order)
        first = torch.where(_below(of_image, image_order), places, last)
        order = torch.full_like(image.index, last).scatter(1, image_order, first)
        left, number = stay - of_image, real.sum(1).clamp(min=1)
        share = (left // number).unsqueeze(1) + (real.cumsum(1) - 1 < (left % number).unsqueeze(1)).long()
        order = _shared_out(pivots @ states.transpose(1, 2), share * real, order, of_image, image.real)
        return image.spread(order, seen.layout)

    def flops(self, widths: Widths, image_tokens: int, text_tokens: int, kept: int) -> float:
        """Cosines of pivots and image tokens."""
        pivots = min(self.image_pivots, image_tokens) + min(self.text_pivots, text_tokens)
        return 2.0 * pivots * image_tokens * widths.hidden

    def peak_bytes(self, widths: Widths, image_tokens: int, text_tokens: int, element: int) -> int:
        """Keys in fp32 and squared, or states in fp32 and normalised."""
        tokens = image_tokens + text_tokens
        return 8 * tokens * max(widths.keys, widths.hidden)


def _by_norm(norms: Tensor, real: Tensor) -> Tensor:
    return norms.masked_fill(~real, -torch.inf).argsort(dim=1, descending=True, stable=True)


def _rows(states: Tensor, index: Tensor) -> Tensor:
    return states.gather(1, index.unsqueeze(2).expand(-1, -1, states.shape[2]))


def _below(number: Tensor, like: Tensor) -> Tensor:
    """The first `number` (R,) of each row of (R, P)."""
    return torch.arange(like.shape[1], device=like.device) < number.unsqueeze(1)


def _shared_out(cosine: Tensor, share: Tensor, order: Tensor, taken: Tensor, real: Tensor) -> Tensor:
    """The order (R, N) once each of P pivots has taken its share (R, P) of those that have no place in it yet."""
    last = order.shape[1]
    for pivot in range(cosine.shape[1]):
        open_ = real & (order == last)
        likest_last = cosine[:, pivot].masked_fill(~open_, torch.inf).argsort(dim=1, stable=True)
        place = likest_last.argsort(dim=1)
        order = torch.where(open_ & (place < share[:, pivot, None]), taken.unsqueeze(1) + place, order)
        taken = taken + share[:, pivot]
    return order
