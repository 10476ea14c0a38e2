"""Quotas by region: every window of a picture keeps the same share of its image tokens.

Shapes: B rows, L current columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from himap_train.pruning.layout import TokenLayout

_FAR = 10_000
"""More than there are grids in a batch, or windows along a side of one."""


def window_by_window(scores: Tensor, layout: TokenLayout, side: int) -> Tensor:
    """Scores (B, L) under which tokens leave all windows alike.

    A token's rank within its window, as a share of the window's tokens, comes first; the score itself decides between
    tokens of the same share. Tokens that must stay are the first of their windows.

    Args:
        scores: (B, L), of which the entries of image tokens are read.
        layout: The current layout, with places.
        side: Of a square window, in tokens; those at the right and at the bottom may be smaller.
    """
    columns = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    best = scores.masked_fill(layout.protected, torch.inf).argsort(dim=1, descending=True, stable=True)
    window = windows(layout, side).gather(1, best)
    by_window = window.argsort(dim=1, stable=True)  # in each the best first
    share = torch.zeros_like(scores).scatter(1, by_window, _shares(window.gather(1, by_window)))
    order = best.gather(1, share.argsort(dim=1, stable=True))
    return -torch.zeros_like(scores).scatter(1, order, columns.to(scores.dtype))


def windows(layout: TokenLayout, side: int) -> Tensor:
    """A number (B, L) long for the window of each image token, of its row and turn; -1 for all else.

    Tokens without a place, of each grid together, have a window of their own.
    """
    assert layout.places is not None
    places, number = layout.places, layout.group
    for part in (places.grid, places.row.div(side).floor() + 1, places.column.div(side).floor() + 1):
        number = number * _FAR + part.long()
    return number.masked_fill(~layout.image, -1)


def over_mean(scores: Tensor, layout: TokenLayout, side: int) -> Tensor:
    """Scores (B, L), not negative, of image tokens over the mean of their windows', of `side` tokens."""
    window, order = windows(layout, side).sort(dim=1, stable=True)
    first, last = _bounds(window)
    sums = pad(scores.gather(1, order).cumsum(1, dtype=torch.float64), (1, 0))
    mean = (sums.gather(1, last + 1) - sums.gather(1, first)) / (last - first + 1)
    mean = torch.zeros_like(scores).scatter(1, order, mean.to(scores.dtype))
    return scores / mean.clamp(min=torch.finfo(scores.dtype).tiny)


def _shares(window: Tensor) -> Tensor:
    """Of windows side by side, (B, L): the middle of each token's place, as a share of its window."""
    first, last = _bounds(window)
    return (torch.arange(window.shape[1], device=window.device) - first + 0.5) / (last - first + 1)


def _bounds(window: Tensor) -> tuple[Tensor, Tensor]:
    """First and last column of the window of each of the windows side by side: (B, L) long."""
    columns = torch.arange(window.shape[1], device=window.device).expand_as(window)
    starts = pad(window[:, 1:] != window[:, :-1], (1, 0), value=True)
    ends = pad(starts[:, 1:], (0, 1), value=True)
    first = torch.where(starts, columns, 0).cummax(1).values
    last = torch.where(ends, columns, window.shape[1]).flip(1).cummin(1).values.flip(1)
    return first, last
