"""Pictures of composed scenes of real images: the data set that ships with the package.

A coarse scene is 96x96 pixels: on a crop of a photograph, nine places (three by three) that hold an emoji, a coloured
card with a handwritten digit, or nothing. A fine one is 256x256, with a grid of 16 x 16 places of 16 pixels. Scenes are
drawn when they are asked for, about a millisecond each, so a set can be as long as one likes (`scene_source.py`).
Decoys, striped tiles that no question asks about, crowd a fine scene: then it is not enough to keep what differs from
the rest. Train, validation and test never share an emoji, a handwritten digit or a photograph: `assets/scenes/NOTICE`
has the sources. Training images are also varied (mirrored, turned, recoloured).
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from himap_train.embedded.scene_text import COLOURS, FINE_GRID, Item, Scene

ASSETS = Path(__file__).parents[1] / "assets/scenes"
SPLITS = ("train", "validation", "test")
IMAGE_SIZE, CELL, SPRITE = 96, 32, 32
FINE_CELL = 16
FINE_SIZE = FINE_GRID * FINE_CELL
_SIZES = (24, 30)  # of a sprite or card inside its cell
_FINE_SPRITES, _FINE_CARDS = (14, 16), (12, 12)
_DECOY = 12
_MARGIN = 2  # of a card around its digit; leaves a digit its own 8 pixels on a fine card
_KEPT = 512
"""Drawn sprites and digits that wait to be used again; thousands of them made a long run look as if it leaked."""
_CARD_RGB = dict(
    zip(
        COLOURS,
        ((205, 40, 45), (240, 135, 30), (235, 210, 50), (50, 150, 65), (50, 95, 200), (135, 65, 165)),
        strict=True,
    )
)
FloatArray = np.ndarray


def draw(scene: Scene, split: str, rng: Generator, decoys: int = 0) -> Image.Image:
    """The picture of a scene, RGB, 96x96 or for a fine one 256x256, from this split's source images.

    `decoys` tiles more lie at places of a fine scene where nothing else does.
    """
    cell_size = FINE_CELL if scene.fine else CELL
    canvas = background(split, rng, scene.grid * cell_size)
    for cell, item in scene.things:
        if item.kind == "card":
            rgb, alpha = card(item, split, rng, _FINE_CARDS if scene.fine else _SIZES)
        else:
            rgb, alpha = sprite(item, split, rng, _FINE_SPRITES if scene.fine else _SIZES)
        size = len(alpha)
        top, left = (index * cell_size + int(rng.integers(cell_size - size + 1)) for index in cell)
        window = canvas[top : top + size, left : left + size]
        window += alpha * (rgb - window)
    taken = dict(scene.things)
    free = [cell for cell in scene.places if cell not in taken]
    for number in rng.permutation(len(free))[:decoys] if decoys else ():
        top, left = (index * FINE_CELL + 2 for index in free[number])
        canvas[top : top + _DECOY, left : left + _DECOY] = _stripes(rng)
    canvas += rng.integers(-8, 9, canvas.shape, dtype=np.int8)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def _stripes(rng: Generator) -> FloatArray:
    """A tile of stripes of two colours, upright, level or slanting, (12, 12, 3)."""
    y, x = np.mgrid[:_DECOY, :_DECOY]
    along = (y, x, x + y)[int(rng.integers(3))] // int(rng.integers(2, 5))
    return rng.integers(256, size=(2, 3))[along % 2]


def background(split: str, rng: Generator, size: int) -> FloatArray:
    """A photograph's crop, mirrored at random and mixed into a random colour: (size, size, 3)."""
    crops = _backgrounds(split, size)
    crop = crops[int(rng.integers(len(crops)))][:: _sign(rng), :: _sign(rng)]
    colour, strength = rng.uniform(60, 220, 3), rng.uniform(0.15, 0.45)
    return np.asarray(strength * crop + (1 - strength) * colour, dtype=np.float32)


