"""The data check before training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_examples import encode, image_folder, llava_record
from tiny import IMAGE_TOKENS, tiny_processor

from himap_train.data.check import check_source
from himap_train.data.skips import TooManySkippedError
from himap_train.data.sources import open_source
from himap_train.evaluation.budgeted import prompt_tokens

GOOD = [
    llava_record("one", "a.png", "<image>\nWhat?", "A cat."),
    llava_record("long", "a.png", "<image>\nWhat?", "A cat.", "And?", "x" * 200),
    llava_record("two", ["a.png", "b.png"], "<image><image>Q", "A"),
    llava_record("text", None, "Hi", "Ho"),
]
BAD = [
    (llava_record("gone", "gone.png", "<image>Q", "A"), "image file .*gone.png does not exist"),
    (llava_record("broken", "broken.png", "<image>Q", "A"), "broken.png is not an image file"),
    (llava_record("mute", None, "Q"), r"'mute'\) has a question but no answer"),
    (llava_record("places", "a.png", "Q", "A"), r"'places'\): 0 <image> in the conversation but 1 image"),
    (llava_record("out", "../a.png", "<image>Q", "A"), "leaves the image folder"),
    (llava_record("huge", None, "Q" * 300, "A"), r"'huge'\): the first question and answer take .* max_length is 150"),
    ({"id": "empty"}, "no key `conversations`"),
]


@pytest.fixture
def source(tmp_path):
    image_folder(tmp_path, ("a.png", "b.png"))
    (tmp_path / "broken.png").write_text("no image")
    (tmp_path / "data.json").write_text(json.dumps(GOOD + [record for record, _ in BAD]))
    return open_source(tmp_path / "data.json")


def test_what_is_there(source):
    processor = tiny_processor()
    report = check_source(source, processor, 150, records=4, name="mine")
    assert (report.records, report.scanned, report.examined) == (4, 4, 4)
    assert (report.images, report.text_only, report.multi_image, report.answers) == (4, 1, 1, 5)
    assert report.image_tokens == {IMAGE_TOKENS: 4} and report.skipped == {}
    lengths = {source[i].id: len(encode(source[i], processor)["input_ids"]) for i in range(4)}
    assert dict(report.lengths) == lengths
    assert report.longest(2) == sorted(lengths.items(), key=lambda item: -item[1])[:2]
    assert report.percentile(100) == max(lengths.values()) and report.percentile(50) == sorted(lengths.values())[2]
    assert report.truncated == ["long"]
    text = str(report)
    for part in (
        "data mine: 4 records, 4 looked through, 4 tokenized",
        "images       4; records with several 1, text-only 1",
        f"image tokens {IMAGE_TOKENS} an image",
        f"longest {max(lengths.values())} tokens (max_length 150)",
        f"'long' {lengths['long']}",
        "truncated    1 of 4",
        "skipped      0 of 4",
    ):
        assert part in text


def test_what_is_wrong_is_found_and_named(source):
    import re

    report = check_source(source, tiny_processor(), 150)
    assert sorted(report.skipped) == list(range(4, 4 + len(BAD)))
    for index, (_, message) in enumerate(BAD, start=4):
        assert re.search(message, report.skipped[index]), report.skipped[index]
        assert report.skipped[index] in str(report)
        assert report.skipped[index].startswith(f"data.json, record {index} (id '")
    report.require_usable(len(BAD))
    with pytest.raises(
        TooManySkippedError, match=r"(?s)7 of 11 records cannot be used, max_skipped allows 1.*gone.png.*Repair"
    ):
        report.require_usable(0.01)


def test_what_the_check_skips_training_skips_too(source):
    from himap_train.data.records import RecordError

    processor = tiny_processor()
    report = check_source(source, processor, 150)
    for index in range(len(source)):
        try:
            sample = encode(source[index], processor, 150)
        except RecordError:
            assert index in report.skipped
        else:
            assert index not in report.skipped
            assert (sample["id"] in report.truncated) == (sample["dropped_exchanges"] > 0)


def test_missing_files_and_answers_are_found_everywhere_when_only_some_records_are_tokenized(tmp_path):
    image_folder(tmp_path, ("a.png",))
    records = [llava_record(str(i), "gone.png" if i in (33, 66) else "a.png", "<image>Q", "A") for i in range(100)]
    records[50] = llava_record("mute", None, "Q")
    (tmp_path / "data.json").write_text(json.dumps(records))
    report = check_source(open_source(tmp_path / "data.json"), tiny_processor(), limit=4)
    assert (report.scanned, report.examined) == (100, 2) and sorted(report.skipped) == [33, 50, 66]
    assert [name for name, _ in report.lengths] == ["0", "99"]


def test_made_records_are_looked_at_in_some_places_only():
    report = check_source(open_source("embedded:train?scenes=1000"), tiny_processor(), limit=5)
    assert (report.records, report.scanned, report.examined) == (1000, 5, 5)
    assert [name for name, _ in report.lengths] == [f"train-0-0-{i}" for i in np.linspace(0, 999, 5).astype(int)]


def test_long_list_of_problems_is_cut(source):
    report = check_source(source, tiny_processor(), 150)
    many = replace(report, skipped={i: f"problem {i}" for i in range(30)})
    assert "problem 9" in str(many) and "problem 10" not in str(many) and "and 20 more" in str(many)


def test_budgets_in_training_are_of_the_prompt_that_evaluation_counts(tmp_path: Path) -> None:
    """No prefill runs the last answer, which may be most of a record."""
    (tmp_path / "data.json").write_text(json.dumps(GOOD))
    image_folder(tmp_path, ("a.png", "b.png"))
    processor = tiny_processor()
    source = open_source(str(tmp_path / "data.json"))
    found = check_source(source, processor)
    assert found.prompt_tokens() == prompt_tokens(source, processor)
    samples = [encode(source[index], processor) for index in range(4)]
    answers = [int((sample["labels"] != -100).sum()) for sample in samples]
    assert found.prompts[3] == (0, len(samples[3]["input_ids"]) - answers[3])
    cut = check_source(source, processor, max_length=100)
    assert cut.prompts[1] == cut.prompts[0] == found.prompts[0] == (IMAGE_TOKENS, found.prompts[0][1])
    assert sum(cut.prompts[0]) == len(samples[0]["input_ids"]) - answers[0]
    assert check_source(source, processor, limit=0).prompt_tokens() is None
