"""LLaVA-NeXT (1.6): an overview and tiles of the picture, with a learned token behind each row of tiles' patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaNextProcessor

from himap_train.models.families.anyres import TYPICAL, Anyres, of_crops, pinpoints_of, size_of, tile_of
from himap_train.models.families.base import AspectRatio, Family, Images
from himap_train.models.families.blocks import TokenBlock
from himap_train.models.families.llava import (
    class_token,
    has_class_token,
    mlp_flops,
    overview_tokens,
    select_strategy,
    set_missing,
)
from himap_train.models.families.pixels import patches_of, tower_flops
from himap_train.models.families.sizes import VisionSizes
from himap_train.models.families.tower_reading import TOWERS, read_crops
from himap_train.pruning.places import TokenGrid


class LlavaNext(Family):
    """LLaVA-NeXT (January 2024)."""

    name: ClassVar[str] = "llava_next"
    model_types: ClassVar[tuple[str, ...]] = ("llava_next",)
    towers: ClassVar[tuple[str, ...]] = TOWERS
    processor_class: ClassVar[type[Any]] = LlavaNextProcessor

    def empty_images(self, model: Any) -> dict[str, Tensor]:
        """A blank picture of as few tiles as there can be."""
        vision = self.vision(model)
        images = Anyres.of_config(model.config).smallest(vision.config.num_channels)
        return {
            "pixel_values": images["pixel_values"].to(model.device, vision.dtype),
            "image_sizes": images["image_sizes"].to(model.device),
        }

    def read_tower(self, model: Any, images: Images, states: Any) -> Tensor:
        """Packed as the features are; of newlines zero."""
        crops = read_crops(model.config, self.vision(model), states, *class_token(model.config))
        cut, sizes, newline = Anyres.of_config(model.config), images["image_sizes"], crops.new_zeros(crops.shape[2])
        parts = crops.split([cut.crops((width, height)) for height, width in sizes.tolist()])
        return torch.cat(model.model.pack_image_features(parts, sizes, select_strategy(model.config), newline)[0])

    def image_grids(self, config: Any, given: Mapping[str, Any]) -> list[TokenGrid] | None:
        """Overview and canvas of each picture, where their sizes are given."""
        return Anyres.of_config(config).grids(given.get("image_sizes"), overview_tokens(config))

    def load_processor(self, folder: str, config: Any) -> LlavaNextProcessor:
        """The stock one; facts about image tokens that old checkpoints leave out come from the model's config."""
        processor = LlavaNextProcessor.from_pretrained(folder)
        set_missing(processor, folder, config)
        return processor

    def encode_image(self, processor: Any, image: Image.Image, aspect_ratio: AspectRatio) -> dict[str, Tensor]:
        """`pixel_values` (1, crops, 3, H, W), the overview first, and `image_sizes` (1, 2): height and width."""
        return dict(processor.image_processor([image], return_tensors="pt"))

    def image_tokens(self, processor: Any, image: Images) -> int:
        """Those of a picture of its size."""
        return self.tokens_of_size(processor, size_of(image), "as_processor")

    def tokens_of_size(self, processor: Any, size: tuple[int, int], aspect_ratio: AspectRatio) -> int:
        """Overview, canvas patches that show the picture, and a newline each row of them."""
        cut = _cut(processor)
        return cut.side**2 + _class_tokens(processor) + cut.tokens(size)

    def token_blocks(self, processor: Any, image: Images, picture: Image.Image) -> list[TokenBlock]:
        """Overview and tiles."""
        cut, class_tokens = _cut(processor), _class_tokens(processor)
        return [
            TokenBlock(cut.side, cut.side, before=class_tokens, view="overview"),
            cut.block(size_of(image)),
        ]

    def tokens_of_config(self, config: Any) -> int:
        """Those of a photo of 640 x 480 pixels."""
        return overview_tokens(config) + Anyres.of_config(config).tokens(TYPICAL)

    def vision_flops(self, config: Any, image_tokens: int) -> float:
        """All crops through the tower."""
        crops = Anyres.of_config(config).crops_for(image_tokens)
        return crops * tower_flops(config.vision_config, patches_of(config.vision_config), has_class_token(config))

    def projector_flops(self, config: Any, image_tokens: int) -> tuple[float, float]:
        """Two linear layers over the patches of all crops, those that only pad among them."""
        return mlp_flops(config, Anyres.of_config(config).crops_for(image_tokens) * overview_tokens(config))

    def vision_sizes(self, config: Any, image_tokens: int) -> VisionSizes:
        """All crops through tower and projector, and what the decoder gets of them."""
        one = super().vision_sizes(config, overview_tokens(config))
        return of_crops(
            one, Anyres.of_config(config).crops_for(image_tokens), image_tokens * config.text_config.hidden_size
        )


def _cut(processor: Any) -> Anyres:
    tile = tile_of(processor.image_processor)
    return Anyres(pinpoints_of(processor.image_processor), tile, tile // processor.patch_size)


def _class_tokens(processor: Any) -> int:
    """Tokens of the overview beside its patches: the class token with "full"; -1 where a tower without one loses a
    patch to "default".
    """
    return int(processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default"))
