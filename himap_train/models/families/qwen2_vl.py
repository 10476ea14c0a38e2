"""Qwen2-VL and Qwen2.5-VL: images of any size, 2x2 patches a token, position numbers with three axes (M-RoPE)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from himap_train.models.families.base import AspectRatio, Family, Images
from himap_train.models.families.blocks import TokenBlock
from himap_train.models.families.positions import Positions
from himap_train.models.families.processing import PartsProcessor, load_tokenizer
from himap_train.models.families.sizes import VisionSizes
from himap_train.pruning.places import TokenGrid

TYPICAL = (640, 480)
"""Width and height of most photographs of COCO, which most instruction data is about."""


class Qwen2VL(Family):
    """Qwen2-VL (arXiv 2409.12191) and Qwen2.5-VL (arXiv 2502.13923)."""

    name: ClassVar[str] = "qwen2_vl"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen2_5_vl")
    decoder_types: ClassVar[tuple[str, ...]] = ("qwen2_vl_text", "qwen2_5_vl_text")
    vision_name: ClassVar[str] = "model.visual"
    projector_names: ClassVar[tuple[str, ...]] = ("model.visual.merger",)
    processor_class: ClassVar[type[Any]] = PartsProcessor
    resizes_images: ClassVar[bool] = True
    renumbers: ClassVar[bool] = False
    weight_renames: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^visual\.", "model.visual."),
        (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
    )
    """From the names in files to those of the module tree."""

    def empty_images(self, model: Any) -> dict[str, Tensor]:
        """One token's worth of black patches."""
        vision, side = model.config.vision_config, model.config.vision_config.spatial_merge_size
        blank = torch.zeros(side**2, patch_values(vision), device=model.device, dtype=self.vision(model).dtype)
        return {"pixel_values": blank, "image_grid_thw": torch.tensor([[1, side, side]], device=model.device)}

    def forward_inputs(self, config: Any, input_ids: Tensor, images: Images) -> dict[str, Tensor]:
        """Which tokens are of an image: M-RoPE is counted by it."""
        return {"mm_token_type_ids": (input_ids == self.image_token_id(config)).int()} if images else {}

    def positions(self, position_ids: Tensor | None, embeds: Tensor, cached: int) -> Positions:
        """As the stock decoder reads them: (B, S) for all axes, (1 or 3, B, S), or (4, B, S) with the text's first.

        Behind a cache the stock model may number all tokens; the last ones are those of `embeds`.
        """
        batch, length = embeds.shape[:2]
        if position_ids is None:
            return self._uncounted((torch.arange(length, device=embeds.device) + cached).expand(batch, -1))
        position_ids = position_ids[..., -length:]
        if position_ids.ndim == 2:
            return self._uncounted(position_ids)
        return Positions(position_ids[-3:], position_ids[0] if len(position_ids) == 4 else None)

    def _uncounted(self, numbers: Tensor) -> Positions:
        """Positions of tokens with one number each, (B, S)."""
        return Positions(numbers.expand(3, -1, -1), None)

    def image_grids(self, config: Any, given: Mapping[str, Any]) -> list[TokenGrid] | None:
        """One a picture."""
        grids, side = given.get("image_grid_thw"), config.vision_config.spatial_merge_size
        return None if grids is None else [TokenGrid(h // side, w // side) for _, h, w in grids.tolist()]

    def load_processor(self, folder: str, config: Any) -> PartsProcessor:
        """Tokenizer and image processor; the stock processor needs torchvision for videos."""
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        return PartsProcessor(self.name, folder, load_tokenizer(folder), image_processor, "<|image_pad|>")

    def encode_image(self, processor: Any, image: Image.Image, aspect_ratio: AspectRatio) -> dict[str, Tensor]:
        """`pixel_values` (patches, values of a patch) and `image_grid_thw` (1, 3)."""
        encoded = processor.image_processor([image], return_tensors="pt")
        return {name: encoded[name] for name in ("pixel_values", "image_grid_thw")}

    def image_tokens(self, processor: Any, image: Images) -> int:
        """As Qwen2VLProcessor: its patches by those that are merged into a token."""
        return int(image["image_grid_thw"].prod()) // int(processor.image_processor.merge_size) ** 2

    def tokens_of_size(self, processor: Any, size: tuple[int, int], aspect_ratio: AspectRatio) -> int:
        """By the image processor's own rule for sizes."""
        images, (width, height) = processor.image_processor, size
        return int(images.get_number_of_image_patches(height, width)) // int(images.merge_size) ** 2

    def limit_image_tokens(self, processor: Any, most: int) -> None:
        """By the most pixels of an image, which is what Qwen's own recipes set (`max_pixels`)."""
        images = processor.image_processor
        pixels, size = most * (images.patch_size * images.merge_size) ** 2, images.size
        limits = {edge: min(int(size[edge]), pixels) for edge in ("shortest_edge", "longest_edge")}
        images.size = type(size)(**limits)

    def token_blocks(self, processor: Any, image: Images, picture: Image.Image) -> list[TokenBlock]:
        """One grid over the whole picture."""
        _, rows, columns = (image["image_grid_thw"][0] // processor.image_processor.merge_size).tolist()
        return [TokenBlock(rows, columns)]

    def tokens_of_config(self, config: Any) -> int:
        """Those of a photograph of 640x480, which lies within the published limits of size."""
        side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
        return round(TYPICAL[0] / side) * round(TYPICAL[1] / side)

    def typical_images(self, config: Any, count: int) -> dict[str, Tensor]:
        """Photographs of 640x480."""
        merged = config.vision_config.spatial_merge_size
        across, down = (merged * round(length / config.vision_config.patch_size / merged) for length in TYPICAL)
        shape, noise = (count * across * down, patch_values(config.vision_config)), torch.Generator().manual_seed(0)
        grid = torch.tensor([[1, down, across]])
        return {"pixel_values": torch.randn(shape, generator=noise), "image_grid_thw": grid.expand(count, -1)}

    def vision_flops(self, config: Any, image_tokens: int) -> float:
        """All patches through all layers; in Qwen2.5-VL most layers attend within windows."""
        vision = config.vision_config
        patches = image_tokens * vision.spatial_merge_size**2
        seen = [patches] * vision.depth
        if hasattr(vision, "window_size"):
            window = min((vision.window_size // vision.patch_size) ** 2, patches)
            seen = [patches if layer in vision.fullatt_block_indexes else window for layer in range(vision.depth)]
        width, mlp = tower_widths(vision)
        linear = vision.depth * patches * (4 * width**2 + width * mlp)
        attention = sum(2 * patches * keys * width for keys in seen)
        return 2.0 * (patches * patch_values(vision) * width + linear + attention)

    def projector_flops(self, config: Any, image_tokens: int) -> tuple[float, float]:
        """Two linear layers over the merged patches. Both need gradients of their inputs: a norm before is trained."""
        return 0.0, 2.0 * image_tokens * merger_weights(config)

    def vision_sizes(self, config: Any, image_tokens: int) -> VisionSizes:
        """No layer's states are kept; the peak is in attention, whose queries and keys are turned in fp32."""
        vision, out = config.vision_config, config.text_config.hidden_size
        (width, mlp), patches = tower_widths(vision), image_tokens * vision.spatial_merge_size**2
        mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
        return VisionSizes(
            pixels=patches * patch_values(vision),
            tower=patches * (3 * width + max(mlp, 12 * width)),
            kept=mergers * 4 * patches * width,  # both sides of the norm and of the activation
            features=patches * width + 2 * mergers * image_tokens * out,
            copied=merger_weights(config),
        )


def patch_values(vision: Any) -> int:
    """Numbers in a patch, whose temporal side an image fills with copies of itself."""
    return int(vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)


def tower_widths(vision: Any) -> tuple[int, int]:
    """Width of the tower, and of its MLP times the products in it."""
    if vision.model_type == "qwen2_vl_vision":
        return vision.embed_dim, 2 * int(vision.embed_dim * vision.mlp_ratio)
    products = 3 if vision.model_type == "qwen2_5_vl_vision" else 2
    return vision.hidden_size, products * vision.intermediate_size


def merger_weights(config: Any) -> int:
    """Weights of the merger's linear layers, those for DeepStack included."""
    vision = config.vision_config
    merged = tower_widths(vision)[0] * vision.spatial_merge_size**2
    mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
    return int(mergers * merged * (merged + config.text_config.hidden_size))
