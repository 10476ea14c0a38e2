"""What a family tells the layer loop of a forward pass. Shapes: B rows, S columns, D decoder width."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Positions:
    """Position numbers of a forward pass.

    Attributes:
        rotary: What the decoder's rotary embedding takes: (B, S) or (1, S), in M-RoPE (3, B, S).
        text: What masks and layers take, (B, S) or (1, S); None where the stock decoder gives them none.
    """

    rotary: Tensor
    text: Tensor | None


@dataclass(frozen=True)
class LayerInputs:
    """What is added to the image tokens between decoder layers (DeepStack, arXiv 2406.04334).

    Attributes:
        planes: (B, S, D) each, zero at text; plane `l` is added behind layer `l`.
        image: (B, S) bool, where.
    """

    planes: tuple[Tensor, ...]
    image: Tensor
