"""Several accepted answers of one question reach the metrics, from every format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from himap_train.data.huggingface import parse_row
from himap_train.data.llava_format import parse_llava_record
from himap_train.data.records import Conversation
from himap_train.evaluation.questions import Question

ANSWERS = ["a cat", "cat", "kitten"]
RECORD = {
    "id": "7",
    "answers": ANSWERS,
    "type": "what",
    "boxes": [[0, 1]],
    "conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "cat"}],
}


@pytest.mark.parametrize("form", ["llava", "huggingface"])
def test_lists_of_answers_are_kept(form: str, tmp_path: Path) -> None:
    found: Conversation = (
        parse_llava_record(RECORD, 0, "x.json", tmp_path) if form == "llava" else parse_row(RECORD, 0, "x", tmp_path)
    )
    assert json.loads(found.meta["answers"]) == ANSWERS
    assert found.meta["type"] == "what"
    assert "boxes" not in found.meta
    assert Question(0, found).answers == ANSWERS
