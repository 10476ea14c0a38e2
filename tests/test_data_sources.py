"""Sources: LLaVA JSON and JSONL, image paths, names in a config, and what is said when something is wrong."""

from __future__ import annotations

import itertools
import json
import pickle

import pytest
from data_examples import image_folder, llava_record, picture
from PIL import Image

from himap_train.data.images import image_size, open_image, resolve_image_path
from himap_train.data.llava_file import LlavaFile
from himap_train.data.records import RecordError, Turn
from himap_train.data.sources import open_source
from himap_train.models.families.pixels import fixed_pixels, pad_to_square

RECORDS = [
    llava_record("one", "a.png", "<image>\nWhat?", "A cat."),
    llava_record("text", None, "Hi", "Ho", "And?", "Yes – ünïcode."),
    llava_record("two", ["b.png", "sub/c.png"], "Left <image> or <image>?", "Left."),
    {**llava_record("more", None, "Q", "A"), "image": None, "type": "count", "score": 3, "other": {"not": "kept"}},
]


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path / "images", ("a.png", "b.png", "sub/c.png"))


def write_json(folder, records):
    path = folder / "data.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def write_jsonl(folder, records, newline="\n"):
    path = folder / "data.jsonl"
    path.write_bytes((newline.join(json.dumps(r, ensure_ascii=False) for r in records) + newline).encode())
    return path


@pytest.fixture(params=["json", "jsonl", "jsonl with blank lines and CRLF"])
def source(request, tmp_path, folder):
    if request.param == "json":
        return open_source(write_json(tmp_path, RECORDS), folder)
    newline = "\n" if request.param == "jsonl" else "\r\n  \r\n\r\n"
    return open_source(write_jsonl(tmp_path, RECORDS, newline), folder)


def test_records(source, folder):
    assert len(source) == 4
    one, text, two, more = (source[i] for i in range(4))
    assert one.id == "one" and one.images == (folder / "a.png",)
    assert one.turns == (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat."))
    assert text.images == () and text.turns[-1].text == "Yes – ünïcode." and text.answer == "Yes – ünïcode."
    assert two.images == (folder / "b.png", folder / "sub/c.png")
    assert more.images == () and more.meta == {"type": "count", "score": "3"}
    assert [source.length_hint(i) for i in range(4)] == [(19, 1), (22, 0), (29, 2), (2, 0)]
    for index in (-1, 4):
        with pytest.raises(IndexError, match=f"record {index} of 4"):
            source[index]


def test_source_survives_being_sent_to_a_worker(source):
    source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in range(4)] == [source[i] for i in range(4)]


def test_jsonl_is_read_by_place_not_from_start(tmp_path, folder):
    many = [llava_record(str(i), None, f"Q{i} " + "x" * (i % 7), f"A{i}") for i in range(100)]
    source = LlavaFile(write_jsonl(tmp_path, many), folder)
    assert [source[i].id for i in (99, 3, 50, 0)] == ["99", "3", "50", "0"]
    assert source._offsets.itemsize * len(source) == 800


def test_image_folder_is_that_of_the_file_by_default(folder):
    source = open_source(write_json(folder, RECORDS))
    assert source[0].images[0] == folder / "a.png"


BAD_RECORDS = [
    (["no", "object"], "data.json, record 1: expected an object with `conversations` or `messages`, found list"),
    (
        {"id": "x", "image": "a.png"},
        r"data.json, record 1 \(id 'x'\): no key `conversations` and no `messages`, found the keys \['id', 'image'\]",
    ),
    ({"id": "x", "conversations": "Hi"}, "record 1 .*: `conversations` is str 'Hi'; expected a list of turns"),
    (
        {"id": "x", "conversations": [{"role": "user"}]},
        r"conversations\[0\]: expected the keys `from` and `value`, found .*role",
    ),
    (
        {"id": "x", "conversations": [{"from": "bard", "value": ""}]},
        r"conversations\[0\]: `from` is 'bard'; expected one of human",
    ),
    (
        {"id": "x", "conversations": [{"from": "gpt", "value": 3}]},
        r"conversations\[0\]: `value` is int 3; expected text",
    ),
    (llava_record("x", 7, "<image>Q", "A"), "an image is int 7; expected a path"),
    (llava_record("x", [None], "<image>Q", "A"), "an image is NoneType None; expected a path"),
    (llava_record("x", " ", "<image>Q", "A"), "the image path is ' '; give a file below"),
    (
        llava_record("x", "../secret.png", "<image>Q", "A"),
        "'../secret.png' leaves the image folder .*; set image_folder",
    ),
    (llava_record("x", "/etc/passwd", "<image>Q", "A"), "'/etc/passwd' leaves the image folder"),
    (llava_record("x", "link/c.png", "<image>Q", "A"), "'link/c.png' leaves the image folder .*leads to .*elsewhere"),
]


