"""LLaVA-OneVision: LLaVA-NeXT's tiles on a SigLIP tower, scaled down where they are many; none for several images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from himap_train.models.families.anyres import TYPICAL, Anyres, of_crops, pinpoints_of, size_of, tile_of
from himap_train.models.families.base import AspectRatio, Family, Images
from himap_train.models.families.blocks import TokenBlock
from himap_train.models.families.llava import class_token, has_class_token, mlp_flops, overview_tokens
from himap_train.models.families.pixels import patches_of, require_bounded, tower_flops
from himap_train.models.families.processing import PartsProcessor, load_tokenizer
from himap_train.models.families.sizes import VisionSizes
from himap_train.models.families.tower_reading import TOWERS, read_crops
from himap_train.pruning.places import TokenGrid


class LlavaOnevision(Family):
    """LLaVA-OneVision (arXiv 2408.03326).

    A conversation with one image has it as overview and tiles. With several each is padded to a square and seen once:
    `batch_num_images` says so to the stock forward, with the number of images at the first of a conversation and zeros
    at the others.
    """

    name: ClassVar[str] = "llava_onevision"
    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    towers: ClassVar[tuple[str, ...]] = TOWERS
    processor_class: ClassVar[type[Any]] = PartsProcessor
    counts_images: ClassVar[bool] = True
    caches_features: ClassVar[bool] = False

    def empty_images(self, model: Any) -> dict[str, Tensor]:
        """A blank picture of as few tiles as there can be."""
        vision = self.vision(model)
        images = _cut_of_config(model.config).smallest(vision.config.num_channels)
        return {
            "pixel_values": images["pixel_values"].to(model.device, vision.dtype),
            "image_sizes": images["image_sizes"].to(model.device),
        }

    def read_tower(self, model: Any, images: Images, states: Any) -> Tensor:
        """Packed, and scaled down, as the features are; of newlines zero."""
        config, sizes, counts = model.config, images["image_sizes"], images.get("batch_num_images")
        crops = read_crops(config, self.vision(model), states, *class_token(config))
        alone = [True] * len(sizes) if counts is None else [n == 1 for n in counts.tolist() for _ in range(n)]
        whole = [_cut_of_config(config).crops((width, height)) for height, width in sizes.tolist()]
        parts = crops.split([number if single else 1 for number, single in zip(whole, alone, strict=True)])
        newline = crops.new_zeros(crops.shape[2])
        return torch.cat(model.model.pack_image_features(parts, sizes, newline, config.vision_aspect_ratio)[0])

    def image_grids(self, config: Any, given: Mapping[str, Any]) -> list[TokenGrid] | None:
        """Overview and canvas of each picture; of several in one conversation the overview alone."""
        cut, counts = _cut_of_config(config), given.get("batch_num_images")
        grids = cut.grids(given.get("image_sizes"), overview_tokens(config))
        if grids is None or counts is None:
            return grids
        alone = [TokenGrid(cut.side, cut.side), TokenGrid(0, 0, before=1)]  # one crop and its newline
        several = [number > 1 for number in counts.tolist() for _ in range(number)]
        whole = zip(grids[::2], grids[1::2], strict=True)
        return [grid for pair, crowd in zip(whole, several, strict=True) for grid in (alone if crowd else pair)]

    def load_processor(self, folder: str, config: Any) -> PartsProcessor:
        """From its parts; how many tokens an image has is the model's own affair."""
        tokenizer = load_tokenizer(folder)
        return PartsProcessor(
            family=self.name,
            source=folder,
            tokenizer=tokenizer,
            image_processor=LlavaOnevisionImageProcessorPil.from_pretrained(folder),
            image_token=tokenizer.convert_ids_to_tokens(config.image_token_id),
            settings={"overview": overview_tokens(config), "side": _side(config), "most": _most(config)},
        )

    def encode_image(self, processor: Any, image: Image.Image, aspect_ratio: AspectRatio) -> dict[str, Tensor]:
        """The only image of a conversation: `pixel_values` (1, crops, 3, H, W), `image_sizes` (1, 2) and
        `batch_num_images` (1,).
        """
        return self.encode_conversation(processor, [image], aspect_ratio)[0]

    def encode_conversation(
        self, processor: Any, images: Iterable[Image.Image], aspect_ratio: AspectRatio
    ) -> list[dict[str, Tensor]]:
        """As `encode_image`; one crop each where there are several."""
        together = list(images)
        if not together:
            return []
        if len(together) > 1:
            _require_bounded_squares([image.size for image in together])
        made = processor.image_processor([together], return_tensors="pt")
        return [
            {
                "pixel_values": made["pixel_values"][number : number + 1],
                "image_sizes": made["image_sizes"][number : number + 1],
                "batch_num_images": torch.tensor([0 if number else len(together)]),
            }
            for number in range(len(together))
        ]

    def image_tokens(self, processor: Any, image: Images) -> int:
        """Those of a picture of its size, or of one crop and its newline."""
        if image["pixel_values"].shape[1] == 1:
            return int(processor.settings["overview"]) + 1
        return self.tokens_of_size(processor, size_of(image), "as_processor")

    def tokens_of_size(self, processor: Any, size: tuple[int, int], aspect_ratio: AspectRatio) -> int:
        """Overview, canvas patches that show the picture, and a newline each row of them."""
        return int(processor.settings["overview"]) + _cut(processor).tokens(size)

    def tokens_of_sizes(self, processor: Any, sizes: Sequence[tuple[int, int]], aspect_ratio: AspectRatio) -> list[int]:
        """One crop and its newline each where there are several."""
        if len(sizes) > 1:
            _require_bounded_squares(sizes)
            return [int(processor.settings["overview"]) + 1] * len(sizes)
        return super().tokens_of_sizes(processor, sizes, aspect_ratio)

    def token_blocks(self, processor: Any, image: Images, picture: Image.Image) -> list[TokenBlock]:
        """Overview and tiles, or the padded square and its newline."""
        cut, size = _cut(processor), size_of(image)
        if image["pixel_values"].shape[1] == 1:
            side = max(size)
            x, y = (side / size[0] - 1) / 2, (side / size[1] - 1) / 2
            square = TokenBlock(cut.side, cut.side, box=(-x, -y, 1 + x, 1 + y))
            return [square, TokenBlock(0, 0, before=1)]
        return [TokenBlock(cut.side, cut.side, view="overview"), cut.block(size)]

    def tokens_of_config(self, config: Any) -> int:
        """Those of a photo of 640 x 480 pixels."""
        return overview_tokens(config) + _cut_of_config(config).tokens(TYPICAL)

    def vision_flops(self, config: Any, image_tokens: int) -> float:
        """All crops through the tower."""
        crops = _crops(config, image_tokens)
        return crops * tower_flops(config.vision_config, patches_of(config.vision_config), has_class_token(config))

    def projector_flops(self, config: Any, image_tokens: int) -> tuple[float, float]:
        """Two linear layers over the patches of all crops, those that only pad among them."""
        return mlp_flops(config, _crops(config, image_tokens) * overview_tokens(config))

    def vision_sizes(self, config: Any, image_tokens: int) -> VisionSizes:
        """All crops through tower and projector, and what the decoder gets of them."""
        one = super().vision_sizes(config, overview_tokens(config))
        return of_crops(one, _crops(config, image_tokens), image_tokens * config.text_config.hidden_size)


def _crops(config: Any, image_tokens: int) -> int:
    """Crops of an image that gives so many tokens; 1 for one of several."""
    if image_tokens <= overview_tokens(config) + 1:
        return 1
    return _cut_of_config(config).crops_for(image_tokens)


def _cut_of_config(config: Any) -> Anyres:
    return Anyres.of_config(config, _most(config))


def _cut(processor: Any) -> Anyres:
    parts, settings = processor.image_processor, processor.settings
    return Anyres(pinpoints_of(parts), tile_of(parts), settings["side"], settings["most"])


def _require_bounded_squares(sizes: Sequence[tuple[int, int]]) -> None:
    """Raises ValueError where an image of several is too long to be padded to a square."""
    for size in sizes:
        require_bounded(size, (max(size), max(size)), "padded to")


def _side(config: Any) -> int:
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def _most(config: Any) -> int:
    """The number in "anyres_max_9"."""
    return int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
