"""Greedy maximum coverage of the question and the image (MMTok, arXiv 2508.18264, ICLR 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from himap_train.pruning.methods.base import Members, Method, Reads, Seen, Widths
from himap_train.pruning.methods.divprune import all_cosines, computed_pairs, order_of
from himap_train.pruning.names import field_names, require_number
from himap_train.pruning.token_map import compact

_NOTHING = 1e-12
"""What a token adds that adds nothing, after rounding."""
_ROWS = 256
"""Covered tokens looked at together."""


@dataclass(frozen=True)
class Coverage(Method):
    """The set of image tokens that best covers both the question's tokens and all image tokens.

    How well image token i covers a token j is the softmax over i of `cosine(j, i) / temperature`, over the number of
    such j. A set covers j as well as its best member does. The token that adds most is chosen next, ties to the earlier
    one; tokens that must stay come first. Published before the decoder (layer 0), where the states are the input
    embeddings and the projected image features: MMTok's form for LLaVA-OneVision. (For LLaVA-1.5 it loads CLIP's text
    tower besides, and a text temperature of 0.02 goes with that.) The question is the prompt's text after the image;
    without any, image tokens alone are covered.

    Args:
        text_weight: Weight of covering the question; 0 leaves it out.
        image_weight: Weight of covering the image.
        text_temperature: Of the softmax for the question's tokens.
        image_temperature: Of the softmax for image tokens.

    Raises:
        ValueError: A negative weight, none above 0, or a temperature that is not above 0.
    """

    name: ClassVar[str] = "coverage"
    reads: ClassVar[Reads] = Reads.STATES
    ranks = False

    text_weight: float = 1.0
    image_weight: float = 0.5
    text_temperature: float = 0.01
    image_temperature: float = 0.2

    def __post_init__(self) -> None:
        """Check every field where it is set."""
        for name in field_names(type(self)):
            value = getattr(self, name)
            require_number("criterion coverage", name, value)
            if value < 0 or (value == 0 and "temperature" in name):
                expected = "a number above 0" if "temperature" in name else "0 or more"
                raise ValueError(f"criterion coverage: {name} is {value}; expected {expected}")
        if self.text_weight == self.image_weight == 0:
            raise ValueError("criterion coverage: text_weight and image_weight are 0, so there is nothing to cover")

    def choose(self, seen: Seen, kept: Tensor) -> Tensor:
        """The order in which tokens are chosen, up to the largest number that stays."""
        assert seen.states is not None
        members = Members.of(seen.layout, seen.counts)
        image = normalize(members.gather(seen.states).float(), dim=-1)
        cover = _cover(all_cosines(image), members, members.real, self.image_temperature).mul_(self.image_weight)
        if self.text_weight:
            question = Members.question(seen.layout, seen.counts)
            text = normalize(question.gather(seen.states).float(), dim=-1)
            shares = _cover(text @ image.transpose(1, 2), question, members.real, self.text_temperature)
            cover = torch.cat([self.text_weight * shares, cover], dim=1)
        must = members.gather(seen.layout.protected)
        return members.spread(cover_first(cover, members.real, must, int(kept.max())), seen.layout)

    def flops(self, widths: Widths, image_tokens: int, text_tokens: int, kept: int) -> float:
        """All pairs' cosines; the greedy steps are comparisons and sums."""
        text = text_tokens if self.text_weight else 0
        return 2.0 * (computed_pairs(image_tokens) + text * image_tokens) * widths.hidden

    def peak_bytes(self, widths: Widths, image_tokens: int, text_tokens: int, element: int) -> int:
        """Shares, weighted and put together, and the part of them that a step looks at, in fp32; normalised states."""
        tokens = image_tokens + text_tokens
        return 12 * tokens * image_tokens + 8 * tokens * widths.hidden


def _cover(cosine: Tensor, which: Members, real: Tensor, temperature: float) -> Tensor:
    """What share of each of M tokens each of N image tokens covers: (R, M, N), of cosines, which are overwritten."""
    logits = cosine.div_(temperature)
    shares = logits.masked_fill_(~real.unsqueeze(1), torch.finfo(logits.dtype).min).softmax(-1)
    each = which.real / which.real.sum(1, keepdim=True).clamp(min=1)
    return shares.mul_(each.unsqueeze(2))


def cover_first(cover: Tensor, real: Tensor, first: Tensor, number: int) -> Tensor:
    """Place of each of N tokens in the greedy order: (R, N) long; those not chosen come behind all others.

    A step looks only at those of the J covered tokens that the last choice covers better than all before: they are J
    in the first step and soon few, so that all steps together cost far less than J x N each.

    Args:
        cover: (R, J, N), how well each token covers each of J others.
        real: (R, N) bool, what may be chosen.
        first: (R, N) bool, what is chosen before all others, in its order.
        number: How many are chosen.
    """
    rows = torch.arange(len(cover), device=cover.device)
    flat, best = cover.flatten(0, 1), torch.zeros_like(cover[:, :, 0])
    # Memory that is used again and again: taking it anew costs most of a step.
    found = cover.new_empty(len(cover) * _ROWS, cover.shape[2])
    exact = found.double()
    closed = torch.where(real, torch.where(first, torch.inf, 0.0), -torch.inf).double()
    gain = cover.sum(1, dtype=torch.float64).masked_fill_(first | ~real, -torch.inf)
    chosen: list[Tensor] = []
    for _ in range(min(number, cover.shape[2])):
        chosen.append(torch.where(gain < _NOTHING, closed, gain).argmax(1))  # ties to the earlier
        for wish in (gain, closed):
            wish.scatter_(1, chosen[-1].unsqueeze(1), -torch.inf)
        better = torch.maximum(cover[rows, :, chosen[-1]], best)
        grown = better > best
        number_grown = grown.sum(1, keepdim=True)
        index = compact(grown, int(number_grown.max()))
        low = best.gather(1, index)
        fills_up = torch.arange(index.shape[1], device=index.device) >= number_grown
        high = torch.where(fills_up, low, better.gather(1, index))
        index = index + rows.unsqueeze(1) * cover.shape[1]
        for start in range(0, index.shape[1], _ROWS):
            some = slice(start, start + _ROWS)
            number_rows = index[:, some].numel()
            part = torch.index_select(flat, 0, index[:, some].flatten(), out=found[:number_rows])
            part = part.unflatten(0, (len(cover), -1))
            torch.maximum(part, low[:, some, None], out=part)  # many times faster than clamp
            torch.minimum(part, high[:, some, None], out=part)
            gain -= exact[:number_rows].copy_(part.flatten(0, 1)).unflatten(0, part.shape[:2]).sum(1)
        gain += low.sum(1, keepdim=True, dtype=torch.float64)
        best = better
    return order_of(chosen, real)
