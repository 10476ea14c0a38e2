"""Records as ms-swift, OpenAI and TRL write them, in files and in data sets; preference pairs are refused by name."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_examples import image_folder, picture

from himap_train.data.forms import read_record
from himap_train.data.huggingface import HuggingFaceRecords
from himap_train.data.records import RecordError, Turn
from himap_train.data.sources import open_source


def encoded() -> bytes:
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    return buffer.getvalue()


PNG = encoded()
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
A = {"role": "assistant", "content": "A cat."}
ASKED = "<image>\nWhat?"


def asked(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": parts[0] if isinstance(parts[0], str) else list(parts)}, A]


TEXT = {"type": "text", "text": "What?"}
GOOD: dict[str, tuple[dict[str, Any], str, tuple[Any, ...]]] = {
    "ms-swift": ({"messages": asked("<image>What?"), "images": ["a.png"]}, "<image>What?", ("a.png",)),
    "ms-swift, two": (
        {"messages": asked("<image><image>Which?"), "images": ["a.png", "b.png"]},
        "<image><image>Which?",
        ("a.png", "b.png"),
    ),
    "OpenAI, base64": (
        {"messages": asked(TEXT, {"type": "image_url", "image_url": {"url": DATA_URL, "detail": "low"}})},
        "What?<image>",
        (PNG,),
    ),
    "OpenAI, a file": (
        {"messages": asked({"type": "image_url", "image_url": "b.png"}, TEXT)},
        "<image>What?",
        ("b.png",),
    ),
    "own image and one of the column": (
        {"messages": asked({"type": "image", "path": "b.png"}, TEXT, {"type": "image"}), "images": ["a.png"]},
        "<image>What?<image>",
        ("b.png", "a.png"),
    ),
    "TRL": ({"messages": asked("What?"), "images": ["a.png"]}, ASKED, ("a.png",)),
    "TRL, system turn": (
        {"messages": [{"role": "system", "content": "Be brief."}, *asked("What?")], "images": ["a.png", "b.png"]},
        "<image>\n" + ASKED,
        ("a.png", "b.png"),
    ),
    "TRL, prompt and completion": (
        {"prompt": asked("What?")[:1], "completion": [A], "images": ["a.png"]},
        ASKED,
        ("a.png",),
    ),
    "TRL, texts": ({"prompt": "What?", "completion": " A cat.", "image": "a.png"}, ASKED, ("a.png",)),
    "text alone": ({"messages": asked("Hi"), "images": None}, "Hi", ()),
}


def in_file(folder: Path, *records: dict[str, Any]) -> Any:
    image_folder(folder, ("a.png", "b.png"))
    (folder / "data.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return open_source(folder / "data.jsonl")


@pytest.mark.parametrize("name", GOOD)
def test_forms(name: str, tmp_path: Path) -> None:
    """In a file, and as a row."""
    record, question, images = GOOD[name]
    source = in_file(tmp_path, {"id": "x", **record})
    for conversation in (source[0], read_record(record, 0, "made", tmp_path)):
        assert conversation.turns[-2:] == (Turn("user", question), Turn("assistant", "A cat."))
        assert conversation.images == tuple(tmp_path / i if isinstance(i, str) else i for i in images)
        assert conversation.meta == {}
    assert source[0].id == "x"
    assert source.length_hint(0) == (sum(len(turn.text) for turn in source[0].turns), len(images))


def test_length_of_rows_whose_images_have_no_place(tmp_path: Path) -> None:
    rows = [{"messages": asked("What?"), "images": [picture()] * n} for n in (2, 0)]
    features = datasets.Features(
        {"messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}]}
        | {"images": [datasets.Image()]}
    )
    source = HuggingFaceRecords(datasets.Dataset.from_list(rows, features), "made")
    assert [source.length_hint(i) for i in (0, 1)] == [(5 + 2 * 8 + 6, 2), (5 + 6, 0)]  # a line for each image
    one = [{"prompt": "What?", "completion": "A cat.", "image": picture()}]
    features = datasets.Features({k: datasets.Value("string") for k in ("prompt", "completion")})
    features["image"] = datasets.Image()
    single = HuggingFaceRecords(datasets.Dataset.from_list(one, features), "made")
    assert single.length_hint(0) == (len(ASKED) + 6, 1) and len(single[0].images) == 1


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"messages": asked("<image>What?"), "images": ["a.png", "b.png"]},
        r"record 1 .*2 image\(s\), but no turn shows number 1",
    ),
    ({"messages": asked("<image><image>What?"), "images": ["a.png"]}, "shows image 1, but there are 1 in `images`"),
    ({"messages": asked("What?"), "rejected_response": "A dog."}, "is a preference pair .`rejected_response`.*DPO"),
    (
        {"prompt": "What?", "completion": "", "chosen": "A cat.", "rejected": "A dog."},
        "record 1 is a preference pair .`rejected`., as DPO trains on; only answers to be given",
    ),
    ({"messages": asked("What?"), "label": False}, "is judged good or bad .`label`., as KTO trains on"),
    ({"messages": asked("What?"), "kto_tag": True}, "is judged good or bad .`kto_tag`."),
    ({"messages": [asked("What?")[0], {**A, "weight": 0}]}, r"messages\[1\]: `weight` says not to learn this answer"),
    ({"messages": [asked("What?")[0], {**A, "loss": False}]}, r"messages\[1\]: `loss` says not to learn this answer"),
    ({"prompt": 5, "completion": "A"}, r"messages\[0\]: expected the keys `role` and `content`, found int 5"),
    (
        {"messages": asked({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}})},
        "the image is 'https://x.org/a.png'; images are read from files alone",
    ),
    ({"messages": asked({"type": "image", "path": "../a.png"})}, "'../a.png' leaves the image folder"),
    (
        {"messages": asked({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}})},
        "the image 'data:image/png;base64' is not base64",
    ),
    ({"messages": asked({"type": "video_url", "video_url": "a.mp4"})}, "expected parts of type text or image"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_bad_records(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = in_file(tmp_path, GOOD["TRL"][0], record)
    with pytest.raises(RecordError, match=message):
        source[1]


def test_bool_label_of_llava_records_is_no_judgement(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    assert in_file(tmp_path, {"conversations": turns, "label": False})[0].meta == {"label": "False"}


def test_preference_data_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    pairs = {"prompt": ["Q"], "chosen": ["A"], "rejected": ["B"]}
    datasets.Dataset.from_dict(pairs).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match="has preference pairs .column `rejected`., as DPO trains on; only answers"):
        open_source(tmp_path / "set")
    with pytest.raises(ValueError, match="data.jsonl .*record 0 is a preference pair .`rejected_response`"):
        in_file(tmp_path, {"messages": asked("What?"), "rejected_response": "A dog."})
    openai = {"input": {"messages": asked("What?")[:1]}, "preferred_output": [A], "non_preferred_output": [A]}
    with pytest.raises(ValueError, match="is a preference pair .`non_preferred_output`"):
        in_file(tmp_path, openai)
    factory = {"conversations": [{"from": "human", "value": "Q"}], "chosen": {}, "rejected": {}}
    with pytest.raises(ValueError, match="is a preference pair .`rejected`"):
        in_file(tmp_path, factory)
