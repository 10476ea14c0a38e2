"""What a scene holds and what is asked about it: nine places, each empty or with one object or one card.

A scene is pure data here; `scenes.py` draws it. `ask` makes one question with its answer from the scene, balanced so
that always giving the most frequent answer of a type is right in half of its questions (yes/no) or far less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from numpy.random import Generator

T = TypeVar("T")
KINDS = ("face", "cat", "monkey", "heart", "sign", "car", "moon", "book", "cloud", "clock", "arrow", "mailbox")
PLURALS = {kind: kind + "s" for kind in KINDS} | {"mailbox": "mailboxes", "card": "cards"}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
DIGITS = tuple("0123456789")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
TYPES = ("place", "where", "exist", "count", "colour", "digit", "next_to")
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
    """Nine places in reading order."""

    cells: tuple[Item | None, ...]

    def kind_at(self, place: int) -> str:
        """Kind of what is at `place`, "nothing" where it is empty."""
        item = self.cells[place]
        return item.kind if item else "nothing"

    def count(self, kind: str) -> int:
        """How many things of this kind there are."""
        return sum(item is not None and item.kind == kind for item in self.cells)

    def places(self, **wanted: str) -> list[int]:
        """Places whose item has all of the wanted attributes."""
        return [p for p, i in enumerate(self.cells) if i and all(getattr(i, name) == v for name, v in wanted.items())]


def compose(rng: Generator) -> Scene:
    """A random scene: one kind several times or not at all, two or three kinds once, one to three unlike cards."""
    kinds = rng.permutation(KINDS).tolist()
    singles = 2 + int(rng.integers(2))
    copies = int(rng.choice([0, 2, 3, 4]))
    cards = min(1 + int(rng.integers(3)), len(PLACES) - singles - copies)
    items = [Item(kind) for kind in kinds[:singles]] + [Item(kinds[singles])] * copies
    colours, digits = rng.permutation(COLOURS).tolist(), rng.permutation(DIGITS).tolist()
    items += [Item("card", colours[c], digits[c]) for c in range(cards)]
    cells: list[Item | None] = [None] * len(PLACES)
    for place, item in zip(rng.permutation(len(PLACES)).tolist(), items, strict=False):
        cells[place] = item
    return Scene(tuple(cells))


def describe(scene: Scene) -> str:
    """Every place by name, in reading order, with what is there; colour and digit of cards."""
    parts = [f"{i.colour} card {i.digit}" if i and i.colour else (i.kind if i else "nothing") for i in scene.cells]
    return ", ".join(f"{place} {part}" for place, part in zip(PLACES, parts, strict=True))


def single_kinds(scene: Scene) -> list[str]:
    """Kinds of which there is exactly one, in the order of `KINDS`."""
    return [kind for kind in KINDS if scene.count(kind) == 1]


def sides(scene: Scene, kind: str) -> list[tuple[str, str]]:
    """What lies on each side of the only thing of this kind, as far as the picture reaches."""
    row, column = divmod(scene.places(kind=kind)[0], len(COLUMNS))
    return [
        (side, scene.kind_at((row + down) * len(COLUMNS) + column + right))
        for side, (down, right) in SIDES.items()
        if 0 <= row + down < len(ROWS) and 0 <= column + right < len(COLUMNS)
    ]


def ask(scene: Scene, kind_of_question: str, rng: Generator) -> tuple[str, str]:
    """One question of the named type with its answer.

    Raises:
        ValueError: for a type that is not in `TYPES`.
    """
    if kind_of_question not in _ASK:
        raise ValueError(f"unknown question type {kind_of_question!r}; there are {', '.join(TYPES)}")
    return _ASK[kind_of_question](scene, rng)


def pick(rng: Generator, options: Sequence[T]) -> T:
    """One of `options`, each as likely as another."""
    return options[int(rng.integers(len(options)))]


def _ask_place(scene: Scene, rng: Generator) -> tuple[str, str]:
    answers = sorted({scene.kind_at(p) for p in range(len(PLACES))})
    answer = pick(rng, answers)  # over what is there, not over places: "nothing" and repeated kinds are no safe guess
    place = pick(rng, [p for p in range(len(PLACES)) if scene.kind_at(p) == answer])
    return f"What is at the {PLACES[place]}?", answer


def _ask_where(scene: Scene, rng: Generator) -> tuple[str, str]:
    cards = scene.places(kind="card")
    if rng.random() < 0.3:
        place = pick(rng, cards)
        item = scene.cells[place]
        return f"Where is the {item.colour if item else ''} card?", PLACES[place]
    kind = pick(rng, single_kinds(scene))
    return f"Where is the {kind}?", PLACES[scene.places(kind=kind)[0]]


def _ask_exist(scene: Scene, rng: Generator) -> tuple[str, str]:
    yes = bool(rng.integers(2))
    if rng.random() < 0.25:
        colour = pick(rng, [c for c in COLOURS if bool(scene.places(colour=c)) == yes])
        return f"Is there {article(colour)} {colour} card?", "yes" if yes else "no"
    kind = pick(rng, [k for k in KINDS if bool(scene.count(k)) == yes])
    return f"Is there {article(kind)} {kind}?", "yes" if yes else "no"


def _ask_count(scene: Scene, rng: Generator) -> tuple[str, str]:
    if rng.random() < 0.15:
        return "How many cards are there?", str(scene.count("card"))
    counts = {kind: scene.count(kind) for kind in KINDS}
    wanted = max(counts.values()) if rng.random() < 0.75 else int(rng.integers(2))
    kind = pick(rng, [k for k, n in counts.items() if n == wanted])
    return f"How many {PLURALS[kind]} are there?", str(wanted)


def _ask_colour(scene: Scene, rng: Generator) -> tuple[str, str]:
    place = pick(rng, scene.places(kind="card"))
    item = scene.cells[place] or Item("")
    if rng.random() < 0.5:
        return f"What colour is the card at the {PLACES[place]}?", item.colour
    return f"What colour is the card with the {item.digit}?", item.colour


def _ask_digit(scene: Scene, rng: Generator) -> tuple[str, str]:
    place = pick(rng, scene.places(kind="card"))
    item = scene.cells[place] or Item("")
    if rng.random() < 0.4:
        return f"Which digit is at the {PLACES[place]}?", item.digit
    return f"Which digit is on the {item.colour} card?", item.digit


def _ask_next_to(scene: Scene, rng: Generator) -> tuple[str, str]:
    options: dict[str, list[str]] = {}
    for kind in single_kinds(scene):
        for side, answer in sides(scene, kind):
            options.setdefault(answer, []).append(f"What is {side} the {kind}?")
    answer = pick(rng, sorted(options))
    return pick(rng, options[answer]), answer


def article(word: str) -> str:
    """The indefinite article before `word`."""
    return "an" if word[0] in "aeiou" else "a"


_ASK = {
    "place": _ask_place,
    "where": _ask_where,
    "exist": _ask_exist,
    "count": _ask_count,
    "colour": _ask_colour,
    "digit": _ask_digit,
    "next_to": _ask_next_to,
}
