"""HiMAP's deep criterion, per row that can see a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from himap_train.pruning.methods.base import Seen
from himap_train.pruning.methods.image import ByImage


@dataclass(frozen=True)
class ImageDebiased(ByImage):
    """Mean attention over the image rows that can see a token.

    Under a causal mask the first image token is seen by all image rows, the last by one; the sum of `image` favours the
    first 1000 to 1. This form turns that bias round in early layers rather than taking it out.
    """

    name: ClassVar[str] = "image_debiased"

    def score(self, seen: Seen) -> Tensor:
        """The sum, divided by how many rows see the token."""
        assert seen.rows is not None
        index, columns = seen.rows.index, torch.arange(seen.layout.columns.shape[1], device=seen.layout.columns.device)
        sees = seen.rows.may_rank & (index.unsqueeze(2) >= columns)
        return super().score(seen) / sees.sum(1).clamp(min=1)
