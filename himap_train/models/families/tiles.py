"""Families that cut a picture into equal tiles of so many image tokens each, several with the whole picture behind."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from himap_train.models.families.base import AspectRatio, Family, Images
from himap_train.models.families.blocks import TokenBlock
from himap_train.models.families.pixels import tower_flops
from himap_train.models.families.processing import PartsProcessor
from himap_train.models.families.sizes import VisionSizes
from himap_train.pruning.places import TokenGrid

TYPICAL_TILES = 13
"""Tiles of a photo of 4 to 3: four by three tiles and the whole picture."""


class Tiled(Family):
    """What they have in common. `pixel_values` has the tiles row by row, then the whole picture.

    Attributes:
        class_token: Whether the vision tower has one.
    """

    processor_class: ClassVar[type[Any]] = PartsProcessor
    resizes_images: ClassVar[bool] = True
    class_token: ClassVar[bool]

    @abstractmethod
    def tiles(self, processor: Any, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tiles of a picture of this (width, height), without the whole one."""

    @abstractmethod
    def joined(self, config: Any) -> int:
        """Patches along a side of the square that becomes one token."""

    def tile_tokens(self, config: Any) -> int:
        """Image tokens of one tile."""
        return self._patches(config.vision_config) // self.joined(config) ** 2

    def empty_images(self, model: Any) -> dict[str, Tensor]:
        """One blank tile."""
        vision = self.vision(model)
        size = _pair(vision.config.image_size)
        blank = torch.zeros(1, vision.config.num_channels, *size, device=model.device, dtype=vision.dtype)
        return {"pixel_values": blank}

    def image_grids(self, config: Any, given: Mapping[str, Any]) -> list[TokenGrid] | None:
        """One a tile."""
        side = math.isqrt(self.tile_tokens(config))
        return [TokenGrid(side, side)]

    def image_tokens(self, processor: Any, image: Images) -> int:
        """So many each tile."""
        return int(processor.settings["tile_tokens"]) * len(image["pixel_values"])

    def tokens_of_size(self, processor: Any, size: tuple[int, int], aspect_ratio: AspectRatio) -> int:
        """So many each tile."""
        rows, columns = self.tiles(processor, size)
        return int(processor.settings["tile_tokens"]) * (rows * columns + (rows * columns > 1))

    def limit_image_tokens(self, processor: Any, most: int) -> None:
        """By the number of tiles; where there is room for one alone the picture is not cut."""
        tile = int(processor.settings["tile_tokens"])
        if most < tile:
            raise ValueError(
                f"data.max_image_tokens is {most}: the smallest image of this checkpoint, one tile, has {tile}"
            )
        crops = most // tile
        self.limit_tiles(processor.image_processor, crops - 1 if crops > 2 else 1)

    @abstractmethod
    def limit_tiles(self, image_processor: Any, most: int) -> None:
        """Cut no picture into more tiles, the whole one left out of account."""

    def token_blocks(self, processor: Any, image: Images, picture: Image.Image) -> list[TokenBlock]:
        """A block a tile, row by row, then the thumbnail."""
        rows, columns = self.tiles(processor, picture.size)
        side = math.isqrt(int(processor.settings["tile_tokens"]))
        several = rows * columns > 1
        tiles = [
            TokenBlock(
                side,
                side,
                box=(column / columns, row / rows, (column + 1) / columns, (row + 1) / rows),
                view="tiles" if several else "picture",
            )
            for row in range(rows)
            for column in range(columns)
        ]
        return [*tiles, TokenBlock(side, side, view="thumbnail")] if several else tiles

    def tokens_of_config(self, config: Any) -> int:
        """Those of a photo of 4 to 3 under the limits that checkpoints come with."""
        return TYPICAL_TILES * self.tile_tokens(config)

    def vision_flops(self, config: Any, image_tokens: int) -> float:
        """All tiles through the tower."""
        tile = tower_flops(config.vision_config, self._patches(config.vision_config), self.class_token)
        return tile * image_tokens / self.tile_tokens(config)

    def vision_sizes(self, config: Any, image_tokens: int) -> VisionSizes:
        """All tiles through tower and projector, which keeps the patches that it joins twice."""
        vision, width = config.vision_config, config.text_config.hidden_size
        tiles = max(image_tokens // self.tile_tokens(config), 1)
        states = (vision.num_hidden_layers + 3) * vision.hidden_size + 3 * vision.intermediate_size
        features = 2 * self.joined(config) ** 2 * vision.hidden_size + 2 * width
        return VisionSizes(
            pixels=tiles * vision.num_channels * math.prod(_pair(vision.image_size)),
            tower=tiles * (self._patches(vision) + self.class_token) * states,
            kept=image_tokens * features,
            features=image_tokens * features,
            copied=width**2,
        )

    def _patches(self, vision: Any) -> int:
        """Patches of one tile."""
        (height, width), (tall, wide) = _pair(vision.image_size), _pair(vision.patch_size)
        return int((height // tall) * (width // wide))


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """Height and width; some configs say one number for both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