def sprite(item: Item, split: str, rng: Generator, sizes: tuple[int, int]) -> tuple[FloatArray, FloatArray]:
    """Colour (s, s, 3) and opacity (s, s, 1) of one of this split's images of the item's kind, s one of `sizes`."""
    sprites = _sprites(split)[item.kind]
    which, size = int(rng.integers(len(sprites))), int(rng.integers(sizes[0], sizes[1] + 1))
    vary = split == "train"
    mirror, turn = (bool(rng.integers(2)), int(rng.integers(-2, 3)) * 6) if vary else (False, 0)
    pixels = _scaled(split, item.kind, which, size, mirror, turn)
    rgb = pixels[..., :3].astype(np.float32)
    if vary and rng.random() < 0.5:  # a kind is a shape: a green heart must be a heart though no green one was seen
        rgb = rgb[..., rng.permutation(3)] if rng.random() < 0.8 else rgb.mean(-1, keepdims=True)
    gain = rng.uniform(0.65, 1.2, 3) if vary else rng.uniform(0.85, 1.1, 3)
    return (rgb * gain.astype(np.float32)).clip(0, 255), pixels[..., 3:] / np.float32(255)


def card(item: Item, split: str, rng: Generator, sizes: tuple[int, int]) -> tuple[FloatArray, FloatArray]:
    """A square of the card's colour with a handwritten digit in white or black."""
    samples = _digits(split)[int(item.digit)]
    size = int(rng.integers(sizes[0], sizes[1] + 1))
    turn = int(rng.integers(-1, 2)) * 8 if split == "train" else 0
    ink = _ink(split, int(item.digit), int(rng.integers(len(samples))), size, turn)
    colour = np.asarray(_CARD_RGB[item.colour], np.float32) + rng.uniform(-15, 15, 3).astype(np.float32)
    pen = np.float32(250 if item.colour not in ("yellow", "orange") else 10)
    return colour + ink * (pen - colour), np.ones((size, size, 1), np.float32)


def _sign(rng: Generator) -> int:
    return 1 if rng.integers(2) else -1


@lru_cache(maxsize=_KEPT)
def _scaled(split: str, kind: str, which: int, size: int, mirror: bool, turn: int) -> FloatArray:
    sprite = _sprites(split)[kind][which]
    if turn:
        sprite = sprite.rotate(turn, Image.Resampling.BICUBIC)
    if mirror:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(sprite.resize((size, size), Image.Resampling.BILINEAR))


@lru_cache(maxsize=_KEPT)
def _ink(split: str, digit: int, which: int, size: int, turn: int) -> FloatArray:
    """Opacity of the pen, (size, size, 1): the 8x8 sample scaled to the card less a margin."""
    sample = Image.fromarray((_digits(split)[digit][which] * 15.9).astype(np.uint8))
    inner = size - 2 * _MARGIN
    drawn = sample.resize((inner, inner), Image.Resampling.BICUBIC)
    ink = np.zeros((size, size, 1), np.float32)
    inside = slice(_MARGIN, _MARGIN + inner)
    ink[inside, inside, 0] = np.asarray(drawn.rotate(turn, Image.Resampling.BILINEAR)) / 255
    return ink


@lru_cache(maxsize=len(SPLITS))
def _sprites(split: str) -> dict[str, list[Image.Image]]:
    sheet = Image.open(ASSETS / "sprites.png").convert("RGBA")
    columns = sheet.width // SPRITE
    sprites: dict[str, list[Image.Image]] = {}
    for index, row in enumerate(json.loads((ASSETS / "sprites.json").read_text())):
        if row["split"] == split:
            left, top = index % columns * SPRITE, index // columns * SPRITE
            sprites.setdefault(row["kind"], []).append(sheet.crop((left, top, left + SPRITE, top + SPRITE)))
    return sprites


@lru_cache(maxsize=len(SPLITS))
def _digits(split: str) -> list[FloatArray]:
    """For each digit its samples, (n, 8, 8) with values 0 to 16."""
    with np.load(ASSETS / "digits.npz") as data:
        images, labels = data[f"{split}_images"], data[f"{split}_labels"]
    return [images[labels == digit] for digit in range(10)]


@lru_cache(maxsize=2 * len(SPLITS))
def _backgrounds(split: str, size: int) -> FloatArray:
    """(n, size, size, 3) crops of this split's photographs."""
    sheet = np.asarray(Image.open(ASSETS / "backgrounds.jpg"))
    rows = json.loads((ASSETS / "backgrounds.json").read_text())
    crops = [sheet[:, i * IMAGE_SIZE : (i + 1) * IMAGE_SIZE] for i, row in enumerate(rows) if row["split"] == split]
    if size != IMAGE_SIZE:
        crops = [np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.BICUBIC)) for crop in crops]
    return np.stack(crops).astype(np.float32)
