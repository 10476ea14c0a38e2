"""SmolVLM and Idefics3: tiles of few tokens each, and text between them that says which row and column they are."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import MAX_IMAGE_SIZE, SmolVLMImageProcessorPil

from himap_train.models.families.base import AspectRatio
from himap_train.models.families.processing import PartsProcessor, load_tokenizer, mark_id
from himap_train.models.families.tiles import Tiled


class SmolVLM(Tiled):
    """SmolVLM (arXiv 2504.05299) and Idefics3 (arXiv 2408.12637)."""

    name: ClassVar[str] = "smolvlm"
    model_types: ClassVar[tuple[str, ...]] = ("smolvlm", "idefics3")
    decoder_name: ClassVar[str] = "model.text_model"
    vision_name: ClassVar[str] = "model.vision_model"
    projector_names: ClassVar[tuple[str, ...]] = ("model.connector",)
    weight_renames: ClassVar[tuple[tuple[str, str], ...]] = ()
    casts_features: ClassVar[bool] = True
    marks_tiles: ClassVar[bool] = True
    class_token: ClassVar[bool] = False

    def joined(self, config: Any) -> int:
        """`scale_factor`: 4, in Idefics3 2."""
        return int(config.scale_factor)

    def empty_images(self, model: Any) -> dict[str, Tensor]:
        """One blank tile; of zeros it would count as padding."""
        return {name: torch.ones_like(values)[None] for name, values in super().empty_images(model).items()}

    def load_processor(self, folder: str, config: Any) -> PartsProcessor:
        """From its parts; the marks around a tile are named by the tokenizer."""
        tokenizer = load_tokenizer(folder)
        kind = SmolVLMImageProcessorPil if config.model_type == "smolvlm" else Idefics3ImageProcessorPil
        marks = {
            "around": getattr(tokenizer, "fake_image_token", "<fake_token_around_image>"),
            "whole": getattr(tokenizer, "global_image_token", "<global-img>"),
        }
        mark_id(tokenizer, marks["around"], "a tile")
        images = kind.from_pretrained(folder)
        if not images.size.get("longest_edge") or not images.max_image_size.get("longest_edge"):
            raise ValueError(
                f"its image processor has no longest_edge: size {images.size}, tile {images.max_image_size}"
            )
        return PartsProcessor(
            family=self.name,
            source=folder,
            tokenizer=tokenizer,
            image_processor=images,
            image_token=tokenizer.convert_ids_to_tokens(config.image_token_id),
            settings={"tile_tokens": self.tile_tokens(config), **marks},
        )

    def encode_image(self, processor: Any, image: Image.Image, aspect_ratio: AspectRatio) -> dict[str, Tensor]:
        """`pixel_values` (tiles, 1, 3, H, W): each as a conversation of its own, which the stock forward puts in a row.

        Tiles are of one size, so there is no padding and no `pixel_attention_mask`.
        """
        made = processor.image_processor([image], return_tensors="pt")
        return {"pixel_values": made["pixel_values"][0][:, None]}

    def tiles(self, processor: Any, size: tuple[int, int]) -> tuple[int, int]:
        """Those of the picture scaled to the longest edge there is, then up to whole tiles."""
        images = processor.image_processor
        if not images.do_image_splitting:
            return 1, 1
        tile, (width, height) = images.max_image_size["longest_edge"], size
        if images.do_resize:
            width, height = _scaled(width, height, images.size["longest_edge"])
        wide = width >= height
        long, ratio = max(width, height), width / height
        long = math.ceil(long / tile) * tile
        short = math.ceil(int(long / ratio if wide else long * ratio) / tile)
        rows, columns = (short, long // tile) if wide else (long // tile, short)
        return max(rows, 1), max(columns, 1)

    def limit_tiles(self, image_processor: Any, most: int) -> None:
        """By the longest edge: so many tiles of a square picture, fewer of others."""
        if image_processor.do_image_splitting and not image_processor.do_resize:
            raise ValueError(
                "data.max_image_tokens makes images smaller before they are cut, and this checkpoint's image processor "
                "leaves their size as it is (do_resize false): set do_resize, or do_image_splitting to false"
            )
        edge = math.isqrt(most) * image_processor.max_image_size["longest_edge"]
        image_processor.size = {"longest_edge": min(image_processor.size["longest_edge"], edge)}

    def placeholder(self, processor: Any, tokens: int, size: tuple[int, int]) -> list[int]:
        """Each tile behind its mark and place, a line a row of them, then the whole picture."""
        rows, columns = self.tiles(processor, size)
        around, tile = processor.settings["around"], processor.settings["tile_tokens"]
        names = [f"<row_{row + 1}_col_{column + 1}>" for row in range(rows) for column in range(columns)]
        ids: list[int] = []
        for number, name in enumerate(names if len(names) > 1 else (), start=1):
            ends = "\n" * ((number % columns == 0) + (number == len(names)))
            ids += _ids(processor, around + name) + [processor.image_token_id] * tile + _ids(processor, ends)
        whole = _ids(processor, around + processor.settings["whole"])
        return [*ids, *whole, *[processor.image_token_id] * tile, *_ids(processor, around)]

    def projector_flops(self, config: Any, image_tokens: int) -> tuple[float, float]:
        """One linear layer over the patches that make one token."""
        joined = self.joined(config) ** 2 * config.vision_config.hidden_size
        return 2.0 * image_tokens * joined * config.text_config.hidden_size, 0.0


def _scaled(width: int, height: int, longest: int) -> tuple[int, int]:
    """As the image processors scale a picture: the short side even, and none longer than they take at all."""
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        width, height = int(longest * ratio), longest
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    ratio = width / height
    if width >= height and width > MAX_IMAGE_SIZE:
        return MAX_IMAGE_SIZE, max(int(MAX_IMAGE_SIZE / ratio), 1)
    if height > width and height > MAX_IMAGE_SIZE:
        return max(int(MAX_IMAGE_SIZE * ratio), 1), MAX_IMAGE_SIZE
    return width, height


def _ids(processor: Any, text: str) -> list[int]:
    found: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found
