"""The embedded scenes: what is in which split, and whether every answer is true of its scene."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from himap_train.data.records import Conversation
from himap_train.data.scene_questions import SceneQuestions
from himap_train.embedded.compose import compose
from himap_train.embedded.scene_dense import catalogue, dense_texts, describe, neighbours
from himap_train.embedded.scene_text import COLOURS, DESCRIBE, KINDS, TYPES, Item, Scene, ask
from himap_train.embedded.scenes import ASSETS, SPLITS

ROWS, COLUMNS = ["top", "middle", "bottom"], ["left", "center", "right"]
SINGULAR = {"mailboxes": "mailbox"} | {kind + "s": kind for kind in (*KINDS, "card")}
# Always giving a type's most frequent answer is right at most this often.
MAJORITY = {"place": 0.3, "where": 0.2, "exist": 0.56, "count": 0.4, "colour": 0.25, "digit": 0.18, "next_to": 0.35}


def placed(scene: Scene) -> dict[tuple[int, int], Item | None]:
    return {(r, c): dict(scene.things).get((r, c)) for r in range(3) for c in range(3)}


def words_at(scene: Scene, row: int, column: int) -> str:
    item = placed(scene)[row, column]
    return "nothing" if item is None else item.kind


def true_answers(scene: Scene, question: str) -> set[str]:
    """All answers that the question's words allow, found by looking at every place; written apart from `scene_text`."""
    grid = placed(scene)
    at = re.search(r"at the (\w+) (\w+)\?", question)
    place = (ROWS.index(at[1]), COLUMNS.index(at[2])) if at else None
    name = {rc: f"{ROWS[rc[0]]} {COLUMNS[rc[1]]}" for rc in grid}
    if question.startswith("What is at"):
        return {words_at(scene, *place)}
    if m := re.fullmatch(r"Where is the (\w+) card\?", question):
        return {name[rc] for rc, item in grid.items() if item and item.colour == m[1]}
    if m := re.fullmatch(r"Where is the (\w+)\?", question):
        return {name[rc] for rc, item in grid.items() if item and item.kind == m[1]}
    if m := re.fullmatch(r"Is there (?:a|an) (\w+) card\?", question):
        return {"yes" if any(item and item.colour == m[1] for item in grid.values()) else "no"}
    if m := re.fullmatch(r"Is there (?:a|an) (\w+)\?", question):
        return {"yes" if any(item and item.kind == m[1] for item in grid.values()) else "no"}
    if m := re.fullmatch(r"How many (\w+) are there\?", question):
        return {str(sum(1 for item in grid.values() if item and item.kind == SINGULAR[m[1]]))}
    if question.startswith("What colour is the card at"):
        return {grid[place].colour}
    if m := re.fullmatch(r"What colour is the card with the (\d)\?", question):
        return {item.colour for item in grid.values() if item and item.digit == m[1]}
    if question.startswith("Which digit is at"):
        return {grid[place].digit}
    if m := re.fullmatch(r"Which digit is on the (\w+) card\?", question):
        return {item.digit for item in grid.values() if item and item.colour == m[1]}
    m = re.fullmatch(r"What is (left of|right of|above|below) the (\w+)\?", question)
    assert m, f"no rule for {question!r}"
    move = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}[m[1]]
    return {words_at(scene, r + move[0], c + move[1]) for (r, c), item in grid.items() if item and item.kind == m[2]}


