"""Every n-th token of the flattened image, which at some ratios is a single column of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from himap_train.pruning.methods.base import Method, Reads, Seen
from himap_train.pruning.ranks import of_group, place_in_group


@dataclass(frozen=True)
class Stride(Method):
    """Evenly spaced along the flattened image tokens, k of n."""

    name: ClassVar[str] = "stride"
    reads: ClassVar[Reads] = Reads.NOTHING
    ranks = False

    def choose(self, seen: Seen, kept: Tensor) -> Tensor:
        """The chosen ones first."""
        layout, device = seen.layout, seen.layout.columns.device
        stay = of_group(kept.to(device, non_blocking=True), layout)
        left = of_group(seen.counts.current.to(device, non_blocking=True), layout).clamp(min=1)
        place = place_in_group(layout.image, layout, seen.groups)
        chosen = (place + 1) * stay // left - place * stay // left
        return super().choose(replace(seen, scores=chosen.float()), kept)
