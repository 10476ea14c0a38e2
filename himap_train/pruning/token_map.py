"""What a removal does to anything that belongs to a token: gather it, pool it, scatter it back.

Shapes: B rows, L columns before, L' columns after, S columns as passed in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pool:
    """Which tokens before are averaged into which token after.

    Attributes:
        keeper: (B, L) long, the column before of the token that each token is averaged into; its own where it stays
            alone or leaves without a trace.
        share: (B, L) fp32, its share in that average; the shares of one average add up to one.
    """

    keeper: Tensor
    share: Tensor


@dataclass(frozen=True)
class TokenMap:
    """From the tokens before a removal to those after it; rows come out packed to the left.

    Attributes:
        index: (B, L') long, column before of each token after; what fills up a row points at column 0.
        valid: (B, L') bool, false where it only fills up.
        lengths: (B,) long on the host, how many tokens each row has after.
        pool: Averages in place of tokens; None where tokens are kept as they are.
    """

    index: Tensor
    valid: Tensor
    lengths: Tensor
    pool: Pool | None = None

    @classmethod
    def of(cls, keep: Tensor, lengths: Tensor, pool: Pool | None = None) -> TokenMap:
        """The map that keeps the tokens `keep` (B, L) bool, of which each row has `lengths` (B,) long, on the host."""
        longest = int(lengths.max())
        here = lengths.to(keep.device, non_blocking=True).unsqueeze(1)
        valid = torch.arange(longest, device=keep.device) < here
        return cls(compact(keep, longest), valid, lengths, pool)

    @property
    def full(self) -> bool:
        """Whether no row has anything that only fills it up."""
        return int(self.lengths.min()) == self.index.shape[1]

    def gather(self, tokens: Tensor) -> Tensor:
        """(B, L, ...) -> (B, L', ...); a batch of one is shared by all rows."""
        return gather_tokens(tokens, self.index)

    def states(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, L, D) -> (B, L', D): gathered, or averaged where there is a pool."""
        if self.pool is None:
            return self.gather(hidden)
        weighted = hidden * self.pool.share.unsqueeze(2).to(hidden.dtype)
        keeper = self.pool.keeper.unsqueeze(2).expand_as(hidden)
        return self.gather(torch.zeros_like(hidden).scatter_add(1, keeper, weighted))


def compact(keep: Tensor, length: int) -> Tensor:
    """Index (B, length) of the tokens to `keep` (B, L) in their order, packed left; the rest points at column 0."""
    place = torch.where(keep, keep.cumsum(1) - 1, length)
    columns = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    index = columns.new_zeros(keep.shape[0], length + 1)
    return index.scatter(1, place, columns)[:, :length]


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, L') of `tokens` (B, L, ...); a batch of one is shared by all rows. Returns (B, L', ...)."""
    batch, length = tokens.shape[:2]
    if batch == 1:
        flat = index
    else:
        flat = index + torch.arange(index.shape[0], device=index.device).unsqueeze(1) * length
    return tokens.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, index.shape)


def scatter_back(tokens: Tensor, columns: Tensor, valid: Tensor, length: int) -> Tensor:
    """Put `tokens` (B, L, D) back at their `columns` (B, L) of a batch of `length`; the other rows are zero. (B, S, D).

    Args:
        tokens: What is put back.
        columns: Where each goes.
        valid: (B, L) bool, false for padding, which goes nowhere.
        length: S.
    """
    batch, _, width = tokens.shape
    # Padding goes to one spare row behind the batch, which the view then leaves out.
    start = torch.arange(batch, device=tokens.device).unsqueeze(1) * length
    flat = torch.where(valid, columns + start, batch * length).flatten()
    full = tokens.new_zeros(batch * length + 1, width)
    return full.index_copy(0, flat, tokens.flatten(0, 1))[: batch * length].unflatten(0, (batch, length))
