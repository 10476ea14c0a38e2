"""Fine scenes: many small things, each about one patch of a 16 x 16 grid, and questions that one of them answers.

A scene is 256x256 pixels: on a crop of a photograph, some fifteen things at places of a 16 x 16 grid, each 12 to 16
pixels wide: emoji, and coloured cards with an 8x8 handwritten digit at its own size. An even subset of the image tokens
misses most of them, so here it matters which are kept; on the coarse scenes (`scenes.py`) any even subset sees all.
Splits share no source image, as there. Decoys, striped tiles that no question asks about, crowd a scene: then it is not
enough to keep what differs from the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

from himap_train.embedded.scene_text import COLOURS, DIGITS, KINDS, PLACES, PLURALS, SIDES, Item, article, pick
from himap_train.embedded.scenes import background, card, sprite

FINE_SIZE, FINE_GRID = 256, 16
FINE_CELL = FINE_SIZE // FINE_GRID
FINE_KINDS = ("face", "monkey", "heart", "moon", "book", "cloud", "clock", "arrow", "mailbox")  # known at 16 pixels
FINE_TYPES = ("where", "exist", "count", "colour", "digit", "next_to")
_SPRITE_SIZES, _CARD_SIZES = (14, 16), (12, 12)  # a margin of 2 leaves a digit its own 8 pixels
_DECOY = 12
Cell = tuple[int, int]  # row, column


@dataclass(frozen=True)
class FineScene:
    """What lies where on the grid: (row, column) and the thing."""

    things: tuple[tuple[Cell, Item], ...]

    def cells(self, **wanted: str) -> list[Cell]:
        """Cells of the things that have all of the wanted attributes."""
        return [c for c, item in self.things if all(getattr(item, name) == value for name, value in wanted.items())]

    def cards(self) -> list[Item]:
        """Its cards; no two share a colour or a digit."""
        return [item for _, item in self.things if item.kind == "card"]

    def single_kinds(self) -> list[str]:
        """Kinds of which there is exactly one, in the order of `FINE_KINDS`."""
        return [kind for kind in FINE_KINDS if len(self.cells(kind=kind)) == 1]

    def beside(self) -> Iterator[tuple[str, str, str]]:
        """(kind, side, kind of what lies there) for every thing whose kind is single, where something lies."""
        at = dict(self.things)
        for kind in self.single_kinds():
            row, column = self.cells(kind=kind)[0]
            for side, (down, right) in SIDES.items():
                if (row + down, column + right) in at:
                    yield kind, side, at[row + down, column + right].kind


def place_of(cell: Cell) -> str:
    """Which of the nine places of the picture a cell's centre lies in: "top left" and so on."""
    row, column = (third(index) for index in cell)
    return PLACES[3 * row + column]


def third(index: int) -> int:
    """Which third of the picture the centre of grid row or column `index` lies in: 0, 1 or 2."""
    return 3 * (2 * index + 1) // (2 * FINE_GRID)


def dense_fine(rng: Generator) -> FineScene:
    """A scene with things at a tenth to nine tenths of all cells: one pass of the tower learns more from it."""
    share, things = rng.uniform(0.1, 0.9), []
    for cell in np.ndindex(FINE_GRID, FINE_GRID):
        if rng.random() < share:
            is_card = rng.random() < 0.5
            item = Item("card", pick(rng, COLOURS), pick(rng, DIGITS)) if is_card else Item(pick(rng, KINDS))
            things.append(((cell[0], cell[1]), item))
    return FineScene(tuple(things))


def compose_fine(rng: Generator) -> FineScene:
    """A random scene: five kinds once, of these two pairs side by side; one kind several times or not at all; cards.

    Things that are no pair do not touch, so nothing but a pair's other half lies beside anything.
    """
    kinds = rng.permutation(FINE_KINDS).tolist()
    copies = int(rng.choice([0, 2, 3, 4]))
    colours, digits = rng.permutation(COLOURS).tolist(), rng.permutation(DIGITS).tolist()
    cards = [Item("card", colours[c], digits[c]) for c in range(4 + int(rng.integers(3)))]
    groups = [[Item(k) for k in kinds[:2]], [Item(k) for k in kinds[2:4]]]
    groups += [[item] for item in (Item(kinds[4]), *[Item(kinds[5])] * copies, *cards)]
    things: list[tuple[Cell, Item]] = []
    free = np.ones((FINE_GRID, FINE_GRID), bool)
    for group in groups:
        while True:  # a scene fills a small part of the grid, so a free place is found soon
            row, column = (int(n) for n in rng.integers(FINE_GRID, size=2))
            down, right = pick(rng, list(SIDES.values()))
            cells = [(row + n * down, column + n * right) for n in range(len(group))]
            if all(0 <= r < FINE_GRID and 0 <= c < FINE_GRID and free[r, c] for r, c in cells):
                break
        things += zip(cells, group, strict=True)
        for r, c in cells:
            free[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2] = False
    return FineScene(tuple(things))


