"""Pictures of what pruning keeps: the image, then one panel a stage with the dropped patches dark.

Or of any weight that each token has: the less, the darker.

Where the tokens of an image lie is its family's affair (`Family.token_blocks`): one grid over the picture, or an
overview and tiles, each drawn in a row of its own. Tokens that show no part of it (newlines, a class token) are counted
in the captions only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from himap_train.data.encode import Sample
from himap_train.models.families import family_of_processor
from himap_train.models.families.blocks import TokenBlock
from himap_train.pruning.schedule import PruningSchedule

PANEL, MARGIN, CAPTION = 336, 12, 30
_DROPPED_BRIGHTNESS = 0.28


def kept_pictures(
    processor: Any,
    sample: Sample,
    pictures: Sequence[Image.Image],
    kept: Sequence[torch.Tensor],
    schedule: PruningSchedule,
) -> list[Image.Image]:
    """For each image of a sample, the picture of what each stage kept of it.

    Args:
        processor: Of the model.
        sample: Encoded alone.
        pictures: Its images, in order.
        kept: For each stage the columns of the sample that stay, as `record_pruning` gives them.
        schedule: What ran.

    Raises:
        ValueError: Where the tokens of an image lie is not known.
    """
    family = family_of_processor(processor)
    counts = [family.image_tokens(processor, image) for image in sample["images"]]
    tokens = kept_tokens(kept, sample["input_ids"], processor.image_token_id, counts)
    drawn = []
    for image, picture, stages, count in zip(sample["images"], pictures, tokens, counts, strict=True):
        blocks, under = family.token_blocks(processor, image, picture), family.drawn_over(processor, image, picture)
        drawn.append(draw_kept(under, stages, blocks, captions(schedule, stages, count)))
    return drawn


def kept_tokens(
    kept: Sequence[torch.Tensor], input_ids: torch.Tensor, image_token_id: int, tokens_per_image: Sequence[int]
) -> list[list[list[int]]]:
    """From columns of a row, as `record_pruning` gives them, to tokens of its images.

    Args:
        kept: For each stage the ascending columns that stay, all token kinds.
        input_ids: (S,) the row as passed to the model.
        image_token_id: That of the model's config.
        tokens_per_image: Image tokens of each image of the row, in order.

    Returns:
        For each image and each stage the numbers of the image's tokens that stay.
    """
    columns = torch.nonzero(input_ids == image_token_id).flatten().tolist()
    if len(columns) != sum(tokens_per_image):
        raise ValueError(f"the row has {len(columns)} image tokens, expected {list(tokens_per_image)}")
    images, start = [], 0
    for count in tokens_per_image:
        place = {column: token for token, column in enumerate(columns[start : start + count])}
        images.append([[place[column] for column in stage.tolist() if column in place] for stage in kept])
        start += count
    return images


def captions(schedule: PruningSchedule, kept: Sequence[Sequence[int]], tokens: int) -> list[str]:
    """One line a stage, such as "stage 1: layer 2, 288 of 576"."""
    return [
        f"stage {number}: layer {stage.layer}, {len(stays)} of {tokens}"
        for number, (stage, stays) in enumerate(zip(schedule.stages, kept, strict=True), start=1)
    ]


def draw_kept(
    image: Image.Image, kept: Sequence[Collection[int]], blocks: Sequence[TokenBlock], texts: Sequence[str]
) -> Image.Image:
    """Rows of panels, one row for each view: the image, then one panel a stage, with what is dropped grey and dark.

    Args:
        image: What the blocks lie over.
        kept: For each stage the numbers of the image tokens that stay; or a mapping from them to how bright they are,
            0 to 1.
        blocks: Where the tokens lie, in their order.
        texts: A caption for each stage.

    Raises:
        ValueError: There is no such token, or captions and stages differ in number.
    """
    if len(texts) != len(kept):
        raise ValueError(f"{len(kept)} stages but {len(texts)} captions")
    tokens = sum(block.tokens for block in blocks)
    wrong = [token for stays in kept for token in stays if not 0 <= token < tokens]
    if wrong:
        raise ValueError(f"token {wrong[0]} lies outside the {tokens} tokens of the image")
    scale = PANEL / max(image.size)
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    large = image.resize(size, Image.Resampling.BICUBIC)
    views = list(dict.fromkeys(block.view for block in blocks if block.rows * block.columns))
    font = ImageFont.load_default(16)
    lines = [
        [
            _caption(view, blocks),
            *(text + _of_view(stays, blocks, view) for text, stays in zip(texts, kept, strict=True)),
        ]
        for view in views
    ]
    widest = max((round(font.getlength(text)) for line in lines for text in line), default=0)
    height, width = large.height + MARGIN + CAPTION, max(large.width, widest) + MARGIN
    canvas = Image.new("RGB", (MARGIN + (len(kept) + 1) * width, MARGIN + len(views) * height), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (view, line) in enumerate(zip(views, lines, strict=True)):
        panels = [large, *(_shade(large, stays, blocks, view) for stays in kept)]
        for number, (panel, text) in enumerate(zip(panels, line, strict=True)):
            left, top = MARGIN + number * width, MARGIN + row * height
            canvas.paste(panel, (left, top))
            draw.text((left, top + large.height + 8), text, fill="black", font=font)
    return canvas


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """One below the other."""
    canvas = Image.new("RGB", (max(one.width for one in pictures), sum(one.height for one in pictures)), "white")
    for number, picture in enumerate(pictures):
        canvas.paste(picture, (0, sum(one.height for one in pictures[:number])))
    return canvas


def _caption(view: str, blocks: Sequence[TokenBlock]) -> str:
    """Such as "tiles: 36x48 patches" or "tiles: 12 of 16x16 patches"."""
    grids = [f"{block.rows}x{block.columns}" for block in blocks if block.view == view and block.rows]
    return f"{view}: {f'{len(grids)} of ' if len(grids) > 1 else ''}{grids[0]} patches"


def _of_view(kept: Collection[int], blocks: Sequence[TokenBlock], view: str) -> str:
    """How many of the kept tokens are of this view, where there are others."""
    if len({block.view for block in blocks}) == 1:
        return ""
    start, count = 0, 0
    for block in blocks:
        if block.view == view:
            count += sum(start <= token < start + block.tokens for token in kept)
        start += block.tokens
    return f" ({count} here)"


def _shade(image: Image.Image, kept: Collection[int], blocks: Sequence[TokenBlock], view: str) -> Image.Image:
    """The image, dark where no kept token of a view lies."""
    bright = kept if isinstance(kept, Mapping) else dict.fromkeys(kept, 1.0)
    mask, start = Image.new("L", image.size, 0), 0
    for block in blocks:
        if block.view == view and block.rows * block.columns:
            grid = Image.new("L", (block.columns, block.rows), 0)
            for token in range(block.tokens):
                patch = block.patch(token)
                if patch is not None:
                    light = round(255 * bright.get(start + token, 0.0))
                    grid.putpixel((patch % block.columns, patch // block.columns), light)
            left, top, right, bottom = (
                round(edge * side) for edge, side in zip(block.box, (*image.size, *image.size), strict=True)
            )
            mask.paste(grid.resize((right - left, bottom - top), Image.Resampling.NEAREST), (left, top))
        start += block.tokens
    grey = image.convert("L").point(lambda value: value * _DROPPED_BRIGHTNESS).convert("RGB")
    return Image.composite(image, grey, mask)
