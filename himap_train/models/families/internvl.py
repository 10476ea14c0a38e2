"""InternVL3 in the Hugging Face layout: equal tiles and a thumbnail, so many tokens each, between two marks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from himap_train.models.families.base import AspectRatio, Family, Images
from himap_train.models.families.blocks import TokenBlock
from himap_train.models.families.pixels import tower_flops
from himap_train.models.families.processing import PartsProcessor, load_tokenizer
from himap_train.models.families.sizes import VisionSizes
from himap_train.pruning.places import TokenGrid

TYPICAL_TILES = 13
"""Tiles of a photo of 4 to 3: four by three tiles and a thumbnail."""


class InternVL(Family):
    """InternVL3 (arXiv 2504.10479) and its like."""

    name: ClassVar[str] = "internvl"
    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    processor_class: ClassVar[type[Any]] = PartsProcessor
    resizes_images: ClassVar[bool] = True

    def empty_images(self, model: Any) -> dict[str, Tensor]:
        """One blank tile."""
        vision = self.vision(model)
        height, width = vision.config.image_size
        blank = torch.zeros(1, vision.config.num_channels, height, width, device=model.device, dtype=vision.dtype)
        return {"pixel_values": blank}

    def image_grids(self, config: Any, given: Mapping[str, Any]) -> list[TokenGrid] | None:
        """One a tile."""
        side = math.isqrt(_tile_tokens(config))
        return [TokenGrid(side, side)]

    def load_processor(self, folder: str, config: Any) -> PartsProcessor:
        """From its parts; the marks around an image are named by the tokenizer."""
        tokenizer = load_tokenizer(folder)
        ids = {}
        for name, usual in (("start_image", "<img>"), ("end_image", "</img>")):
            token = getattr(tokenizer, f"{name}_token", usual)
            ids[f"{name}_id"] = tokenizer.convert_tokens_to_ids(token)
            if ids[f"{name}_id"] in (None, tokenizer.unk_token_id):
                raise ValueError(f"its tokenizer has no {token}, which stands around an image")
        return PartsProcessor(
            family=self.name,
            source=folder,
            tokenizer=tokenizer,
            image_processor=GotOcr2ImageProcessorPil.from_pretrained(folder),
            image_token=tokenizer.convert_ids_to_tokens(config.image_token_id),
            settings={"tile_tokens": _tile_tokens(config), **ids},
        )

    def encode_image(self, processor: Any, image: Image.Image, aspect_ratio: AspectRatio) -> dict[str, Tensor]:
        """`pixel_values` (tiles, 3, H, W), the thumbnail last."""
        # As InternVLProcessor does, whatever the image processor's own setting is.
        made = processor.image_processor([image], crop_to_patches=True, return_tensors="pt")
        return {"pixel_values": made["pixel_values"]}

    def image_tokens(self, processor: Any, image: Images) -> int:
        """So many each tile."""
        return int(processor.settings["tile_tokens"]) * len(image["pixel_values"])

    def tokens_of_size(self, processor: Any, size: tuple[int, int], aspect_ratio: AspectRatio) -> int:
        """So many each tile."""
        rows, columns = _tiles(processor.image_processor, size)
        return int(processor.settings["tile_tokens"]) * (rows * columns + (rows * columns > 1))

    def limit_image_tokens(self, processor: Any, most: int) -> None:
        """By the most tiles (`max_patches`), beside which several have a thumbnail."""
        tile, images = int(processor.settings["tile_tokens"]), processor.image_processor
        if most < tile:
            raise ValueError(
                f"data.max_image_tokens is {most}: the smallest image of this checkpoint, one tile, has {tile}"
            )
        crops = most // tile
        images.max_patches = min(images.max_patches, crops - 1 if crops > 2 else 1)
        images.min_patches = min(images.min_patches, images.max_patches)

    def placeholder(self, processor: Any, tokens: int, size: tuple[int, int]) -> list[int]:
        """`<img>`, the image tokens of all tiles, `</img>`."""
        inside = super().placeholder(processor, tokens, size)
        return [processor.settings["start_image_id"], *inside, processor.settings["end_image_id"]]

    def token_blocks(self, processor: Any, image: Images, picture: Image.Image) -> list[TokenBlock]:
        """A block a tile, row by row, then the thumbnail."""
        rows, columns = _tiles(processor.image_processor, picture.size)
        side = round(int(processor.settings["tile_tokens"]) ** 0.5)
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
        """Those of a photo of 4 to 3 where up to 12 tiles are allowed, as in InternVL3."""
        return TYPICAL_TILES * _tile_tokens(config)

    def vision_flops(self, config: Any, image_tokens: int) -> float:
        """All tiles through the tower."""
        tile = tower_flops(config.vision_config, _patches(config.vision_config))
        return tile * image_tokens / _tile_tokens(config)

    def projector_flops(self, config: Any, image_tokens: int) -> tuple[float, float]:
        """Two linear layers, the first over the patches that make one token."""
        width, joined = config.text_config.hidden_size, round(1 / config.downsample_ratio) ** 2
        return (
            2.0 * image_tokens * joined * config.vision_config.hidden_size * width,
            2.0 * image_tokens * width**2,
        )

    def vision_sizes(self, config: Any, image_tokens: int) -> VisionSizes:
        """All tiles through tower and projector; the projector's norm keeps its input too."""
        vision, width = config.vision_config, config.text_config.hidden_size
        tiles, joined = max(image_tokens // _tile_tokens(config), 1), round(1 / config.downsample_ratio) ** 2
        states = (vision.num_hidden_layers + 3) * vision.hidden_size + 3 * vision.intermediate_size
        return VisionSizes(
            pixels=tiles * vision.num_channels * vision.image_size[0] * vision.image_size[1],
            tower=tiles * (_patches(vision) + 1) * states,
            kept=image_tokens * (2 * joined * vision.hidden_size + 2 * width),
            features=image_tokens * (2 * joined * vision.hidden_size + 2 * width),
            copied=width**2,
        )


def _patches(vision: Any) -> int:
    """Patches of one tile."""
    (height, width), (tall, wide) = vision.image_size, vision.patch_size
    return int((height // tall) * (width // wide))


def _tile_tokens(config: Any) -> int:
    """Image tokens of one tile."""
    return int(_patches(config.vision_config) * config.downsample_ratio**2)


def _tiles(image_processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the tiles of a picture of this (width, height), without the thumbnail."""
    if image_processor.max_patches <= 1:
        return 1, 1
    tile = image_processor.size
    columns, rows = get_optimal_tiled_canvas(
        (size[1], size[0]), (tile.height, tile.width), image_processor.min_patches, image_processor.max_patches
    )
    return rows, columns
