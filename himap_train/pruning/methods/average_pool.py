"""Average pooling, which looks at nothing and drops nothing (LLaVolta, arXiv 2406.20092; M3, arXiv 2405.17430)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from himap_train.pruning.methods.base import Method, Reads, Seen, Widths
from himap_train.pruning.ranks import of_group, place_in_group
from himap_train.pruning.token_map import Pool


@dataclass(frozen=True)
class AveragePool(Method):
    """The mean of each of k even runs of the image tokens in place of n tokens.

    With n = k s this is LLaVolta's 1-D pooling with kernel and stride s. The mean stands at the place, and has the
    position, of the run's middle token (LLaVolta averages positions: the same for odd s, half a token more for even s).
    Tokens that must stay are neither averaged nor counted into a run.
    """

    name: ClassVar[str] = "average-pool"
    reads: ClassVar[Reads] = Reads.NOTHING
    merges: ClassVar[bool] = True
    ranks = False

    def choose(self, seen: Seen, kept: Tensor) -> Tensor:
        """The tokens that must stay and the middle token of each run first."""
        run, start, end = self._runs(seen, kept)
        layout = seen.layout
        pooled = layout.image & ~layout.protected
        place = place_in_group(pooled, layout, seen.groups)
        middle = pooled & (place == (start + end - 1) // 2) & (run >= 0)
        stays = layout.image & (layout.protected | middle)
        return torch.where(stays, place_in_group(stays, layout, seen.groups), layout.columns.shape[1])

    def pool(self, seen: Seen, keep: Tensor, kept: Tensor) -> Pool:
        """Every token into the middle one of its run."""
        layout = seen.layout
        run, start, end = self._runs(seen, kept)
        own = torch.arange(layout.columns.shape[1], device=layout.columns.device).expand_as(layout.columns)
        pooled = layout.image & ~layout.protected & (run >= 0)
        heads = keep & pooled  # the middle token of each run
        spare = own.shape[1]
        slot = layout.group.clamp(max=seen.groups - 1) * spare + torch.where(pooled, run, 0)
        at = own.new_zeros(len(own), seen.groups * spare + 1)
        at = at.scatter(1, torch.where(heads, slot, seen.groups * spare), own)
        keeper = torch.where(pooled, at.gather(1, slot), own)
        share = torch.where(pooled, 1.0 / (end - start).clamp(min=1), 1.0)
        return Pool(keeper, share)

    def _runs(self, seen: Seen, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The number of each pooled token's run, -1 where nothing is left of it, and the run's bounds. (B, L)."""
        layout, counts, device = seen.layout, seen.counts, seen.layout.columns.device
        runs = of_group((kept - counts.protected).clamp(min=0).to(device), layout)
        left = of_group((counts.current - counts.protected).to(device), layout).clamp(min=1)
        place = place_in_group(layout.image & ~layout.protected, layout, seen.groups).clamp(min=0)
        run = torch.where(runs > 0, ((place + 1) * runs - 1) // left, -1).expand_as(layout.columns)
        start = (run * left) // runs.clamp(min=1)
        end = ((run + 1) * left) // runs.clamp(min=1)
        return run, start, end

    def flops(self, widths: Widths, image_tokens: int, text_tokens: int, kept: int) -> float:
        """One multiply-add for each state."""
        return 2.0 * image_tokens * widths.hidden

    def peak_bytes(self, widths: Widths, image_tokens: int, text_tokens: int, element: int) -> int:
        """Weighted states and their sums, of the whole sequence."""
        return 2 * (image_tokens + text_tokens) * widths.hidden * element
