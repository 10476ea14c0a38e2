"""What several families share about pixels and towers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from himap_train.models.families.base import AspectRatio

MAX_PIXELS = 2**27
"""Most pixels that a picture may have on its way to a tower: 400 MB. A strip of 100000 x 1 would take 30 GB as a square
and several where its short side is made as long as a tower's.
"""


def require_bounded(size: tuple[int, int], made: tuple[int, int], how: str) -> None:
    """Raises ValueError where a picture of `size` (width, height) would be `made` larger than MAX_PIXELS."""
    if made[0] * made[1] > MAX_PIXELS:
        raise ValueError(
            f"an image of {size[0]} x {size[1]} pixels would be {how} {made[0]} x {made[1]}, and {MAX_PIXELS} pixels "
            "are the limit; cut it, or scale it down"
        )


def pad_to_square(image: Image.Image, image_mean: Sequence[float]) -> Image.Image:
    """The shorter side padded on both ends with the mean colour, as LLaVA-1.5 does ("expand2square")."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    require_bounded(image.size, (side, side), "padded to")
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
    require_fixed_bounded(image.size, image_processor, "as_processor")
    pixels: Tensor = image_processor([image], return_tensors="pt")["pixel_values"]
    return pixels


def require_fixed_bounded(size: tuple[int, int], image_processor: Any, aspect_ratio: AspectRatio) -> None:
    """Raises ValueError where `fixed_pixels` would make too many pixels of an image of this (width, height)."""
    long, short = max(size), min(size)
    if aspect_ratio == "pad":
        require_bounded(size, (long, long), "padded to")
        return
    scaled = getattr(image_processor, "do_resize", True) and not image_processor.size.get("longest_edge")
    if scaled and (edge := image_processor.size.get("shortest_edge")):
        require_bounded(size, (size[0] * edge // short, size[1] * edge // short), "scaled to")


def is_cropped(image_processor: Any) -> bool:
    """Whether every image comes out in one size, whatever it was."""
    return bool(getattr(image_processor, "do_center_crop", False))


def model_view(pixel_values: Tensor, image_processor: Any) -> Image.Image:
    """The picture that the vision tower is given, after resizing and cropping.

    Args:
        pixel_values: (3, H, W), normalised.
        image_processor: The one that made them; its mean and deviation are undone.
    """
    mean, deviation = (torch.tensor(getattr(image_processor, name)) for name in ("image_mean", "image_std"))
    pixels = pixel_values.detach().float().cpu()
    if getattr(image_processor, "do_normalize", True):
        pixels = pixels * deviation[:, None, None] + mean[:, None, None]
    pixels = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy(), "RGB")


def patch_grid(image_tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of the patches of an image of `size` (width, height) pixels, given how many there are.

    Raises:
        ValueError: No grid of square patches has that many.
    """
    width, height = size
    rows = round(math.sqrt(image_tokens * height / width))
    if rows < 1 or image_tokens % rows or rows * width != image_tokens // rows * height:
        raise ValueError(
            f"{image_tokens} image tokens do not form a grid of square patches over {width}x{height} pixels"
        )
    return rows, image_tokens // rows


def patches_of(vision: Any) -> int:
    """Patches of a square image of the tower's size."""
    return int(vision.image_size // vision.patch_size) ** 2


def tower_flops(vision: Any, patches: int, class_token: bool = True) -> float:
    """FLOPs of a CLIP-like tower over one image: patch embedding and all layers."""
    width, mlp, tokens = vision.hidden_size, vision.intermediate_size, patches + class_token
    layer = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * mlp
    return 2.0 * (patches * width * vision.num_channels * patch_area(vision) + vision.num_hidden_layers * layer)


def patch_area(vision: Any) -> int:
    """Pixels of a patch; some configs give its height and width."""
    size = vision.patch_size
    return int(size**2 if isinstance(size, int) else size[0] * size[1])
