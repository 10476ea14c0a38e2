"""What several families share about pixels and towers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from himap_train.models.families.base import AspectRatio


def pad_to_square(image: Image.Image, image_mean: Sequence[float]) -> Image.Image:
    """The shorter side padded on both ends with the mean colour, as LLaVA-1.5 does ("expand2square")."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in image_mean))
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def fixed_pixels(image: Image.Image, image_processor: Any, aspect_ratio: AspectRatio) -> Tensor:
    """One image -> (1, 3, H, W), by the checkpoint's image processor.

    `"pad"` makes the image square first, so the processor's centre crop cuts nothing off; `"as_processor"` does not.
    """
    if aspect_ratio == "pad":
        image = pad_to_square(image, image_processor.image_mean)
    elif aspect_ratio != "as_processor":
        raise ValueError(f"image_aspect_ratio is {aspect_ratio!r}; expected 'as_processor' or 'pad'")
    pixels: Tensor = image_processor([image], return_tensors="pt")["pixel_values"]
    return pixels


def is_cropped(image_processor: Any) -> bool:
    """Whether every image comes out in one size, whatever it was."""
    return bool(getattr(image_processor, "do_center_crop", False))


def patches_of(vision: Any) -> int:
    """Patches of a square image of the tower's size."""
    return int(vision.image_size // vision.patch_size) ** 2


def tower_flops(vision: Any, patches: int, class_token: bool = True) -> float:
    """FLOPs of a CLIP-like tower over one image: patch embedding and all layers."""
    width, mlp, tokens = vision.hidden_size, vision.intermediate_size, patches + class_token
    layer = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * mlp
    return 2.0 * (patches * width * vision.num_channels * vision.patch_size**2 + vision.num_hidden_layers * layer)
