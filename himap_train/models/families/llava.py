"""LLaVA-1.5 and VipLLaVA: a vision tower (CLIP or SigLIP), an MLP as projector, one block of tokens an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaProcessor

from himap_train.models.families.base import AspectRatio, Family, Images
from himap_train.models.families.blocks import TokenBlock
from himap_train.models.families.pixels import (
    fixed_pixels,
    is_cropped,
    model_view,
    patch_grid,
    patches_of,
    require_fixed_bounded,
    tower_flops,
)
from himap_train.models.families.tower_reading import TOWERS, packed, read_crops, states_to_read
from himap_train.models.versions import asked_states, feature_layers
from himap_train.pruning.places import TokenGrid


class Llava(Family):
    """LLaVA-1.5 (arXiv 2310.03744) and VipLLaVA (arXiv 2312.00784)."""

    name: ClassVar[str] = "llava"
    model_types: ClassVar[tuple[str, ...]] = ("llava", "vipllava")
    processor_class: ClassVar[type[Any]] = LlavaProcessor
    projects_cached: ClassVar[bool] = True
    towers: ClassVar[tuple[str, ...]] = TOWERS
    takes_padding: ClassVar[bool] = True

    def joins_images(self, config: Any) -> bool:
        """VipLLaVA's does."""
        return bool(config.model_type == "vipllava")

    def read_tower(self, model: Any, images: Images, states: Any) -> Tensor:
        """Image by image."""
        return read_crops(model.config, self.vision(model), states, *class_token(model.config)).flatten(0, 1)

    def tower_features(self, model: Any, images: Images, readings: bool = False) -> Tensor:
        """What the projector takes, (images, T, W), in the dtype in which it computes."""
        # Copied from transformers 5.23 LlavaModel.get_image_features (VipLlavaModel's is the same with more layers),
        # whose decorator turns the config's layers into `output_hidden_states`; changes marked "HiMAP:".
        layers, strategy = feature_layers(model.config), select_strategy(model.config)
        asked = states_to_read(model.config) if readings else asked_states(layers)
        outputs = self.vision(model)(images["pixel_values"], return_dict=True, output_hidden_states=asked)
        chosen = [outputs.hidden_states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        if strategy == "default":
            chosen = [states[:, 1:] for states in chosen]
        features = torch.cat(chosen, dim=-1)
        # HiMAP: under autocast the tower's residual stream may be wider than the projector's first product, which
        # rounds it in any case.
        device = features.device.type
        features = features.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else features
        if not readings:
            return features
        read = self.read_tower(model, images, outputs.hidden_states)
        return packed(features, read.unflatten(0, features.shape[:2]))

    def project(self, model: Any, features: Tensor) -> Tensor:
        """Image features (..., D) of the decoder's width from those of the tower (..., W)."""
        projected: Tensor = model.model.multi_modal_projector(features.to(model.device))
        return projected

    def image_grids(self, config: Any, given: Mapping[str, Any]) -> list[TokenGrid] | None:
        """Square, behind the class token where the config takes it in."""
        patches = patches_of(config.vision_config)
        side = config.vision_config.image_size // config.vision_config.patch_size
        return [TokenGrid(side, side, before=max(overview_tokens(config) - patches, 0))]

    def load_processor(self, folder: str, config: Any) -> LlavaProcessor:
        """The stock one; facts about image tokens that old checkpoints leave out come from the model's config."""
        processor = LlavaProcessor.from_pretrained(folder)
        set_missing(processor, folder, config)
        return processor

    def encode_image(self, processor: Any, image: Image.Image, aspect_ratio: AspectRatio) -> dict[str, Tensor]:
        """`pixel_values` (1, 3, H, W)."""
        return {"pixel_values": fixed_pixels(image, processor.image_processor, aspect_ratio)}

    def image_tokens(self, processor: Any, image: Images) -> int:
        """As many as LlavaProcessor itself puts into a text."""
        text: str = processor.replace_image_token({"pixel_values": image["pixel_values"]}, 0)
        return text.count(processor.image_token)

    def tokens_of_size(self, processor: Any, size: tuple[int, int], aspect_ratio: AspectRatio) -> int:
        """Those of a blank image of this size, or of any size where the processor makes all alike."""
        require_fixed_bounded(size, processor.image_processor, aspect_ratio)
        if aspect_ratio == "pad" or is_cropped(processor.image_processor):
            size = (8, 8)
        return self.image_tokens(processor, self.encode_image(processor, Image.new("RGB", size), aspect_ratio))

    def token_blocks(self, processor: Any, image: Images, picture: Image.Image) -> list[TokenBlock]:
        """Square patches over what the model sees, behind a class token where it has one."""
        tokens, pixels = self.image_tokens(processor, image), image["pixel_values"]
        full = processor.vision_feature_select_strategy == "full"
        before = processor.num_additional_image_tokens if full else 0
        return [TokenBlock(*patch_grid(tokens - before, (pixels.shape[-1], pixels.shape[-2])), before=before)]

    def drawn_over(self, processor: Any, image: Images, picture: Image.Image) -> Image.Image:
        """The picture after resizing and cropping."""
        return model_view(image["pixel_values"][0], processor.image_processor)

    def tokens_of_config(self, config: Any) -> int:
        """Patches and the class token, without the first of them where the config leaves it out."""
        return overview_tokens(config)

    def typical_images(self, config: Any, count: int) -> dict[str, Tensor]:
        """Square pictures."""
        size = config.vision_config.image_size
        return {"pixel_values": torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))}

    def vision_flops(self, config: Any, image_tokens: int) -> float:
        """All layers over all patches."""
        return tower_flops(config.vision_config, patches_of(config.vision_config), has_class_token(config))

    def projector_flops(self, config: Any, image_tokens: int) -> tuple[float, float]:
        """Two linear layers over the patches of one image."""
        return mlp_flops(config, image_tokens)


def select_strategy(config: Any) -> str:
    """Whether the class token is left out ("default") or not ("full"); VipLLaVA always leaves it out."""
    return getattr(config, "vision_feature_select_strategy", "default")


def has_class_token(config: Any) -> bool:
    """Whether the tower has a class token."""
    return config.vision_config.model_type == "clip_vision_model"


def class_token(config: Any) -> tuple[bool, bool]:
    """Whether the tower has a class token, and whether its first token, which that would be, is left out."""
    return has_class_token(config), select_strategy(config) == "default"


def overview_tokens(config: Any) -> int:
    """Features of an image of the tower's size."""
    return patches_of(config.vision_config) + has_class_token(config) - (select_strategy(config) == "default")


def mlp_flops(config: Any, features: int) -> tuple[float, float]:
    """FLOPs of the projector's two linear layers over so many features."""
    layers, width = feature_layers(config), config.text_config.hidden_size
    joined = 1 if isinstance(layers, int) else len(layers)
    return 2.0 * features * joined * config.vision_config.hidden_size * width, 2.0 * features * width**2


def set_missing(processor: Any, folder: str, config: Any) -> None:
    """Give a stock processor what its files leave out about image tokens; 0 counts where it fits the model."""
    written, _ = type(processor).get_processor_dict(folder)
    defaults: dict[str, Any] = {
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": select_strategy(config),
        "num_additional_image_tokens": int(has_class_token(config)),
    }
    for name, value in defaults.items():
        if written.get(name) is None:
            setattr(processor, name, value)
    if not processor.num_additional_image_tokens:  # stock code also writes 0 where the number was never known
        dropped = int(processor.vision_feature_select_strategy == "default")
        processor.num_additional_image_tokens = overview_tokens(config) + dropped - patches_of(config.vision_config)
