"""Fine scenes: things of one patch each, answers that are true of the scene, and the patches that show them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from himap_train.data.scene_questions import SceneQuestions
from himap_train.data.sources import open_source
from himap_train.embedded.compose import compose_fine
from himap_train.embedded.scene_dense import catalogue
from himap_train.embedded.scene_source import Scenes
from himap_train.embedded.scene_text import COLOURS, FINE_GRID, FINE_KINDS, FINE_TYPES, Scene, ask
from himap_train.embedded.scenes import FINE_CELL, FINE_SIZE, draw
from himap_train.embedded.words import EXTRA_WORDS, copying

SINGULAR = {"mailboxes": "mailbox"} | {kind + "s": kind for kind in FINE_KINDS}
MOVES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
MAJORITY = {"where": 0.2, "exist": 0.56, "count": 0.45, "colour": 0.25, "digit": 0.18, "next_to": 0.2}


def region(row: int, column: int) -> str:
    """Which ninth of the 256 pixels the centre of a patch lies in, worked out in pixels."""
    rows, columns = ["top", "middle", "bottom"], ["left", "center", "right"]
    down, right = ((16 * index + 8) / (256 / 3) for index in (row, column))
    return f"{rows[int(down)]} {columns[int(right)]}"


def true_answers(scene: Scene, question: str) -> set[str]:
    """All answers that the question's words allow, found by looking at every thing; written apart from the scenes."""
    grid = dict(scene.things)
    if m := re.fullmatch(r"Where is the (\w+) card\?", question):
        return {region(*cell) for cell, item in grid.items() if item.colour == m[1]}
    if m := re.fullmatch(r"Where is the (\w+)\?", question):
        return {region(*cell) for cell, item in grid.items() if item.kind == m[1]}
    if m := re.fullmatch(r"Is there an? (\w+) card\?", question):
        return {"yes" if any(item.colour == m[1] for item in grid.values()) else "no"}
    if m := re.fullmatch(r"Is there an? (\w+)\?", question):
        return {"yes" if any(item.kind == m[1] for item in grid.values()) else "no"}
    if m := re.fullmatch(r"How many (\w+) are there\?", question):
        return {str(sum(item.kind == SINGULAR[m[1]] for item in grid.values()))}
    if m := re.fullmatch(r"What colour is the card with the (\d)\?", question):
        return {item.colour for item in grid.values() if item.digit == m[1]}
    if m := re.fullmatch(r"Which digit is on the (\w+) card\?", question):
        return {item.digit for item in grid.values() if item.colour == m[1]}
    m = re.fullmatch(r"What is (left of|right of|above|below) the (\w+)\?", question)
    assert m is not None, question
    down, right = MOVES[m[1]]
    return {
        grid[row + down, column + right].kind
        for (row, column), item in grid.items()
        if item.kind == m[2] and (row + down, column + right) in grid
    }


def test_every_answer_is_the_only_true_one_and_its_patches_show_it() -> None:
    given: dict[str, Counter[str]] = defaultdict(Counter)
    rng = np.random.default_rng(3)
    for _ in range(400):
        scene = compose_fine(rng)
        for kind in FINE_TYPES:
            question, answer, cells = ask(scene, kind, rng)
            assert true_answers(scene, question) == {answer}, question
            # Who sees these cells alone can answer: the rest of the scene may be gone.
            left = Scene(tuple(thing for thing in scene.things if thing[0] in cells), FINE_GRID)
            assert true_answers(left, question) == {answer}, question
            given[kind][answer] += 1
    for kind, answers in given.items():
        assert max(answers.values()) / answers.total() < MAJORITY[kind], (kind, answers.most_common(3))


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown question type 'place'; there are where, exist"):
        ask(compose_fine(np.random.default_rng(0)), "place", np.random.default_rng(0))