def pairs(conversation: Conversation) -> list[tuple[str, str]]:
    turns = [turn.text.removeprefix("<image>\n") for turn in conversation.turns]
    return list(zip(turns[::2], turns[1::2], strict=True))


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_the_only_true_one(split: str) -> None:
    source = SceneQuestions(split, scenes=40, seed=3, questions_per_scene=7, turns=2)
    checked: Counter[str] = Counter()
    for index in range(len(source)):
        scene, _ = source.scene(index // 7)
        conversation = source[index]
        for turn, (question, answer) in enumerate(pairs(conversation)):
            assert true_answers(scene, question) == {answer}, (question, answer, scene)
            checked[TYPES[(2 * index + turn) % 7]] += 1
        assert conversation.meta["type"] == TYPES[(2 * index + 1) % 7]
    assert set(checked) == set(TYPES) and min(checked.values()) >= 70


def test_answers_are_balanced() -> None:
    source = SceneQuestions("test", scenes=4200)
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    rng = np.random.default_rng(0)
    for index in range(source.scenes):
        kind = TYPES[index % 7]
        scene, _ = source.scene(index) if index < 7 else (_composed(index), None)
        answers[kind][ask(scene, kind, rng)[1]] += 1
    rates = {kind: max(c.values()) / sum(c.values()) for kind, c in answers.items()}
    assert set(rates) == set(TYPES)
    for kind, rate in rates.items():
        assert rate < MAJORITY[kind], f"{kind}: {answers[kind].most_common(3)}"
    assert {k: len(c) for k, c in answers.items() if k in ("where", "colour", "digit", "count", "exist")} == {
        "where": 9,
        "colour": 6,
        "digit": 10,
        "count": 5,
        "exist": 2,
    }


def _composed(seed: int) -> Scene:
    return compose(np.random.default_rng(seed))


def test_splits_share_no_emoji_no_digit_and_no_photograph() -> None:
    sprites = json.loads((ASSETS / "sprites.json").read_text())
    sheet = Image.open(ASSETS / "sprites.png")
    columns = sheet.width // 32
    boxes = [(i % columns * 32, i // columns * 32) for i in range(len(sprites))]
    drawn = [sheet.crop((x, y, x + 32, y + 32)).tobytes() for x, y in boxes]
    photos = json.loads((ASSETS / "backgrounds.json").read_text())
    with np.load(ASSETS / "digits.npz") as digits:
        source = {s: set(digits[f"{s}_source"].tolist()) for s in SPLITS}
        strokes = {s: {image.tobytes() for image in digits[f"{s}_images"]} for s in SPLITS}
    for one, other in combinations(SPLITS, 2):
        for key in ("file", "name"):
            assert not {r[key] for r in sprites if r["split"] == one} & {r[key] for r in sprites if r["split"] == other}
        pictures = [{d for d, r in zip(drawn, sprites, strict=True) if r["split"] == s} for s in (one, other)]
        assert not pictures[0] & pictures[1]
        assert not source[one] & source[other] and not strokes[one] & strokes[other]
        assert not {r["photo"] for r in photos if r["split"] == one} & {
            r["photo"] for r in photos if r["split"] == other
        }
    assert {s: len(source[s]) for s in SPLITS} == {"train": 1300, "validation": 150, "test": 347}
    assert Counter((r["kind"], r["split"]) for r in sprites).keys() == {(k, s) for k in KINDS for s in SPLITS}
    assert min(Counter(r["kind"] for r in sprites).values()) >= 4


def test_a_scene_depends_on_split_seed_epoch_and_index_alone() -> None:
    def made(
        index: int = 5, split: str = "train", scenes: int = 10, **extra: int
    ) -> tuple[bytes, list[tuple[str, str]]]:
        record = SceneQuestions(split, scenes=scenes, **extra)[index]
        return record.images[0].tobytes(), pairs(record)

    assert made() == made() == made(scenes=1000)
    others = [made(), made(index=6), made(split="test"), made(seed=1), made(epoch=1)]
    assert len({image for image, _ in others}) == len(others)


def test_questions_of_one_scene_share_its_image_and_ids_are_unique() -> None:
    source = SceneQuestions("validation", scenes=4, questions_per_scene=3)
    records = [source[i] for i in range(len(source))]
    assert len(records) == 12 and len({r.id for r in records}) == 12
    assert len({r.images[0].tobytes() for r in records}) == 4
    assert records[0].images[0].tobytes() == records[2].images[0].tobytes()
    assert all(r.images[0].size == (96, 96) and r.turns[0].text.startswith("<image>\n") for r in records)


def test_description_names_every_place() -> None:
    scene = _composed(1)
    parts = [part.split(" ", 2) for part in describe(scene).split(", ")]
    assert [p[:2] for p in parts] == [[r, c] for r in ROWS for c in COLUMNS]
    for part, item in zip(parts, placed(scene).values(), strict=True):
        wanted = "nothing" if item is None else f"{item.colour} card {item.digit}" if item.colour else item.kind
        assert part[2] == wanted
    assert DESCRIBE.endswith(".") and {i.colour for i in scene.cards()} <= set(COLOURS)


def _read_entry(part: str) -> tuple[str, str, set[str], set[str]]:
    """Thing, "yes" or "no", its number (a count or a card's digit; empty for no card) and its places."""
    thing, exists, facts = re.fullmatch(r"(\w+(?: card)?) (yes|no)(.*)", part).groups()
    return thing, exists, set(re.findall(r"\d", facts)), set(re.findall(r"[a-z]+ [a-z]+", facts))


def test_dense_texts_are_true_of_the_scene() -> None:
    """What the training recipe has the decoder say beside the questions, read back as questions."""
    said: Counter[str] = Counter()
    for seed in range(60):
        scene, rng = _composed(seed), np.random.default_rng(seed)
        *things, cards = catalogue(scene, rng).split(", ")
        for part in things:
            thing, exists, numbers, places = _read_entry(part)
            ask_number = "Which digit is on the {}?" if thing.endswith(" card") else "How many {}s are there?"
            assert true_answers(scene, f"Is there a {thing}?") == {exists}
            assert true_answers(scene, ask_number.format(thing).replace("xs", "xes")) == numbers
            assert true_answers(scene, f"Where is the {thing}?") == places
            said[thing] += 1
        assert {cards.removeprefix("cards ")} == true_answers(scene, "How many cards are there?")
        for part in neighbours(scene, rng).split(", "):
            side, answer = part.rsplit(" ", 1)
            assert true_answers(scene, f"What is {side}?") == {answer}
            said["side"] += 1
        assert dense_texts(scene, rng)[0] == (DESCRIBE, describe(scene))
    assert said.pop("side") > 60 * 3
    assert said == dict.fromkeys((*KINDS, *(f"{colour} card" for colour in COLOURS)), 60)


@pytest.mark.parametrize("bad", [{"split": "dev"}, {"scenes": 0}, {"turns": 0}, {"questions_per_scene": 0}])
def test_bad_arguments_name_what_is_allowed(bad: dict) -> None:
    with pytest.raises(ValueError, match="train, validation, test|at least 1"):
        SceneQuestions(**({"split": "train"} | bad))


def test_index_out_of_range_and_unknown_type() -> None:
    with pytest.raises(IndexError):
        SceneQuestions("train", scenes=2)[2]
    with pytest.raises(ValueError, match="place, where"):
        ask(_composed(0), "why", np.random.default_rng(0))
