"""Texts that say nearly everything about a scene: one pass teaches the decoder far more than questions do."""

from __future__ import annotations

from numpy.random import Generator

from himap_train.embedded.scene_text import COLOURS, DESCRIBE, Scene


def describe(scene: Scene) -> str:
    """Every place by name, in reading order, with what is there; colour and digit of cards."""
    at, parts = dict(scene.things), []
    for cell in scene.places:
        item = at.get(cell)
        what = f"{item.colour} card {item.digit}" if item and item.colour else scene.kind_at(cell)
        parts.append(f"{scene.place_of(cell)} {what}")
    return ", ".join(parts)


def catalogue(scene: Scene, rng: Generator) -> str:
    """For every kind whether there is one, how many and where; the same for cards of each colour, with their digit.

    The kinds start at a random one and go round.
    """
    start, parts = int(rng.integers(len(scene.kinds))), []
    for kind in scene.kinds[start:] + scene.kinds[:start]:
        places = [scene.place_of(cell) for cell in scene.cells(kind=kind)]
        parts.append(" ".join([f"{kind} yes {len(places)}", *places]) if places else f"{kind} no 0")
    for colour in COLOURS:
        found = [(scene.place_of(cell), item.digit) for cell, item in scene.things if item.colour == colour]
        parts.append(f"{colour} card yes {found[0][0]} {found[0][1]}" if found else f"{colour} card no")
    return ", ".join([*parts, *([] if scene.fine else [f"cards {len(scene.cards())}"])])


def neighbours(scene: Scene, rng: Generator) -> str:
    """Up to six sides of single things and what is there, in random order."""
    parts = [f"{side} the {kind} {answer}" for kind, side, answer in scene.beside()]
    return ", ".join([parts[i] for i in rng.permutation(len(parts))][:6])


def dense_texts(scene: Scene, rng: Generator) -> list[tuple[str, str]]:
    """Requests with their answers: description, catalogue and neighbours; of a fine scene the catalogue alone."""
    if scene.fine:
        return [("Where is what?", catalogue(scene, rng))]
    return [
        (DESCRIBE, describe(scene)),
        ("Where is what?", catalogue(scene, rng)),
        ("What is where?", neighbours(scene, rng)),
    ]