@pytest.mark.parametrize(("record", "message"), BAD_RECORDS)
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_bad_records_name_file_record_and_key(tmp_path, folder, record, message, kind):
    (tmp_path / "elsewhere").mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    write = write_json if kind == "json" else write_jsonl
    source = open_source(write(tmp_path, [RECORDS[0], record]), folder)
    source[0]
    with pytest.raises(RecordError, match=message.replace("data.json", f"data.{kind}")):
        source[1]


def test_broken_line_of_jsonl(tmp_path, folder):
    path = write_jsonl(tmp_path, RECORDS)
    path.write_bytes(path.read_bytes() + b'{"id": \xff\n' + b'{"id": "cut"')
    source = LlavaFile(path, folder)
    for index in (4, 5):
        with pytest.raises(RecordError, match=f"data.jsonl, record {index}: not JSON"):
            source[index]
        assert source.length_hint(index) == (0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON: Expecting value at line 1, column 1"),
        (b'[{"id": 1},\n {"id": 2]', "is not JSON: .* at line 2, column"),
        (b'{"id": 1}\n{"id": 2}', "Extra data at line 2, column 1; one record a line is JSONL: name the file"),
        (
            b'{"annotations": [], "images": []}',
            r"expected a list of records, found the keys \['annotations', 'images'\]",
        ),
        (b"[]", "holds no records"),
        (
            b'[{"caption": "x"}, {"caption": "y"}]',
            "is not in LLaVA's format.*record 0.*no key `conversations`.*caption",
        ),
        (b"\xff\xfe[]", "is not UTF-8 text"),
    ],
)
def test_files_that_are_not_the_format(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        LlavaFile(path)


def test_empty_jsonl(tmp_path):
    (tmp_path / "data.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="data.jsonl holds no records"):
        LlavaFile(tmp_path / "data.jsonl")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.json", "data file missing.json does not exist"),
        ("missing.jsonl", "data file missing.jsonl does not exist"),
        ("missing.parquet", "data file missing.parquet does not exist"),
        ("./no/such/folder", "data './no/such/folder' is not there .*; expected a LLaVA file"),
        ("data.txt", "data 'data.txt' is not there"),
    ],
)
def test_what_is_not_there(spec, message):
    with pytest.raises(FileNotFoundError, match=message):
        open_source(spec)


def test_image_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="image_folder .*nowhere does not exist"):
        open_source(write_json(tmp_path, RECORDS), tmp_path / "nowhere")


def test_embedded_scenes_by_name():
    source = open_source("embedded:validation?scenes=5&turns=2&seed=3")
    assert len(source) == 5 and len(source[4].turns) == 4 and source[0].id == "validation-3-0-0"
    with pytest.raises(
        ValueError, match="'embedded:test.scene=5': option scene=5; expected a number for one of scenes"
    ):
        open_source("embedded:test?scene=5")
    with pytest.raises(ValueError, match="option scenes=many"):
        open_source("embedded:test?scenes=many")
    with pytest.raises(ValueError, match="unknown split 'tset'"):
        open_source("embedded:tset")


