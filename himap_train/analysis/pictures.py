"""Pictures of what pruning keeps: the image as the model sees it, then one panel a stage with the dropped patches dark.

Shapes: h x w patches of an image, numbered row by row from the top left, as image tokens stand in the sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from himap_train.pruning.schedule import PruningSchedule

PANEL, MARGIN, CAPTION = 336, 12, 30
_DROPPED_BRIGHTNESS = 0.28


def model_view(pixel_values: torch.Tensor, image_processor: Any) -> Image.Image:
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


def kept_patches(
    kept: Sequence[torch.Tensor], input_ids: torch.Tensor, image_token_id: int, tokens_per_image: Sequence[int]
) -> list[list[list[int]]]:
    """From columns of a row, as `record_pruning` gives them, to patches of its images.

    Args:
        kept: For each stage the ascending columns that stay, all token kinds.
        input_ids: (S,) the row as passed to the model.
        image_token_id: That of the model's config.
        tokens_per_image: Image tokens of each image of the row, in order.

    Returns:
        For each image and each stage the numbers of the patches that stay.
    """
    columns = torch.nonzero(input_ids == image_token_id).flatten().tolist()
    if len(columns) != sum(tokens_per_image):
        raise ValueError(f"the row has {len(columns)} image tokens, expected {list(tokens_per_image)}")
    images, start = [], 0
    for count in tokens_per_image:
        place = {column: patch for patch, column in enumerate(columns[start : start + count])}
        images.append([[place[column] for column in stage.tolist() if column in place] for stage in kept])
        start += count
    return images


def captions(schedule: PruningSchedule, kept: Sequence[Sequence[int]], patches: int) -> list[str]:
    """One line a stage, such as "stage 1: layer 2, 288 of 576"."""
    return [
        f"stage {number}: layer {stage.layer}, {len(stays)} of {patches}"
        for number, (stage, stays) in enumerate(zip(schedule.stages, kept, strict=True), start=1)
    ]


def draw_kept(
    image: Image.Image, kept: Sequence[Sequence[int]], grid: tuple[int, int], texts: Sequence[str]
) -> Image.Image:
    """A row of panels: the image, then one a stage, with dropped patches grey and dark and the kept ones clear.

    Args:
        image: As the model sees it (`model_view`).
        kept: For each stage the numbers of the patches that stay.
        grid: (h, w) patches.
        texts: A caption for each stage.

    Raises:
        ValueError: A patch lies outside the grid, or captions and stages differ in number.
    """
    if len(texts) != len(kept):
        raise ValueError(f"{len(kept)} stages but {len(texts)} captions")
    scale = PANEL / max(image.size)
    large = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    panels = [large, *(_shade(large, stays, grid) for stays in kept)]
    width = len(panels) * (large.width + MARGIN) + MARGIN
    canvas = Image.new("RGB", (width, large.height + 2 * MARGIN + CAPTION), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    for number, (panel, text) in enumerate(
        zip(panels, [f"the model's view, {grid[0]}x{grid[1]} patches", *texts], strict=True)
    ):
        left = MARGIN + number * (large.width + MARGIN)
        canvas.paste(panel, (left, MARGIN))
        draw.text((left, large.height + MARGIN + 8), text, fill="black", font=font)
    return canvas


def _shade(image: Image.Image, kept: Sequence[int], grid: tuple[int, int]) -> Image.Image:
    rows, columns = grid
    mask = Image.new("L", (columns, rows), 0)
    for patch in kept:
        if not 0 <= patch < rows * columns:
            raise ValueError(f"patch {patch} lies outside the {rows}x{columns} patches of the image")
        mask.putpixel((patch % columns, patch // columns), 255)
    grey = image.convert("L").point(lambda value: value * _DROPPED_BRIGHTNESS).convert("RGB")
    return Image.composite(image, grey, mask.resize(image.size, Image.Resampling.NEAREST))
