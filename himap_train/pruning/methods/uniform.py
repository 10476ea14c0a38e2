"""The floor that a method has to beat: an even choice over the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from himap_train.pruning.methods.base import Method, Reads, Seen


@dataclass(frozen=True)
class Uniform(Method):
    """Even in the picture's two dimensions: the beginning of a farthest-point sequence over each grid of tokens.

    Several pictures, or tiles and overview of one, each keep the same fraction. A smaller choice lies in a larger one.
    See `pruning.places`; `stride` is even along the flattened tokens.
    """

    name: ClassVar[str] = "uniform"
    reads: ClassVar[Reads] = Reads.NOTHING
    uses_places = True

    def score(self, seen: Seen) -> Tensor:
        """The earlier in the sequence the better."""
        assert seen.layout.places is not None
        return -seen.layout.places.even
