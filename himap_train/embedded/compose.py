"""Random scenes, coarse and fine: such as questions are asked about, and fuller ones that teach a tower more.

A fine scene has some fifteen things, each about one patch of a 16 x 16 grid. An even subset of the image tokens misses
most of them, so there it matters which are kept; on coarse scenes any even subset sees all.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from himap_train.embedded.scene_text import (
    COLOURS,
    DIGITS,
    FINE_GRID,
    FINE_KINDS,
    KINDS,
    SIDES,
    Cell,
    Item,
    Scene,
    pick,
)

_PLACES = Scene(()).places


def compose(rng: Generator) -> Scene:
    """A coarse scene: one kind several times or not at all, two or three kinds once, one to three unlike cards."""
    kinds = rng.permutation(KINDS).tolist()
    singles = 2 + int(rng.integers(2))
    copies = int(rng.choice([0, 2, 3, 4]))
    cards = min(1 + int(rng.integers(3)), len(_PLACES) - singles - copies)
    items = [Item(kind) for kind in kinds[:singles]] + [Item(kinds[singles])] * copies
    items += _cards(cards, rng)
    places = rng.permutation(len(_PLACES)).tolist()
    return Scene(tuple(sorted(zip((_PLACES[place] for place in places), items, strict=False), key=lambda one: one[0])))


def compose_fine(rng: Generator) -> Scene:
    """A fine scene: five kinds once, of these two pairs side by side; one kind several times or not at all; cards.

    Things that are no pair do not touch, so nothing but a pair's other half lies beside anything.
    """
    kinds = rng.permutation(FINE_KINDS).tolist()
    copies = int(rng.choice([0, 2, 3, 4]))
    cards = _cards(6, rng)[: 4 + int(rng.integers(3))]
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
    return Scene(tuple(things), FINE_GRID)


def _cards(count: int, rng: Generator) -> list[Item]:
    """So many cards, no two of a colour or digit."""
    colours, digits = rng.permutation(COLOURS).tolist(), rng.permutation(DIGITS).tolist()
    return [Item("card", colours[c], digits[c]) for c in range(count)]


def dense_scene(rng: Generator) -> Scene:
    """A fuller coarse scene than questions are asked about: one pass of a tower learns more, above all of digits."""
    things = []
    for place in _PLACES:
        if (draw := rng.random()) >= 0.2:
            kind = str(rng.choice(KINDS))
            is_card = draw >= 0.6
            item = Item("card", str(rng.choice(COLOURS)), str(rng.choice(DIGITS))) if is_card else Item(kind)
            things.append((place, item))
    return Scene(tuple(things))


def dense_fine(rng: Generator) -> Scene:
    """A fine scene with things at a tenth to nine tenths of all cells."""
    share, things = rng.uniform(0.1, 0.9), []
    for cell in np.ndindex(FINE_GRID, FINE_GRID):
        if rng.random() < share:
            is_card = rng.random() < 0.5
            item = Item("card", pick(rng, COLOURS), pick(rng, DIGITS)) if is_card else Item(pick(rng, KINDS))
            things.append(((cell[0], cell[1]), item))
    return Scene(tuple(things), FINE_GRID)
