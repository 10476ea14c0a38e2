"""DivPrune: the most diverse set (arXiv 2503.02175, CVPR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from himap_train.pruning.methods.base import Members, Method, Reads, Seen, Widths
from himap_train.pruning.ranks import first_best


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
        states = torch.nn.functional.normalize(members.gather(seen.states).float(), dim=-1)
        cosine = states @ states.transpose(1, 2)  # (B * G, N, N)
        distance = 1 - (cosine + cosine.transpose(1, 2)) / 2  # two nearest neighbours tie to the bit
        order = farthest_first(distance, members.real, members.gather(seen.layout.protected), int(kept.max()))
        return members.spread(order, seen.layout)

    def flops(self, widths: Widths, image_tokens: int, text_tokens: int, kept: int) -> float:
        """All pairs' cosines; the greedy steps are comparisons."""
        return 2.0 * image_tokens**2 * widths.hidden

    def peak_bytes(self, widths: Widths, image_tokens: int, text_tokens: int, element: int) -> int:
        """All pairs' distances and the product that they come from, in fp32, and the normalised states."""
        return 8 * image_tokens**2 + 8 * image_tokens * widths.hidden


def farthest_first(distance: Tensor, real: Tensor, first: Tensor, number: int) -> Tensor:
    """Place of each of N tokens in a greedy farthest-point order: (R, N) long; those not chosen come behind all others.

    Args:
        distance: (R, N, N), symmetric.
        real: (R, N) bool, what may be chosen.
        first: (R, N) bool, what is chosen before all others, in its order.
        number: How many are chosen.
    """
    rows = torch.arange(len(distance), device=distance.device)
    alone = torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device) | ~real.unsqueeze(1)
    nearest = distance.masked_fill(alone, torch.inf).amin(2)  # to any other, until one is chosen
    order = torch.full(real.shape, distance.shape[1], dtype=torch.long, device=distance.device)
    first = first & real
    for step in range(min(number, distance.shape[1])):
        open_ = real & (order == distance.shape[1])
        wish = nearest.masked_fill(first & open_, torch.inf).masked_fill(~open_, -torch.inf)
        chosen = first_best(wish)
        order[rows, chosen] = torch.where(open_[rows, chosen], step, order[rows, chosen])
        to_chosen = distance[rows, chosen]
        nearest = to_chosen if step == 0 else torch.minimum(nearest, to_chosen)
    return order
