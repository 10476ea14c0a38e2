"""DivPrune: the most diverse set (arXiv 2503.02175, CVPR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from himap_train.pruning.methods.base import Members, Method, Reads, Seen, Widths

_BLOCK = 512
"""Rows of products at a time."""


@dataclass(frozen=True)
class DivPrune(Method):
    """Greedy max-min diversity over the hidden states of the image tokens: distance `1 - cosine`.

    The first token is the one whose nearest neighbour is farthest, each next one that whose nearest chosen token is
    farthest; ties to the earlier token. Tokens that must stay are chosen before all others. Published before the
    decoder (layer 0), where the states are the projected image features.
    """

    name: ClassVar[str] = "divprune"
    reads: ClassVar[Reads] = Reads.STATES
    ranks = False

    def choose(self, seen: Seen, kept: Tensor) -> Tensor:
        """The order in which tokens are chosen, up to the largest number that stays."""
        assert seen.states is not None
        members = Members.of(seen.layout, seen.counts)
        must = members.gather(seen.layout.protected)
        distance = apart(members.gather(seen.states), members.real, must)
        order = farthest_first(distance, members.real, must, int(kept.max()))
        return members.spread(order, seen.layout)

    def flops(self, widths: Widths, image_tokens: int, text_tokens: int, kept: int) -> float:
        """All pairs' cosines; the greedy steps are comparisons."""
        return 2.0 * computed_pairs(image_tokens) * widths.hidden

    def peak_bytes(self, widths: Widths, image_tokens: int, text_tokens: int, element: int) -> int:
        """All pairs' distances and a block of the products that they come from, in fp32, and the normalised states."""
        return 4 * image_tokens * (image_tokens + 2 * min(image_tokens, _BLOCK) + 2 * widths.hidden)


def all_cosines(states: Tensor) -> Tensor:
    """Products of all pairs of (R, N, D): (R, N, N). About half of them are computed; both of a pair are equal."""
    length = states.shape[1]
    found = states.new_empty(len(states), length, length)
    for at in range(0, length, _BLOCK):
        part = states[:, at : at + _BLOCK] @ states[:, at:].transpose(1, 2)
        square = part[..., :_BLOCK]
        square.copy_((square + square.transpose(1, 2)) / 2)
        found[:, at : at + _BLOCK, at:] = part
        found[:, at:, at : at + _BLOCK] = part.transpose(1, 2)
    return found


def computed_pairs(tokens: int) -> int:
    """Products that `all_cosines` computes."""
    return sum(min(_BLOCK, tokens - at) * (tokens - at) for at in range(0, tokens, _BLOCK))


def apart(states: Tensor, real: Tensor, first: Tensor) -> Tensor:
    """Distances 1 - cosine of all pairs of (R, N, D) states, as `farthest_first` takes them: (R, N, N)."""
    offset = torch.where(first | ~real, torch.inf, 1.0).unsqueeze(1)
    return all_cosines(normalize(states.float(), dim=-1)).neg_().add_(offset)


def farthest_first(distance: Tensor, real: Tensor, first: Tensor, number: int, start: Tensor | None = None) -> Tensor:
    """Place of each of N tokens in a greedy farthest-point order: (R, N) long; those not chosen come behind all others.

    A step is three kernels: before the decoder of a large model on a GPU their launches are what choosing costs.

    Args:
        distance: (R, N, N), of the second from the first; infinite to what comes first or may not be chosen. It is
            overwritten.
        real: (R, N) bool, what may be chosen.
        first: (R, N) bool, what is chosen before all others, in its order.
        number: How many are chosen.
        start: (R, N), the largest is chosen first; by default the distances to the nearest other.
    """
    rows = torch.arange(len(distance), device=distance.device)
    itself = distance.diagonal(dim1=1, dim2=2)
    if start is None:
        itself.fill_(torch.inf)
        start = distance.amin(2).clamp_(max=torch.finfo(distance.dtype).max)  # infinite where all others come first
    nearest = start.masked_fill(first, torch.inf).masked_fill_(~real, -torch.inf)
    itself.fill_(-torch.inf)  # so that nothing is chosen twice
    chosen: list[Tensor] = []
    for step in range(min(number, distance.shape[1])):
        chosen.append(nearest.argmax(1))  # ties to the earlier
        to_chosen = distance[rows, chosen[-1]]
        nearest = torch.minimum(nearest, to_chosen) if step else to_chosen.masked_fill_(~real, -torch.inf)
    return order_of(chosen, real)


def order_of(chosen: list[Tensor], real: Tensor) -> Tensor:
    """Step at which each of (R, N) tokens was first chosen, of (R,) at each; N for those that never were."""
    order = torch.full(real.shape, real.shape[1], dtype=torch.long, device=real.device)
    if not chosen:
        return order
    steps = torch.arange(len(chosen), device=real.device).expand(len(real), -1)
    return order.scatter_reduce(1, torch.stack(chosen, dim=1), steps, "amin")
