"""InternVL3 in the Hugging Face layout: equal tiles and a thumbnail, so many tokens each, between two marks."""

from __future__ import annotations

from typing import Any, ClassVar

from PIL import Image
from torch import Tensor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from himap_train.models.families.base import AspectRatio
from himap_train.models.families.processing import PartsProcessor, load_tokenizer, mark_id
from himap_train.models.families.tiles import Tiled


class InternVL(Tiled):
    """InternVL3 (arXiv 2504.10479) and its like."""

    name: ClassVar[str] = "internvl"
    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    class_token: ClassVar[bool] = True

    def joins_images(self, config: Any) -> bool:
        """As tiles."""
        return True

    def joined(self, config: Any) -> int:
        """Two, as its pixels are shuffled."""
        return round(1 / config.downsample_ratio)

    def load_processor(self, folder: str, config: Any) -> PartsProcessor:
        """From its parts; the marks around an image are named by the tokenizer."""
        tokenizer = load_tokenizer(folder)
        ids = {
            f"{name}_id": mark_id(tokenizer, getattr(tokenizer, f"{name}_token", usual), "an image")
            for name, usual in (("start_image", "<img>"), ("end_image", "</img>"))
        }
        return PartsProcessor(
            family=self.name,
            source=folder,
            tokenizer=tokenizer,
            image_processor=GotOcr2ImageProcessorPil.from_pretrained(folder),
            image_token=tokenizer.convert_ids_to_tokens(config.image_token_id),
            settings={"tile_tokens": self.tile_tokens(config), **ids},
        )

    def encode_image(self, processor: Any, image: Image.Image, aspect_ratio: AspectRatio) -> dict[str, Tensor]:
        """`pixel_values` (tiles, 3, H, W), the thumbnail last."""
        # As InternVLProcessor does, whatever the image processor's own setting is.
        made = processor.image_processor([image], crop_to_patches=True, return_tensors="pt")
        return {"pixel_values": made["pixel_values"]}

    def tiles(self, processor: Any, size: tuple[int, int]) -> tuple[int, int]:
        """As many as suit its shape."""
        images = processor.image_processor
        if images.max_patches <= 1:
            return 1, 1
        columns, rows = get_optimal_tiled_canvas(
            (size[1], size[0]), (images.size.height, images.size.width), images.min_patches, images.max_patches
        )
        return rows, columns

    def limit_tiles(self, image_processor: Any, most: int) -> None:
        """By `max_patches`."""
        image_processor.max_patches = min(image_processor.max_patches, most)
        image_processor.min_patches = min(image_processor.min_patches, image_processor.max_patches)

    def placeholder(self, processor: Any, tokens: int, size: tuple[int, int]) -> list[int]:
        """`<img>`, the image tokens of all tiles, `</img>`."""
        inside = super().placeholder(processor, tokens, size)
        return [processor.settings["start_image_id"], *inside, processor.settings["end_image_id"]]

    def projector_flops(self, config: Any, image_tokens: int) -> tuple[float, float]:
        """Two linear layers, the first over the patches that make one token."""
        width, joined = config.text_config.hidden_size, self.joined(config) ** 2
        return (
            2.0 * image_tokens * joined * config.vision_config.hidden_size * width,
            2.0 * image_tokens * width**2,
        )
