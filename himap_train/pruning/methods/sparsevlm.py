"""SparseVLM: chosen text ranks, and part of what leaves is merged (arXiv 2410.04417, ICML 2025)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from himap_train.pruning.methods.base import Members, Seen, Widths
from himap_train.pruning.methods.instruction import Instruction
from himap_train.pruning.names import require_number
from himap_train.pruning.token_map import Pool


@dataclass(frozen=True)
class SparseVLM(Instruction):
    """Attention of those text tokens that the image speaks to; the best of what leaves is merged into a few tokens.

    Raters: each image token spreads itself over the prompt's text after the image by the softmax of the products of
    their states, where the layer before begins; text tokens that get at least the mean rate. (The released code looks
    at the decoder's input once.)

    Recycling: of the tokens that leave, the best ranked `recycle` are not lost. They and one in ten of the places that
    stay for them, m // 10 + 1 for m tokens, form clusters by density and distance (DPC-KNN), each of which becomes the
    mean of its tokens at the place of its centre. What is merged counts among what stays, which the published numbers
    of tokens leave out. How many stay, the schedule says, as the released code does; the paper's rule by the rank of
    the attention is in neither.

    Args:
        recycle: Fraction of the tokens that leave which is merged; 0 merges none.

    Raises:
        ValueError: Not a fraction.
    """

    name: ClassVar[str] = "sparsevlm"
    merges: ClassVar[bool] = True

    recycle: float = 0.3

    def __post_init__(self) -> None:
        """Check where it is set."""
        super().__post_init__()
        require_number("criterion sparsevlm", "recycle", self.recycle)
        if not 0.0 <= self.recycle <= 1.0:
            raise ValueError(f"criterion sparsevlm: recycle is {self.recycle}; expected 0 to 1 (fraction merged)")

    @property
    def ranks(self) -> bool:
        """Where nothing is merged."""
        return super().ranks and not self.recycle

    def score(self, seen: Seen) -> Tensor:
        """Sum over the raters."""
        assert seen.rows is not None
        may_rank = seen.rows.may_rank & self._raters(seen).unsqueeze(2)
        return super().score(replace(seen, rows=replace(seen.rows, may_rank=may_rank)))

    def _raters(self, seen: Seen) -> Tensor:
        """Which of the ranking rows rate: (B, R) bool."""
        rows, layout = seen.rows, seen.layout
        assert rows is not None and seen.states is not None
        states = seen.states.float()
        text = states.gather(1, rows.index.unsqueeze(2).expand(-1, -1, states.shape[2]))
        logits = states @ text.transpose(1, 2)  # (B, L, R)
        own = rows.may_rank.transpose(1, 2)
        spread = logits.masked_fill_(~own, torch.finfo(logits.dtype).min).softmax(2)
        given = (spread * (own & layout.image.unsqueeze(2))).sum(1)  # a group's rows get as much as it has image tokens
        group = layout.group.gather(1, rows.index)
        real = rows.may_rank.any(2)
        same = (group.unsqueeze(2) == group.unsqueeze(1)) & real.unsqueeze(1)
        mean = (given.unsqueeze(1) * same).sum(2) / same.sum(2).clamp(min=1)
        return real & (given >= mean * (1 - 1e-6))

    def choose(self, seen: Seen, kept: Tensor) -> Tensor:
        """By rank; the centres of clusters have the last places that stay."""
        ranks = super().choose(seen, kept)
        if not self.recycle:
            return ranks
        members, place, centre, _ = self._clusters(seen, ranks, kept)
        main, pool, _ = self._numbers(seen, kept)
        here, until = main.unsqueeze(1), (main + pool).unsqueeze(1)
        # Centres move to the front of the pool; the others go behind them.
        in_pool = (place >= here) & (place < until)
        front = here + (centre.long().cumsum(1) - 1)
        behind = here + centre.sum(1, keepdim=True) + ((in_pool & ~centre).long().cumsum(1) - 1)
        moved = torch.where(centre, front, torch.where(in_pool, behind, place))
        return members.spread(moved, seen.layout)

    def pool(self, seen: Seen, keep: Tensor, kept: Tensor) -> Pool | None:
        """Each token of the pool into the centre of its cluster."""
        if not self.recycle:
            return None
        members, _, _, into = self._clusters(seen, super().choose(seen, kept), kept)
        columns = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
        keeper_of = members.index.gather(1, into)
        spread = members.spread(keeper_of, seen.layout)
        keeper = torch.where(seen.layout.image, spread, columns)
        size = torch.zeros_like(keeper).scatter_add(1, keeper, torch.ones_like(keeper))
        return Pool(keeper, 1.0 / size.gather(1, keeper))

    def _numbers(self, seen: Seen, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How many of each row and group stay by rank, are in the pool, and how many clusters that has: (B * G,)."""
        counts = seen.counts
        leave = (counts.current - kept).clamp(min=0)
        merged = (leave * self.recycle + 1e-9).long()
        clusters = torch.minimum(torch.where(merged > 0, merged // 10 + 1, 0), kept // 2)
        clusters = torch.minimum(clusters, (kept - counts.protected).clamp(min=0))
        pool = torch.where(clusters > 0, merged + clusters, 0)
        numbers = torch.stack([kept - clusters, pool, clusters]).flatten(1)
        main, pool, clusters = numbers.to(seen.layout.columns.device, non_blocking=True)
        return main, pool, clusters

    def _clusters(self, seen: Seen, ranks: Tensor, kept: Tensor) -> tuple[Members, Tensor, Tensor, Tensor]:
        """The image tokens, their ranks, which are centres, and which member each belongs to: (B * G, N) each."""
        assert seen.states is not None
        members = Members.of(seen.layout, seen.counts)
        last = members.index.shape[1]
        place = members.gather(ranks).masked_fill(~members.real, last)
        main, pool, clusters = self._numbers(seen, kept)
        in_pool = (place >= main.unsqueeze(1)) & (place < (main + pool).unsqueeze(1)) & members.real
        at = torch.arange(last, device=place.device).expand_as(place)
        # The pool as a rectangle of its own, in the order of the tokens.
        merged = int(int((seen.counts.current - kept).clamp(min=0).max()) * self.recycle + 1e-9)
        most = merged // 10 + 1
        width = min(merged + most, last)
        index = torch.where(in_pool, at, last + at).argsort(dim=1)[:, :width]
        real = torch.arange(index.shape[1], device=index.device) < pool.unsqueeze(1)
        states = members.gather(seen.states).float()
        states = states.gather(1, index.unsqueeze(2).expand(-1, -1, states.shape[2]))
        centre, into = density_clusters(states, real, clusters, most)
        is_centre = torch.zeros_like(in_pool).scatter(1, index, centre & real)
        own = at.scatter(1, index, torch.where(real, index.gather(1, into), index))
        return members, place, is_centre, own

    def flops(self, widths: Widths, image_tokens: int, text_tokens: int, kept: int) -> float:
        """Attention of the text, and products of states for the raters; distances within the pool are not counted."""
        rating = 2.0 * text_tokens * (image_tokens + text_tokens) * widths.hidden if image_tokens else 0.0
        return super().flops(widths, image_tokens, text_tokens, kept) + rating

    def peak_bytes(self, widths: Widths, image_tokens: int, text_tokens: int, element: int) -> int:
        """States in fp32, twice, and the distances of the pool, four times, beside what attention needs."""
        pool = int(image_tokens * self.recycle * 1.1)
        states = 8 * (image_tokens + text_tokens) * widths.hidden + 16 * pool**2
        return states + super().peak_bytes(widths, image_tokens, text_tokens, element)


def density_clusters(states: Tensor, real: Tensor, clusters: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Clusters of P tokens by density peaks among their nearest neighbours (DPC-KNN).

    A token's density is `exp` of minus its mean squared distance (over the root of the width) to its c nearest ones,
    itself among them, where there are c clusters. Centres are the c tokens whose density times distance to the nearest
    denser token is the largest; of the densest that distance is its largest one. Ties to the earlier token.

    Args:
        states: (R, P, D) fp32.
        real: (R, P) bool.
        clusters: (R,) long, c.
        most: No c is larger.

    Returns:
        Which are centres, (R, P) bool, and the place of each token's nearest centre, (R, P) long; of a centre its own.
    """
    at = torch.arange(states.shape[1], device=states.device)
    pair = real.unsqueeze(1) & real.unsqueeze(2)
    around = states - (states * real.unsqueeze(2)).mean(1, keepdim=True)  # which makes the differences exact enough
    distance = torch.cdist(around, around, compute_mode="use_mm_for_euclid_dist") / states.shape[2] ** 0.5
    distance = torch.maximum(distance, distance.transpose(1, 2))  # tied to the bit
    distance = distance.masked_fill(at == at.unsqueeze(1), 0.0).masked_fill(~pair, torch.inf)
    nearest = distance.topk(min(most, states.shape[1]), dim=2, largest=False).values
    among = (at[: nearest.shape[2]] < clusters.clamp(min=1)[:, None, None]) & nearest.isfinite()
    squares = torch.where(among, nearest.square(), 0.0).sum(2) / clusters.clamp(min=1).unsqueeze(1)
    density = (-squares).masked_fill(~real, -torch.inf)  # its logarithm, which does not vanish
    denser = density.unsqueeze(1) > density.unsqueeze(2)
    denser |= (density.unsqueeze(1) == density.unsqueeze(2)) & (at < at.unsqueeze(1))
    to_denser = distance.masked_fill(~denser, torch.inf).amin(2)
    farthest = distance.masked_fill(~pair, -torch.inf).amax(2)
    apart = torch.where(to_denser.isinf(), farthest, to_denser).clamp(min=torch.finfo(distance.dtype).tiny)
    worth = (apart.log() + density).masked_fill(~real, -torch.inf)
    order = worth.argsort(dim=1, descending=True, stable=True)
    centre = torch.zeros_like(real).scatter(1, order, at < clusters.unsqueeze(1)) & real
    into = distance.masked_fill(~centre.unsqueeze(1), torch.inf).argmin(2)
    return centre, torch.where(centre, at, into)
