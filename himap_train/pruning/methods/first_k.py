"""The control for position bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from himap_train.pruning.methods.base import Method, Reads, Seen


@dataclass(frozen=True)
class FirstK(Method):
    """The first image tokens of each row (and turn).

    A sum of causal attention favours early tokens. How far a method's choice overlaps with this one, and how far its
    accuracy lies above it, tells whether it ranks by more than position.
    """

    name: ClassVar[str] = "first-k"
    reads: ClassVar[Reads] = Reads.NOTHING

    def score(self, seen: Seen) -> Tensor:
        """Falls along the row."""
        return -seen.layout.columns.float()
