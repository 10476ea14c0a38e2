"""Records as other frameworks and data sets write them: read whole, or refused by name, never silently misread."""

from __future__ import annotations

import io
import json
import re
import struct
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_examples import encode_prompt, picture, talk
from PIL import Image
from tiny import tiny_processor
from transformers import AddedToken

from himap_train.data.check import check_source
from himap_train.data.encode import Encoder
from himap_train.data.forms import read_record
from himap_train.data.huggingface import HuggingFaceRecords
from himap_train.data.images import image_size, open_image, resolve_image_path
from himap_train.data.loader import Collate
from himap_train.data.module import LlavaDataModule
from himap_train.data.pixel_modes import orientation
from himap_train.data.plain_text import PlainText, answer_text
from himap_train.data.records import RecordError
from himap_train.data.sources import open_source
from himap_train.evaluation.benchmarks.files import _label
from himap_train.evaluation.questions import Question

ASKED = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}]
LLAVA = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]


def _read(**record: Any) -> Any:
    return read_record(record, 0, "a.json, record 0", Path("/images"))


def _png(color: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "PNG")
    return file.getvalue()


# Hugging Face data sets.


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """OpenAI's form, whose content is a list here and a text there, as `datasets` writes it: parts of it as JSON."""
    rows = []
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(_png())
        parts = [{"type": "text", "text": "What colour?"}, {"type": "image_url", "image_url": {"url": f"{number}.png"}}]
        rows.append(
            {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}], "note": "n"}
        )
    datasets.Dataset.from_list(rows, on_mixed_types="use_json").save_to_disk(str(tmp_path / "saved"))
    return tmp_path


def test_parts_that_a_data_set_stores_as_json_are_parts(mixed: Path) -> None:
    assert "Json(" in str(datasets.load_from_disk(str(mixed / "saved")).features)
    source = open_source(str(mixed / "saved"), mixed)
    conversation = source[1]
    assert [turn.text for turn in conversation.turns] == ["What colour?<image>", "red"]
    assert conversation.images == (mixed / "1.png",)
    assert source.length_hint(1) == (len("What colour?<image>red"), 1)
    assert source.outline(1) == conversation


def test_a_check_reads_no_image_of_a_record_that_it_does_not_examine(tmp_path: Path, monkeypatch: Any) -> None:
    rows = {"messages": [ASKED] * 6, "images": [[Image.new("RGB", (8, 8))]] * 5 + [[]]}
    features = datasets.Features(
        {"messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
         "images": datasets.List(datasets.Image())}
    )  # fmt: skip
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    source = open_source(str(tmp_path / "saved"))
    assert source.outline(2).images == (b"",) and len(source[2].images[0]) > 50
    assert source.outline(2).turns == source[2].turns
    whole, read = type(source).__getitem__, list[int]()
    monkeypatch.setattr(type(source), "__getitem__", lambda self, index: (read.append(index), whole(self, index))[1])
    report = check_source(source, tiny_processor(), limit=2)
    assert read == [0, 5]
    assert (report.scanned, report.images, list(report.skipped)) == (6, 5, [5])
    mix = LlavaDataModule([{"path": str(tmp_path / "saved"), "weight": 1}], None).source("train")
    assert mix.outline(2).images == (b"",)


