"""The floor that a method has to beat: chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from himap_train.pruning.methods.base import Method, Reads, Seen


@dataclass(frozen=True)
class Random(Method):
    """Scores drawn anew each time from torch's generator."""

    name: ClassVar[str] = "random"
    reads: ClassVar[Reads] = Reads.NOTHING
    by_chance: ClassVar[bool] = True

    def score(self, seen: Seen) -> Tensor:
        """Uniform in [0, 1)."""
        return torch.rand(seen.layout.image.shape, device=seen.layout.image.device)
