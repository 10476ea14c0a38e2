"""Texts that say nearly everything about a scene: one pass teaches the decoder far more than questions do."""

from __future__ import annotations

from numpy.random import Generator

from himap_train.embedded.fine_scenes import FINE_KINDS, FineScene, place_of
from himap_train.embedded.scene_text import COLOURS, DESCRIBE, KINDS, PLACES, Scene, describe, sides, single_kinds


def catalogue(scene: Scene, rng: Generator) -> str:
    """For every kind whether there is one, how many and where; the same for cards of each colour, with their digit.

    The kinds start at a random one and go round.
    """
    start = int(rng.integers(len(KINDS)))
    parts = []
    for kind in KINDS[start:] + KINDS[:start]:
        places = [PLACES[place] for place in scene.places(kind=kind)]
        parts.append(" ".join([f"{kind} yes {len(places)}", *places]) if places else f"{kind} no 0")
    for colour in COLOURS:
        found = [(p, i.digit) for p, i in zip(PLACES, scene.cells, strict=True) if i and i.colour == colour]
        parts.append(f"{colour} card yes {found[0][0]} {found[0][1]}" if found else f"{colour} card no")
    return ", ".join([*parts, f"cards {scene.count('card')}"])


def neighbours(scene: Scene, rng: Generator) -> str:
    """Up to six sides of single things and what is there, in random order."""
    parts = [f"{side} the {kind} {answer}" for kind in single_kinds(scene) for side, answer in sides(scene, kind)]
    return ", ".join([parts[i] for i in rng.permutation(len(parts))][:6])


def dense_texts(scene: Scene, rng: Generator) -> list[tuple[str, str]]:
    """Three requests with their answers: the description, the catalogue and the neighbours."""
    return [
        (DESCRIBE, describe(scene)),
        ("Where is what?", catalogue(scene, rng)),
        ("What is where?", neighbours(scene, rng)),
    ]


def fine_catalogue(scene: FineScene, rng: Generator) -> list[tuple[str, str]]:
    """The catalogue of a fine scene, as `catalogue`: every kind and colour, how many and in which of nine places."""
    start, parts = int(rng.integers(len(FINE_KINDS))), []
    for kind in FINE_KINDS[start:] + FINE_KINDS[:start]:
        places = [place_of(cell) for cell in scene.cells(kind=kind)]
        parts.append(" ".join([f"{kind} yes {len(places)}", *places]) if places else f"{kind} no 0")
    for colour in COLOURS:
        found = [(place_of(cell), item.digit) for cell, item in scene.things if item.colour == colour]
        parts.append(f"{colour} card yes {found[0][0]} {found[0][1]}" if found else f"{colour} card no")
    return [("Where is what?", ", ".join(parts))]