def test_images_are_opened_upright_and_rgb(tmp_path):
    picture = Image.new("L", (20, 10), 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture.save(tmp_path / "a.jpg", exif=exif)
    image = open_image(tmp_path / "a.jpg", "x")
    assert (image.size, image.mode) == ((10, 20), "RGB")
    assert image_size((tmp_path / "a.jpg").read_bytes(), "x") == (10, 20)  # as it will be encoded


def test_sizes_are_those_of_the_upright_image(tmp_path):
    """Without a look behind the header."""
    for ending, orientation in itertools.product(("jpg", "png", "webp", "tif"), (1, 3, 6, 8)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = tmp_path / f"{orientation}.{ending}"
        Image.new("RGB", (20, 10)).save(file, exif=exif)
        assert image_size(file, "x") == open_image(file, "x").size == ((10, 20) if orientation > 4 else (20, 10))
        assert image_size(Image.open(file), "x") == open_image(file, "x").size


def test_pictures_under_another_name_are_not_passed_over(tmp_path):
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}]
    for key in ("image_path", "img", "picture", "Image_1"):
        (tmp_path / "a.json").write_text(json.dumps([{"conversations": turns}, {"conversations": turns, key: "a.png"}]))
        with pytest.raises(RecordError, match=f"images are read from `image` or `images`, found `{key}`"):
            open_source(str(tmp_path / "a.json"))[1]
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": turns, "img": None, "image_id": 7}]))
    assert not open_source(str(tmp_path / "a.json"))[0].images


def test_missing_and_broken_images(tmp_path):
    picture(300, 300).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no image")
    assert image_size(tmp_path / "cut.png", "x") == (300, 300)
    with pytest.raises(RecordError, match="record 7: .*cut.png is broken"):
        open_image(tmp_path / "cut.png", "record 7")
    for opener in (open_image, image_size):
        with pytest.raises(RecordError, match="record 7: .*text.png is not an image file"):
            opener(tmp_path / "text.png", "record 7")
        with pytest.raises(RecordError, match="record 7: image file .*gone.png does not exist; check image_folder"):
            opener(tmp_path / "gone.png", "record 7")
        with pytest.raises(RecordError, match="record 7: .* is broken"):
            opener(tmp_path, "record 7")


def test_huge_image_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    picture(40, 40).save(tmp_path / "bomb.png")
    with pytest.raises(RecordError, match="bomb.png is broken .DecompressionBombError"):
        open_image(tmp_path / "bomb.png", "x")


def test_links_that_stay_inside_are_fine(folder):
    (folder / "again.png").symlink_to(folder / "sub/c.png")
    assert resolve_image_path("again.png", folder, "x") == folder / "sub/c.png"
    assert resolve_image_path("sub/../a.png", folder, "x") == folder / "a.png"
    assert resolve_image_path(str(folder / "a.png"), folder, "x") == folder / "a.png"
    with pytest.raises(RecordError, match="leaves the image folder"):
        resolve_image_path(f"../{folder.name}2/a.png", folder, "x")
    (folder.parent / f"{folder.name}2").mkdir()
    with pytest.raises(RecordError, match="leaves the image folder"):
        resolve_image_path(f"../{folder.name}2/a.png", folder, "x")


@pytest.mark.parametrize("size", [(50, 20), (20, 51), (30, 30)])
def test_padding_to_a_square_equals_that_of_transformers(size):
    """LlavaImageProcessor has LLaVA's padding built in, written independently."""
    from tiny import tiny_processor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    ours = tiny_processor().image_processor
    theirs = LlavaImageProcessorPil(do_pad=True, size=dict(ours.size), crop_size=dict(ours.crop_size))
    image = Image.effect_noise(size, 90).convert("RGB")
    expected = theirs([image], return_tensors="pt")["pixel_values"]
    assert pad_to_square(image, ours.image_mean).size == (max(size),) * 2
    difference = (fixed_pixels(image, ours, "pad") - expected).abs()
    assert difference.max() < 1e-5
    if size[0] != size[1]:
        assert (fixed_pixels(image, ours, "as_processor") - expected).abs().max() > 0.1


def test_unknown_aspect_ratio():
    from tiny import tiny_processor

    with pytest.raises(ValueError, match="image_aspect_ratio is 'square'; expected 'as_processor' or 'pad'"):
        fixed_pixels(picture(), tiny_processor().image_processor, "square")
