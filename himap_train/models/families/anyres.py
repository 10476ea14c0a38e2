"""What LLaVA-NeXT and LLaVA-OneVision share: an image as an overview and as tiles of a larger canvas.

The picture is fitted into one of the allowed resolutions, the canvas cut into tiles of the tower's size, and the whole
picture, squeezed into one tile, put before them. The decoder gets the overview's tokens first, then those of the canvas
row by row, without the rows or columns that only pad it, each row with one learned token at its end (`image_newline`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from himap_train.models.families.base import Images
from himap_train.models.families.blocks import TokenBlock
from himap_train.models.families.sizes import VisionSizes
from himap_train.pruning.places import TokenGrid

TYPICAL = (640, 480)
"""Width and height of the picture for which plans are made."""


@dataclass(frozen=True)
class Anyres:
    """How pictures are cut.

    Attributes:
        resolutions: (height, width) of the canvases.
        tile: Side of a tile in pixels.
        side: Patches along a side of a tile.
        most: Where the canvas has clearly more than so many tiles' patches its features are scaled down to that many;
            None for never.
    """

    resolutions: tuple[tuple[int, int], ...]
    tile: int
    side: int
    most: int | None = None

    @classmethod
    def of_config(cls, config: Any, most: int | None = None) -> Anyres:
        """From a model's config."""
        vision: Any = config.vision_config
        pinpoints = tuple((height, width) for height, width in config.image_grid_pinpoints)
        return cls(pinpoints, vision.image_size, vision.image_size // vision.patch_size, most)

    def canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the canvas for a picture of this (width, height)."""
        height, width = select_best_resolution((size[1], size[0]), list(self.resolutions))
        return height, width

    def crops(self, size: tuple[int, int]) -> int:
        """Tiles of a picture, the overview among them."""
        height, width = self.canvas(size)
        return 1 + (height // self.tile) * (width // self.tile)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of canvas patches that the decoder gets."""
        rows, columns, _, _ = self._unpadded(size)
        if self.most is not None:
            ratio = math.sqrt(rows * columns / (self.most * self.side**2))
            if ratio > 1.1:
                return int(rows // ratio), int(columns // ratio)
        return rows, columns

    def tokens(self, size: tuple[int, int]) -> int:
        """Canvas patches with a newline each row; those of the overview come on top."""
        rows, columns = self.grid(size)
        return rows * (columns + 1)

    def block(self, size: tuple[int, int]) -> TokenBlock:
        """Where the canvas tokens lie over the picture."""
        rows, columns, above, left = self._unpadded(size)
        patch, (width, height) = self.tile / self.side, size
        tall, wide = self.canvas(size)
        scale = min(wide / width, tall / height)  # of the picture in the middle of the canvas
        x = (left * patch - (wide - scale * width) / 2) / (scale * width)
        y = (above * patch - (tall - scale * height) / 2) / (scale * height)
        box = (x, y, x + columns * patch / (scale * width), y + rows * patch / (scale * height))
        return TokenBlock(*self.grid(size), box=box, row_end=1, view="tiles")

    def grids(self, sizes: Tensor | None, overview: int) -> list[TokenGrid] | None:
        """Overview and canvas of each picture, two grids a picture.

        Args:
            sizes: (pictures, 2), height and width; None where they are not known.
            overview: Tokens of an overview, a class token among them.
        """
        if sizes is None:
            return None
        first = TokenGrid(self.side, self.side, before=max(overview - self.side**2, 0))
        canvases = (self.grid((width, height)) for height, width in sizes.tolist())
        return [grid for canvas in canvases for grid in (first, TokenGrid(*canvas, row_end=1))]

    def crops_for(self, tokens: int) -> int:
        """Tiles, the overview among them, of an image that gives so many tokens with it: those of a typical picture if
        it gives so many, else the fewest that can. Pictures of one number of tokens may differ in their tiles.
        """
        if self.tokens(TYPICAL) + self.side**2 == tokens:
            return self.crops(TYPICAL)
        whole = [(width, height) for height, width in self.resolutions]
        enough = [self.crops(size) for size in whole if self.tokens(size) + self.side**2 >= tokens]
        return min(enough, default=max(map(self.crops, whole)))

    def smallest(self, channels: int) -> dict[str, Tensor]:
        """A blank picture of the fewest tiles: `pixel_values` (1, crops, channels, H, W) and `image_sizes` (1, 2)."""
        height, width = min(self.resolutions, key=lambda shape: (shape[0] * shape[1], shape))
        pixels = torch.zeros(1, self.crops((width, height)), channels, self.tile, self.tile)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}

    def _unpadded(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Rows and columns of canvas patches that show the picture, and of those cut off above and on the left."""
        # As transformers 5.23 `unpad_image` and `LlavaNextProcessor._get_unpadded_features`, rounding included.
        (width, height), (tall, wide) = size, self.canvas(size)
        rows, columns = self.side * (tall // self.tile), self.side * (wide // self.tile)
        if width / height > columns / rows:
            above = (rows - int(round(height * (columns / width), 7))) // 2
            return rows - 2 * above, columns, above, 0
        left = (columns - int(round(width * (rows / height), 7))) // 2
        return rows, columns - 2 * left, 0, left


def size_of(image: Images) -> tuple[int, int]:
    """(width, height) of the picture that was encoded."""
    height, width = image["image_sizes"][0].tolist()
    return width, height


def pinpoints_of(image_processor: Any) -> tuple[tuple[int, int], ...]:
    """The (height, width) of the canvases that an image processor knows."""
    return tuple((height, width) for height, width in image_processor.image_grid_pinpoints)


def tile_of(image_processor: Any) -> int:
    """Side of a tile in pixels as an image processor makes them."""
    crop, size = image_processor.crop_size, image_processor.size
    if image_processor.do_center_crop and crop and crop.height:
        return int(crop.height)
    return int(size.height or size.shortest_edge)


def of_crops(one: VisionSizes, crops: int, packed: int) -> VisionSizes:
    """Sizes of so many crops, with the features that the decoder gets packed anew: so many numbers."""
    return VisionSizes(
        pixels=one.pixels * crops,
        tower=one.tower * crops,
        kept=one.kept * crops,
        features=one.features * crops + packed,
        copied=one.copied,
    )