def draw_fine(scene: FineScene, split: str, rng: Generator, decoys: int = 0) -> Image.Image:
    """The picture of a scene, RGB, 256x256, from this split's source images, with so many decoys where nothing lies."""
    canvas = background(split, rng, FINE_SIZE)
    for cell, item in scene.things:
        rgb, alpha = (
            card(item, split, rng, _CARD_SIZES, margin=2)
            if item.kind == "card"
            else sprite(item, split, rng, _SPRITE_SIZES)
        )
        size = len(alpha)
        top, left = (index * FINE_CELL + int(rng.integers(FINE_CELL - size + 1)) for index in cell)
        window = canvas[top : top + size, left : left + size]
        window += alpha * (rgb - window)
    taken = dict(scene.things)
    free = [cell for cell in np.ndindex(FINE_GRID, FINE_GRID) if cell not in taken]
    for number in rng.permutation(len(free))[:decoys] if decoys else ():
        top, left = (index * FINE_CELL + 2 for index in free[number])
        canvas[top : top + _DECOY, left : left + _DECOY] = _stripes(rng)
    canvas += rng.integers(-8, 9, canvas.shape, dtype=np.int8)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def _stripes(rng: Generator) -> np.ndarray[Any, Any]:
    """A tile of stripes of two colours, upright, level or slanting, (12, 12, 3)."""
    y, x = np.mgrid[:_DECOY, :_DECOY]
    along = (y, x, x + y)[int(rng.integers(3))] // int(rng.integers(2, 5))
    return rng.integers(256, size=(2, 3))[along % 2]


def ask_fine(scene: FineScene, kind_of_question: str, rng: Generator) -> tuple[str, str, list[Cell]]:
    """One question of the named type with its answer, and the cells of what it is about: who sees these can answer.

    Raises:
        ValueError: for a type that is not in `FINE_TYPES`.
    """
    if kind_of_question not in _ASK:
        raise ValueError(f"unknown question type {kind_of_question!r}; there are {', '.join(FINE_TYPES)}")
    return _ASK[kind_of_question](scene, rng)


def _ask_where(scene: FineScene, rng: Generator) -> tuple[str, str, list[Cell]]:
    if rng.random() < 0.5:
        item = pick(rng, scene.cards())
        name, cells = f"{item.colour} card", scene.cells(colour=item.colour)
    else:
        name = pick(rng, scene.single_kinds())
        cells = scene.cells(kind=name)
    return f"Where is the {name}?", place_of(cells[0]), cells


def _ask_exist(scene: FineScene, rng: Generator) -> tuple[str, str, list[Cell]]:
    yes = bool(rng.integers(2))
    options = [[("kind", kind) for kind in FINE_KINDS], [("colour", colour) for colour in COLOURS]]
    fitting = [[o for o in group if bool(scene.cells(**dict([o]))) == yes] for group in options]
    what, name = pick(rng, pick(rng, [group for group in fitting if group]))
    words = f"{name} card" if what == "colour" else name
    return f"Is there {article(words)} {words}?", "yes" if yes else "no", scene.cells(**{what: name})


def _ask_count(scene: FineScene, rng: Generator) -> tuple[str, str, list[Cell]]:
    counts = {kind: len(scene.cells(kind=kind)) for kind in FINE_KINDS}
    wanted = max(counts.values()) if rng.random() < 0.6 else int(rng.integers(2))
    kind = pick(rng, [k for k, n in counts.items() if n == wanted])
    return f"How many {PLURALS[kind]} are there?", str(wanted), scene.cells(kind=kind)


def _ask_colour(scene: FineScene, rng: Generator) -> tuple[str, str, list[Cell]]:
    item = pick(rng, scene.cards())
    return f"What colour is the card with the {item.digit}?", item.colour, scene.cells(digit=item.digit)


def _ask_digit(scene: FineScene, rng: Generator) -> tuple[str, str, list[Cell]]:
    item = pick(rng, scene.cards())
    return f"Which digit is on the {item.colour} card?", item.digit, scene.cells(colour=item.colour)


def _ask_next_to(scene: FineScene, rng: Generator) -> tuple[str, str, list[Cell]]:
    kind, side, answer = pick(rng, list(scene.beside()))
    return f"What is {side} the {kind}?", answer, scene.cells(kind=kind) + scene.cells(kind=answer)


_ASK = {
    "where": _ask_where,
    "exist": _ask_exist,
    "count": _ask_count,
    "colour": _ask_colour,
    "digit": _ask_digit,
    "next_to": _ask_next_to,
}
