"""From scores to ranks, and from ranks to the tokens that stay, per row and group of a batch.

Shapes: B rows, L current columns, G groups (see `layout`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from himap_train.pruning.layout import TokenLayout


def image_ranks(scores: Tensor, layout: TokenLayout, groups: int) -> Tensor:
    """Rank of every image token in its row and group, 0 for the highest score, ties to the earlier one.

    Args:
        scores: (B, L); only the entries of image tokens are read.
        layout: The current layout; its protected tokens come first.
        groups: G.

    Returns:
        (B, L) long; at text and padding no number of use.
    """
    ranks = torch.zeros_like(layout.columns)
    places = torch.arange(ranks.shape[1], device=ranks.device).expand_as(ranks)
    for number in range(groups):
        candidates, order = _ranked(scores, layout, number, groups)
        here = torch.zeros_like(ranks).scatter(1, order, places)
        ranks = torch.where(candidates, here, ranks) if groups > 1 else here
    return ranks


def select(ranks: Tensor, layout: TokenLayout, kept: Tensor) -> Tensor:
    """The `kept` best-ranked image tokens of every row and group, and all text.

    Args:
        ranks: (B, L) as `image_ranks` gives them.
        layout: The current layout.
        kept: (B, G) long, how many stay.

    Returns:
        (B, L) bool, the tokens that stay.
    """
    here = of_group(kept.to(ranks.device, non_blocking=True), layout)
    return layout.valid & (~layout.image | (ranks < here))


def of_group(numbers: Tensor, layout: TokenLayout) -> Tensor:
    """What each token's group has of `numbers` (B, G): (B, L), or (B, 1) where there is one group."""
    return numbers.gather(1, layout.group.clamp(max=numbers.shape[1] - 1)) if numbers.shape[1] > 1 else numbers


def place_in_group(members: Tensor, layout: TokenLayout, groups: int) -> Tensor:
    """How many of `members` (B, L) bool lie before each of them in its row and group: (B, L) long."""
    if groups == 1:
        return members.cumsum(1) - 1
    place = torch.zeros_like(layout.group)
    for number in range(groups):
        here = members & (layout.group == number)
        place = torch.where(here, here.cumsum(1) - 1, place)
    return place


def tokens_for_mass(scores: Tensor, layout: TokenLayout, mass: float, groups: int) -> Tensor:
    """How many image tokens `select` must keep so that they hold a share of the scores: (B, G) long.

    The token at which the share is reached is counted. Where no token has any score the share is never reached, and
    the number is that of all columns or more.

    Args:
        scores: (B, L), not negative; only the entries of image tokens are read.
        layout: The current layout.
        mass: The share, of the sum over a group's image tokens.
        groups: G.
    """
    needed = []
    for number in range(groups):
        candidates, order = _ranked(scores, layout, number, groups)
        # In fp64 from the highest score down, padding last: the same sum whatever lies beside a row in its batch.
        held = scores.double().masked_fill(~candidates, 0.0).gather(1, order).cumsum(1)
        share = held / held[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)
        needed.append((share < mass).sum(1) + 1)
    return torch.stack(needed, dim=1)


def _ranked(scores: Tensor, layout: TokenLayout, number: int, groups: int) -> tuple[Tensor, Tensor]:
    """The image tokens of group `number`, (B, L) bool, and all columns in the order in which they stay, (B, L) long:
    those that must stay, then by falling score, ties to the earlier one; all else last.
    """
    candidates = layout.image & (layout.group == number) if groups > 1 else layout.image
    ranks = scores.masked_fill(layout.protected, torch.inf).masked_fill(~candidates, -torch.inf)
    return candidates, ranks.argsort(dim=1, descending=True, stable=True)
