"""Where image tokens lie in their pictures, for methods that look at nothing else or share out by region.

A picture gives one or more grids of tokens: one in LLaVA-1.5, an overview and tiles elsewhere. Which, the family knows
from what the model's forward is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenGrid:
    """Consecutive image tokens that lie in a grid, row by row from the top left.

    Attributes:
        rows: Rows of the grid.
        columns: Columns of the grid.
        before: Tokens before the grid that show no part of the picture (a class token).
        row_end: Tokens at the end of each row that show no part of it (a newline).
    """

    rows: int
    columns: int
    before: int = 0
    row_end: int = 0

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.before + self.rows * (self.columns + self.row_end)

    def patch(self, token: int) -> int | None:
        """Number of the grid's patch that a token shows; None for one that shows none."""
        if token < self.before:
            return None
        row, column = divmod(token - self.before, self.columns + self.row_end)
        return row * self.columns + column if column < self.columns else None


@dataclass(frozen=True)
class Places:
    """Where each token lies; of use for image tokens.

    Attributes:
        facts: (4, B, L) fp32, see `grid`, `row`, `column` and `even`.
    """

    facts: Tensor

    @property
    def grid(self) -> Tensor:
        """(B, L), number of its grid in the batch."""
        return self.facts[0]

    @property
    def row(self) -> Tensor:
        """(B, L), from 0; -1 for a token that shows no part of the picture."""
        return self.facts[1]

    @property
    def column(self) -> Tensor:
        """(B, L), as `row`."""
        return self.facts[2]

    @property
    def even(self) -> Tensor:
        """(B, L) in (0, 1), its place in a sequence over its grid of which any beginning covers it evenly, see
        `even_order`; 2 for a token that shows no part of the picture.
        """
        return self.facts[3]

    @classmethod
    def of(cls, image: Tensor, grids: Sequence[TokenGrid] | None) -> Places:
        """The places of a batch's image tokens.

        Args:
            image: (B, L) bool, on any device.
            grids: Those of all images in the order of the batch, or one that all images have; each row of the batch may
                stand there several times, as beams do. Where they do not add up to the image tokens, or are None, each
                run of image tokens is a square grid, or else one row.
        """
        mask = image.cpu()
        total = int(mask.sum())
        known = list(grids or ())
        if len(known) == 1 and known[0].tokens:
            known *= max(total // known[0].tokens, 1)
        own = sum(grid.tokens for grid in known)
        if own and total and total % own == 0 and len(mask) % (total // own) == 0:
            known = _repeated(known, mask.sum(1).tolist(), total // own)
        if sum(grid.tokens for grid in known) != total:
            runs = (len(list(run)) for row in mask.tolist() for is_image, run in groupby(row) if is_image)
            known = [_squarest(run) for run in runs]
        facts = torch.zeros(4, *mask.shape)
        if known:
            number = torch.arange(len(known)).repeat_interleave(torch.tensor([grid.tokens for grid in known]))
            facts[0, mask], facts[1:, mask] = number.float(), torch.cat([*map(_facts, known)], dim=1)
        return cls(facts.to(image.device, non_blocking=True))

    def gather(self, index: Tensor) -> Places:
        """Those of the columns (B, L')."""
        return Places(self.facts.gather(2, index.expand(len(self.facts), -1, -1)))


def _repeated(grids: Sequence[TokenGrid], counts: Sequence[int], times: int) -> list[TokenGrid]:
    """Those of all rows, where each stands `times` times; `counts` are the image tokens of all rows."""
    rest, found = list(grids), list[TokenGrid]()
    for count in counts[::times]:
        row: list[TokenGrid] = []
        while rest and sum(grid.tokens for grid in row) < count:
            row.append(rest.pop(0))
        found += row * times
    return found + rest


def _squarest(tokens: int) -> TokenGrid:
    side = math.isqrt(tokens)
    return TokenGrid(side, side) if side * side == tokens else TokenGrid(1, tokens)


@lru_cache(maxsize=512)
def _facts(grid: TokenGrid) -> Tensor:
    """Row, column and evenness of a grid's tokens: (3, tokens)."""
    patches = torch.tensor([-1 if patch is None else patch for patch in map(grid.patch, range(grid.tokens))])
    placed = patches >= 0
    if not bool(placed.any()):
        return torch.tensor([-1.0, -1.0, 2.0]).unsqueeze(1).expand(3, grid.tokens)
    order = even_order(grid.rows, grid.columns)
    even = torch.where(placed, (order[patches] + 0.5) / len(order), 2.0)
    row = torch.where(placed, patches // grid.columns, -1)
    column = torch.where(placed, patches % grid.columns, -1)
    return torch.stack([row.float(), column.float(), even])


@lru_cache(maxsize=512)
def even_order(rows: int, columns: int) -> Tensor:
    """Number of each patch in a farthest-point sequence over a grid: (rows * columns,) long.

    The first is the patch nearest the middle; each next one is that whose nearest chosen patch is farthest (Gonzalez
    1985: any beginning covers the grid within twice the best radius for its number). Of several such patches, which
    soon are most, the least crowded one: that with the smallest sum of inverse squared distances to all chosen, as a
    share of the sum to all patches, which is smaller at the border. Ties to the earlier one.
    """
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    # Whole numbers, so that symmetric patches tie: twice the coordinates, from the middle; parts of 2**40 as crowding.
    nearest = -((2 * y - (rows - 1)) ** 2) - (2 * x - (columns - 1)) ** 2 - 1
    near = 2**40 // ((y - y[:, None]) ** 2 + (x - x[:, None]) ** 2).clamp(min=1)
    full, crowd = near.sum(0).double(), torch.zeros_like(nearest)
    order = torch.zeros_like(nearest)
    for number in range(rows * columns):
        farthest = nearest == nearest.max()
        chosen = int((crowd / full).masked_fill(~farthest, torch.inf).argmin())
        order[chosen] = number
        to_chosen = (y - y[chosen]) ** 2 + (x - x[chosen]) ** 2
        nearest = to_chosen if number == 0 else torch.minimum(nearest, to_chosen)
        crowd += near[chosen]
    return order