def test_things_lie_inside_their_patch() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        scene, state = compose_fine(rng), rng.bit_generator.state
        full = np.asarray(draw(scene, "validation", rng)).astype(int)
        rng.bit_generator.state = state
        empty = np.asarray(draw(Scene((), FINE_GRID), "validation", rng)).astype(int)
        assert full.shape == (FINE_SIZE, FINE_SIZE, 3)
        changed = np.abs(full - empty).max(-1) > 16  # more than the noise of both
        patches = changed.reshape(FINE_GRID, FINE_CELL, FINE_GRID, FINE_CELL).any((1, 3))
        assert {(int(r), int(c)) for r, c in zip(*patches.nonzero(), strict=True)} <= set(dict(scene.things))
        assert patches.sum() >= len(scene.things) - 2  # a thing may have the colour of what lies under it


def test_decoys_lie_where_nothing_else_does_and_change_no_question() -> None:
    plain, crowded = (SceneQuestions("fine-validation", scenes=12, decoys=count) for count in (0, 30))
    for index in range(12):
        scene, before = plain.scene(index)
        again, after = crowded.scene(index)
        assert scene == again and plain[index].turns == crowded[index].turns
        moved = np.abs(np.asarray(before, int) - np.asarray(after, int)).max(-1) > 16  # more than the noise of 8
        share = moved.reshape(FINE_GRID, FINE_CELL, FINE_GRID, FINE_CELL).mean((1, 3))
        changed = {tuple(cell) for cell in np.argwhere(share > 0.2)}
        assert len(changed) == 30 and not changed & set(dict(scene.things)), "a decoy hides a thing, or is missing"
        assert share.max() <= (12 / FINE_CELL) ** 2 + 0.01


@pytest.mark.parametrize("split, decoys", [("validation", 3), ("fine-validation", 241)])
def test_impossible_decoys_are_refused(split: str, decoys: int) -> None:
    with pytest.raises(ValueError, match=f"decoys={decoys} in {split} scenes; expected 0 to 240, in fine scenes alone"):
        open_source(f"embedded:{split}?decoys={decoys}")


def test_only_pairs_lie_side_by_side() -> None:
    rng = np.random.default_rng(6)
    for _ in range(100):
        scene = compose_fine(rng)
        cells = [cell for cell, _ in scene.things]
        beside = [(a, b) for a in cells for b in cells if a < b and max(abs(a[0] - b[0]), abs(a[1] - b[1])) == 1]
        assert len(set(cells)) == len(cells) and len(beside) == 2
        assert len({item.colour for item in scene.cards()}) == len({i.digit for i in scene.cards()}) >= 4


def test_as_a_source_of_conversations() -> None:
    source = open_source("embedded:fine-validation?scenes=12&seed=3")
    assert isinstance(source, SceneQuestions)
    kinds = [source[index].meta["type"] for index in range(12)]
    assert kinds == [*FINE_TYPES, *FINE_TYPES]
    record = source[4]
    assert record.images[0].size == (256, 256) and record.meta["patches"].isdecimal()
    assert source[4].images[0].tobytes() == record.images[0].tobytes()
    other = Scenes("fine-test", 3).scene(4)[1]
    assert other.tobytes() != record.images[0].tobytes()
    with pytest.raises(ValueError, match="unknown split 'fine' of the embedded scenes; there are .*fine-test"):
        open_source("embedded:fine")


def test_the_catalogue_says_all_about_kinds_and_cards() -> None:
    rng = np.random.default_rng(8)
    scene = compose_fine(rng)
    parts = catalogue(scene, rng).split(", ")
    assert len(parts) == len(FINE_KINDS) + len(COLOURS)
    for part in parts[: len(FINE_KINDS)]:
        kind, there, number, *places = part.split()
        where = [region(*cell) for cell, item in scene.things if item.kind == kind]
        assert (there == "yes") == bool(where) and int(number) == len(where) and " ".join(places) == " ".join(where)


def test_copying_asks_for_what_it_answers() -> None:
    rng = np.random.default_rng(9)
    texts = [copying(EXTRA_WORDS, rng) for _ in range(200)]
    assert all(question == f"Say {answer}." for question, answer in texts)
    said = [word for _, answer in texts for word in answer.split()]
    assert 0.15 < sum(word not in EXTRA_WORDS for word in said) / len(said) < 0.35
    assert len(set(EXTRA_WORDS)) == len(EXTRA_WORDS)
