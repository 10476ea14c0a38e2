"""Where image tokens lie over their picture, for pictures of what is kept."""

from __future__ import annotations

from dataclasses import dataclass

from himap_train.pruning.places import TokenGrid


@dataclass(frozen=True)
class TokenBlock(TokenGrid):
    """A grid of image tokens over a part of the picture.

    Attributes:
        box: The part: left, top, right and bottom as fractions of the picture's width and height. A grid over padding
            goes beyond 0 or 1.
        view: Blocks of one view lie beside each other; an overview and its tiles are two views of one picture.
    """

    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    view: str = "picture"