def test_a_config_of_a_data_set_stands_before_its_split(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(json.dumps({"conversations": LLAVA, "id": name}) + "\n")
    configs = "".join(f"- config_name: {n}\n  data_files: {n}/train.jsonl\n" for n in ("one", "two"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name in ("one", "two"):
        assert open_source(f"{tmp_path}:{name}:train")[0].id == name
    with pytest.raises(ValueError, match=r"Config name is missing[\s\S]*:config:split"):
        open_source(str(tmp_path))
    with pytest.raises(ValueError, match="has no splits; give .*one/train.jsonl alone"):
        open_source(f"{tmp_path}/one/train.jsonl:test")


def test_slices_of_splits_and_relative_paths_are_names(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/train.jsonl").write_text("".join(json.dumps({"conversations": LLAVA}) + "\n" for _ in range(3)))
    monkeypatch.chdir(tmp_path)
    for split, size in (("train[:2]", 2), ("train[1:2]", 1), ("default:train[:50%]", 2), ("train", 3)):
        assert len(open_source(f"d:{split}")) == size
    for path in ("./d/train.jsonl", "d//train.jsonl", "./d", "d/"):
        assert len(open_source(path)) == 3
    datasets.Dataset.from_list([{"conversations": LLAVA}] * 3).to_parquet("d.parquet")
    assert [len(open_source(f"d.parquet{split}", split="test")) for split in ("", ":train", ":train[:2]")] == [3, 3, 2]
    with pytest.raises(ValueError, match="Unknown split"):
        open_source("d.parquet:test")
    datasets.Dataset.from_list([{"conversations": LLAVA}] * 3).save_to_disk("saved")
    with pytest.raises(ValueError, match="knows no configs; give saved:train"):
        open_source("saved:one:train")
    assert len(open_source("saved")) == len(open_source("saved:train")) == 3
    with pytest.raises(ValueError, match="as one split, unnamed: give it alone"):
        open_source("saved:validation")
    with pytest.raises(FileNotFoundError, match="none.json does not exist"):
        open_source("./none.json")
    with pytest.raises(ValueError, match="has 3 parts behind its name; expected"):
        open_source("owner/name:a:b:c")


def test_an_outline_has_the_paths_of_images_that_lie_elsewhere(tmp_path: Path) -> None:
    features = datasets.Features(
        {"messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
         "images": datasets.List(datasets.Image())}
    )  # fmt: skip
    rows = {"messages": [ASKED] * 3, "images": [[{"bytes": None, "path": "gone.png"}]] * 3}
    source = HuggingFaceRecords(datasets.Dataset.from_dict(rows, features=features), "elsewhere", tmp_path)
    assert source.outline(0).images == source[0].images == (tmp_path / "gone.png",)
    assert len(check_source(source, tiny_processor(), limit=1).skipped) == 3


def test_images_in_messages_are_no_column_of_images(tmp_path: Path) -> None:
    part = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    features = datasets.Features({"messages": [{"role": datasets.Value("string"), "content": [part]}]})
    content = [
        {"type": "image", "text": None, "image": picture(8, 8)},
        {"type": "text", "text": "What?", "image": None},
    ]
    answer = [{"type": "text", "text": "A cat.", "image": None}]
    row = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    datasets.Dataset.from_dict({"messages": [row]}, features=features).save_to_disk(str(tmp_path / "saved"))
    conversation = open_source(str(tmp_path / "saved"))[0]
    assert [turn.text for turn in conversation.turns] == ["<image>What?", "A cat."]
    assert image_size(conversation.images[0], "here") == (8, 8)


def test_a_negative_label_is_none() -> None:
    assert [_label(["cat", "dog"], number) for number in (None, -1, 0, 1)] == [None, None, "cat", "dog"]


# Records.


def test_marks_of_samples_are_out_of_a_records_reach() -> None:
    encoder = Encoder(tiny_processor())
    conversation = talk("What?", "A cat.")
    conversation.meta.update(repeated="False", substitute_for="3")
    batch = Collate(pad_token_id=0, keep_substitutes=False)([encoder.encode(conversation)] * 3)
    assert len(batch["input_ids"]) == 3 and bool((batch["labels"] >= 0).any(1).all())


def test_a_question_without_an_answer_is_not_scored_by_the_answer_before() -> None:
    conversation = talk("What?", "A cat.", "How many legs has a spider?")
    with pytest.raises(RecordError, match="has no answer to compare with"):
        _ = Question(0, conversation).answers
    conversation.meta["answer"] = "eight"
    assert Question(0, conversation).answers == ["eight"]
    assert Question(0, talk("What?", "A cat.")).answers == ["A cat."]
    assert "answer" not in encode_prompt(conversation, tiny_processor()) or conversation.answer == ""


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_text_beside_the_turns_comes_before_them(key: str) -> None:
    for turns in ({"conversations": LLAVA}, {"messages": [{**ASKED[0], "content": "What?"}, ASKED[1]]}):
        found = _read(**turns, **{key: "Answer in German."})
        assert [(turn.role, turn.text) for turn in found.turns][:2] == [
            ("system", "Answer in German."),
            ("user", "What?"),
        ]
        assert len(found.turns) == 3 and not found.meta
    assert (
        len(_read(conversations=LLAVA, **{key: None}).turns) == len(_read(conversations=LLAVA, **{key: " "}).turns) == 2
    )
    own = [{"from": "system", "value": "Be brief."}, *LLAVA]
    assert _read(conversations=own, **{key: "Be brief."}).turns == _read(conversations=own).turns
    with pytest.raises(RecordError, match=f"`{key}` is 'Be kind.', and a system turn says 'Be brief.'"):
        _read(conversations=own, **{key: "Be kind."})


@pytest.mark.parametrize(
    "key",
    ["image_paths", "image_urls", "image_files", "img_paths", "image_file_name", "image_base64", "image_list", "media",
     "image_path", "image_2", "Images_List", "image_b64"],
)  # fmt: skip
def test_pictures_under_another_name_are_refused(key: str) -> None:
    with pytest.raises(RecordError, match=f"images are read from `image` or `images`, found `{key}`"):
        _read(conversations=LLAVA, **{key: ["a.jpg"]})
    with pytest.raises(RecordError, match=f"images are read from `image` or `images`, found `{key}`"):
        _read(messages=ASKED, **{key: ["a.jpg"]})


@pytest.mark.parametrize("key", ["image_id", "image_size", "image_width", "caption", "photographer", "media_type"])
def test_facts_about_pictures_are_no_pictures(key: str) -> None:
    assert _read(conversations=LLAVA, **{key: "7"}).meta == {key: "7"}


@pytest.mark.parametrize(
    "facts",
    [
        {"image_base64": "abc"}, {"image_b64": "abc"}, {"video": "v.mp4"}, {"videos": ["v.mp4"]},
        {"media": "newspaper"}, {"tools": {}}, {"tools": ["hammer"]}, {"tools": "[]"},
        {"objects": {"bbox": [[1, 2, 3, 4]]}},
    ],
    ids=str,
)  # fmt: skip
def test_facts_beside_images_that_are_shown_are_taken(facts: dict[str, Any]) -> None:
    assert len(_read(messages=ASKED, images=["a.jpg"], **facts).images) == 1


def test_a_word_about_media_and_a_system_turn_with_a_line_break_are_taken() -> None:
    assert _read(conversations=LLAVA, media="newspaper").meta == {"media": "newspaper"}
    own = [{"from": "system", "value": "Be brief.\n"}, *LLAVA]
    assert _read(conversations=own, system="Be brief.").turns == _read(conversations=own).turns


def test_what_no_turn_would_get_is_refused_by_name() -> None:
    boxes = {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]}
    found = [{"role": "user", "content": "Find <ref-object>"}, {"role": "assistant", "content": "<bbox>"}]
    refused = [
        ({"messages": found, "objects": boxes}, "<ref-object> stands for what `objects` holds"),
        (
            {"messages": ASKED, "images": ["a.jpg"], "tools": '[{"name": "f"}]'},
            "has `tools`, of which no turn would be",
        ),
        ({"messages": ASKED, "images": ["a.jpg"], "tools": [{"name": "f"}]}, "has `tools`, of which no turn would be"),
        ({"conversations": LLAVA, "videos": ["a.mp4"]}, "has `videos` and no image, and only images are read"),
        ({"conversations": LLAVA, "audio": {"bytes": b"abc"}}, "has `audio` and no image, and only images are read"),
        (
            {"conversations": [{"from": "human", "value": "<img>a.jpg</img>What?"}, LLAVA[1]]},
            "'<img>a.jpg</img>' names",
        ),
    ]
    for record, message in refused:
        with pytest.raises(RecordError, match=re.escape(message)):
            _read(**record)
    kept = [{"from": "human", "value": "Write <bbox>, <img src='a'> and an </img>."}, LLAVA[1]]
    assert _read(conversations=kept, tools="[]", videos=[]).turns[0].text == kept[0]["value"]


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png())
    assert resolve_image_path(f"file://{tmp_path}/a.png", tmp_path, "here") == tmp_path / "a.png"
    with pytest.raises(RecordError, match="leaves the image folder"):
        resolve_image_path("file:///etc/passwd", tmp_path, "here")


# Texts and pictures.


def test_tokens_around_places_are_the_tokenizers_own_and_all_others_text() -> None:
    tokenizer = tiny_processor().tokenizer
    marks = ["<|box_start|>", "<|box_end|>", "<|odd|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(mark, special=True) for mark in marks]})
    plain = PlainText(tokenizer, "<image>")
    start, end, odd = tokenizer.convert_tokens_to_ids(marks)
    for text in ("<|box_start|>a b<|box_end|>", "<|box_start|>a <|odd|> b<|box_end|>"):
        ids = plain.ids(plain.hide(text, "here"))
        assert ids.count(start) == ids.count(end) == 1 and odd not in ids
        assert ids[0] == start and ids[-1] == end
        assert answer_text(tokenizer, [*ids, tokenizer.eos_token_id]) == text
    assert answer_text(tiny_processor().tokenizer, [*ids[1:2], tokenizer.eos_token_id]) == tokenizer.decode(ids[1:2])


def _jpeg(directory: bytes) -> bytes:
    """A JPEG of 8 x 4 pixels with this EXIF directory, in big endian."""
    file = io.BytesIO()
    Image.new("RGB", (8, 4), "red").save(file, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08" + directory)
    return file.getvalue()


def test_an_odd_tag_beside_the_orientation_breaks_no_picture() -> None:
    turned = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)  # SHORT
    odd = struct.pack(">HHII", 0x0213, 4, 1, 700000)  # YCbCrPositioning, which is a SHORT
    photo = _jpeg(struct.pack(">H", 2) + turned + odd + bytes(4))
    assert image_size(photo, "here") == (4, 8)
    upright = open_image(photo, "here")
    assert upright.size == open_image(upright, "here").size == (4, 8)


@pytest.mark.parametrize("number", range(1, 9))
def test_pictures_are_turned_as_pillow_turns_them(number: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = number
    file = io.BytesIO()
    drawn = Image.new("RGB", (6, 4), "white")
    drawn.putpixel((0, 0), (255, 0, 0))
    drawn.putpixel((5, 0), (0, 255, 0))
    drawn.save(file, "PNG", exif=exif)
    stored = Image.open(io.BytesIO(file.getvalue()))
    assert orientation(stored) == number
    assert open_image(file.getvalue(), "here").tobytes() == ImageOps.exif_transpose(stored).convert("RGB").tobytes()


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_in_a_file_of_lines_says_how_to_name_it(indent: int | None, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps([{"conversations": LLAVA}] * 2, indent=indent))
    with pytest.raises(ValueError, match=r"ame .*\*\.json$"):
        open_source(tmp_path / "a.jsonl")
