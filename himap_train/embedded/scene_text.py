"""What a scene holds and what is asked about it: things on a grid, each an object or a coloured card with a digit.

Coarse scenes have nine places, three by three. Fine ones have 16 x 16, of which few are filled; their places are told
in ninths of the picture. A scene is pure data here; `compose.py` makes it up, `scenes.py` draws it. `ask` makes one
question with its answer, balanced so that always giving the most frequent answer of a type is right in half of its
questions (yes/no) or far less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from numpy.random import Generator

T = TypeVar("T")
Cell = tuple[int, int]  # row, column
KINDS = ("face", "cat", "monkey", "heart", "sign", "car", "moon", "book", "cloud", "clock", "arrow", "mailbox")
FINE_KINDS = tuple(kind for kind in KINDS if kind not in ("cat", "sign", "car"))  # known at 16 pixels
PLURALS = {kind: kind + "s" for kind in KINDS} | {"mailbox": "mailboxes", "card": "cards"}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
DIGITS = tuple("0123456789")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
TYPES = ("place", "where", "exist", "count", "colour", "digit", "next_to")
FINE_TYPES = TYPES[1:]
COARSE_GRID, FINE_GRID = 3, 16
DESCRIBE = "Describe the image."
# Every word of the questions and answers; the embedded tokenizer has one token for each.
WORDS = tuple(
    dict.fromkeys(
        " ".join(
            [
                *KINDS,
                *PLURALS.values(),
                *COLOURS,
                *DIGITS,
                *ROWS,
                *COLUMNS,
                *SIDES,
                "card nothing yes no a an is are at on with the of there",
            ]
            + ["What Where Is Are How Which Describe many image colour digit"]
        ).split()
    )
)


@dataclass(frozen=True)
class Item:
    """What lies at a place: an object (`colour`, `digit` empty) or, with kind "card", a coloured card with a digit."""

    kind: str
    colour: str = ""
    digit: str = ""


@dataclass(frozen=True)
class Scene:
    """What lies where, on a grid of `grid` x `grid` places."""

    things: tuple[tuple[Cell, Item], ...]
    grid: int = COARSE_GRID

    @property
    def fine(self) -> bool:
        """Whether it is one of the fine scenes."""
        return self.grid == FINE_GRID

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds that such a scene may hold, beside cards."""
        return FINE_KINDS if self.fine else KINDS

    @property
    def places(self) -> list[Cell]:
        """All cells of the grid in reading order."""
        return [(row, column) for row in range(self.grid) for column in range(self.grid)]

    def kind_at(self, cell: Cell) -> str:
        """Kind of what is there, "nothing" where the place is empty."""
        return dict(self.things).get(cell, Item("nothing")).kind

    def cells(self, **wanted: str) -> list[Cell]:
        """Cells of the things that have all of the wanted attributes."""
        return [c for c, item in self.things if all(getattr(item, name) == value for name, value in wanted.items())]

    def cards(self) -> list[Item]:
        """Its cards; no two share a colour or a digit."""
        return [item for _, item in self.things if item.kind == "card"]

    def single_kinds(self) -> list[str]:
        """Kinds of which there is exactly one, in the order of `KINDS`."""
        return [kind for kind in self.kinds if len(self.cells(kind=kind)) == 1]

    def beside(self) -> list[tuple[str, str, str]]:
        """(kind, side, kind of what lies there) for every kind that is single, as far as the picture reaches."""
        found = []
        for kind in self.single_kinds():
            row, column = self.cells(kind=kind)[0]
            for side, (down, right) in SIDES.items():
                if 0 <= row + down < self.grid and 0 <= column + right < self.grid:
                    found.append((kind, side, self.kind_at((row + down, column + right))))
        return found

    def place_of(self, cell: Cell) -> str:
        """Which of the nine places of the picture a cell's centre lies in: "top left" and so on."""
        row, column = (third(index, self.grid) for index in cell)
        return PLACES[3 * row + column]


def third(index: int, grid: int) -> int:
    """Which third of the picture the centre of row or column `index` of a grid lies in: 0, 1 or 2."""
    return 3 * (2 * index + 1) // (2 * grid)


