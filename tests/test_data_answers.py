"""Several accepted answers of one question reach the metrics, from a record's facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from himap_train.data.forms import read_record
from himap_train.data.records import RecordError
from himap_train.evaluation.questions import Question

ANSWERS = ["a cat", "cat", "kitten"]
RECORD = {
    "id": "7",
    "answers": ANSWERS,
    "type": "what",
    "boxes": [[0, 1]],
    "conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "cat"}],
}


def test_lists_of_answers_are_kept(tmp_path: Path) -> None:
    found = read_record(RECORD, 0, "x.json", tmp_path)
    assert json.loads(found.meta["answers"]) == ANSWERS
    assert found.meta["type"] == "what"
    assert "boxes" not in found.meta
    assert Question(0, found).answers == ANSWERS


VQA_V2 = [{"answer": "cat", "answer_confidence": "yes", "answer_id": 1}, {"answer": "2", "answer_id": 2}]


@pytest.mark.parametrize(
    ("facts", "answers"),
    [
        ({"answers": VQA_V2}, ["cat", "2"]),
        ({"answers": {"answer": ["cat", "2"], "answer_id": [1, 2]}}, ["cat", "2"]),  # as `datasets` stores objects
        ({"answers": {"answer": "cat"}}, ["cat"]),
        ({"answers": "a cat"}, ["a cat"]),
        ({"answers": '["a cat", "cat"]'}, ["a cat", "cat"]),
        ({"answers": "2.50"}, ["2.50"]),
        ({"answers": 2}, ["2"]),
        ({"answers": [2, 2.5, "two"]}, ["2", "2.5", "two"]),
        ({"answers": None}, ["kitten"]),
        ({"answer": "cat"}, ["kitten"]),  # the assistant's turn says it
        ({"answers": [1], "choices": ["5", "6"]}, ["B"]),  # ScienceQA: the number of an option
        ({"answers": 0, "A": "5", "B": "0"}, ["A"]),
        ({"answers": "0", "A": "5", "B": "0"}, ["0"]),
        ({"answers": 7, "choices": ["5", "7"]}, ["7"]),
        ({"answers": 1, "options": {"A": "5", "B": "6"}}, ["B"]),
        ({"answers": [1, 2], "options": ["5", None, 6]}, ["1", "C"]),  # there is no B
    ],
)
def test_answers_in_every_form(facts: dict[str, Any], answers: list[str], tmp_path: Path) -> None:
    assert question(facts, tmp_path).answers == answers


def test_answer_of_a_record_without_an_assistants_turn(tmp_path: Path) -> None:
    turns = {"conversations": [{"from": "human", "value": "Who?"}]}
    assert question({**turns, "answer": "cat"}, tmp_path).answers == ["cat"]
    assert question({**turns, "answer": 1, "choices": ["1", "2"]}, tmp_path).answers == ["B"]
    with pytest.raises(RecordError, match=r"'7'\) has no answer .* neither an assistant turn nor `answers`"):
        assert question(turns, tmp_path).answers
    turns["conversations"].append({"from": "gpt", "value": " \n"})
    with pytest.raises(RecordError, match="neither an assistant turn nor"):
        assert question(turns, tmp_path).answers


@pytest.mark.parametrize(
    "answers",
    [
        [],
        "",
        " ",
        {},
        [None],
        [""],
        ["cat", float("nan")],
        [["cat"]],
        [{"text": "cat"}],
        [{"answer": None}],
        {"answer": []},
        "['cat']",
        "[" * 9999,
    ],
)
def test_answers_that_are_none_name_the_record_and_the_key(answers: Any, tmp_path: Path) -> None:
    with pytest.raises(
        RecordError, match=r"'7'\) has no answer to compare with: `answers` is .*expected an answer, or"
    ):
        assert question({"answers": answers}, tmp_path).answers


def question(facts: dict[str, Any], folder: Path) -> Question:
    """A record with these facts, whose assistant says "kitten"."""
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "kitten"}]
    record = {"id": "7", "conversations": turns, **facts}
    return Question(0, read_record(record, 0, "x", folder))