def ask(scene: Scene, kind_of_question: str, rng: Generator) -> tuple[str, str, list[Cell]]:
    """One question of the named type with its answer, and the cells of what it is about: who sees these can answer.

    Raises:
        ValueError: for a type that is not asked about such a scene (`TYPES`, `FINE_TYPES`).
    """
    types = FINE_TYPES if scene.fine else TYPES
    if kind_of_question not in types:
        raise ValueError(f"unknown question type {kind_of_question!r}; there are {', '.join(types)}")
    return _ASK[kind_of_question](scene, rng)


def pick(rng: Generator, options: Sequence[T]) -> T:
    """One of `options`, each as likely as another."""
    return options[int(rng.integers(len(options)))]


def _ask_place(scene: Scene, rng: Generator) -> tuple[str, str, list[Cell]]:
    at = {cell: scene.kind_at(cell) for cell in scene.places}
    answer = pick(rng, sorted({*at.values()}))  # over what is there: "nothing" and repeated kinds are no safe guess
    cell = pick(rng, [cell for cell, kind in at.items() if kind == answer])
    return f"What is at the {scene.place_of(cell)}?", answer, [cell]


def _ask_where(scene: Scene, rng: Generator) -> tuple[str, str, list[Cell]]:
    if rng.random() < (0.5 if scene.fine else 0.3):
        item = pick(rng, scene.cards())
        name, cells = f"{item.colour} card", scene.cells(colour=item.colour)
    else:
        name = pick(rng, scene.single_kinds())
        cells = scene.cells(kind=name)
    return f"Where is the {name}?", scene.place_of(cells[0]), cells


def _ask_exist(scene: Scene, rng: Generator) -> tuple[str, str, list[Cell]]:
    yes = bool(rng.integers(2))
    kinds = [("kind", kind) for kind in scene.kinds if bool(scene.cells(kind=kind)) == yes]
    colours = [("colour", colour) for colour in COLOURS if bool(scene.cells(colour=colour)) == yes]
    if scene.fine:
        options = pick(rng, [group for group in (kinds, colours) if group])
    else:
        options = colours if rng.random() < 0.25 else kinds
    what, name = pick(rng, options)
    words = f"{name} card" if what == "colour" else name
    article = "an" if words[0] in "aeiou" else "a"
    return f"Is there {article} {words}?", "yes" if yes else "no", scene.cells(**{what: name})


def _ask_count(scene: Scene, rng: Generator) -> tuple[str, str, list[Cell]]:
    if not scene.fine and rng.random() < 0.15:
        return "How many cards are there?", str(len(scene.cards())), scene.cells(kind="card")
    counts = {kind: len(scene.cells(kind=kind)) for kind in scene.kinds}
    wanted = max(counts.values()) if rng.random() < (0.6 if scene.fine else 0.75) else int(rng.integers(2))
    kind = pick(rng, [k for k, n in counts.items() if n == wanted])
    return f"How many {PLURALS[kind]} are there?", str(wanted), scene.cells(kind=kind)


def _ask_colour(scene: Scene, rng: Generator) -> tuple[str, str, list[Cell]]:
    item = pick(rng, scene.cards())
    cells = scene.cells(digit=item.digit)
    if not scene.fine and rng.random() < 0.5:
        return f"What colour is the card at the {scene.place_of(cells[0])}?", item.colour, cells
    return f"What colour is the card with the {item.digit}?", item.colour, cells


def _ask_digit(scene: Scene, rng: Generator) -> tuple[str, str, list[Cell]]:
    item = pick(rng, scene.cards())
    cells = scene.cells(colour=item.colour)
    if not scene.fine and rng.random() < 0.4:
        return f"Which digit is at the {scene.place_of(cells[0])}?", item.digit, cells
    return f"Which digit is on the {item.colour} card?", item.digit, cells


def _ask_next_to(scene: Scene, rng: Generator) -> tuple[str, str, list[Cell]]:
    options = scene.beside()
    if scene.fine:  # its pairs are all that lies side by side
        options = [option for option in options if option[2] != "nothing"]
    else:
        answer = pick(rng, sorted({answer for _, _, answer in options}))
        options = [option for option in options if option[2] == answer]
    kind, side, answer = pick(rng, options)
    return f"What is {side} the {kind}?", answer, scene.cells(kind=kind) + scene.cells(kind=answer)


_ASK = {
    "place": _ask_place,
    "where": _ask_where,
    "exist": _ask_exist,
    "count": _ask_count,
    "colour": _ask_colour,
    "digit": _ask_digit,
    "next_to": _ask_next_to,
}
