"""Hugging Face data sets with image columns: from disk, from files, and a hub that cannot be reached."""

from __future__ import annotations

import io
import time

import datasets
import pytest
from data_examples import encode, image_folder, picture, pixels
from tiny import tiny_processor

from himap_train.data.forms import read_record
from himap_train.data.huggingface import HuggingFaceRecords
from himap_train.data.records import RecordError, Turn
from himap_train.data.sources import load_from_hub, open_source

RED, BLUE = picture(colour=(250, 0, 0)), picture(colour=(0, 0, 250))


def text(value):
    return {"type": "text", "text": value, "index": None}


def image(index):
    return {"type": "image", "text": None, "index": index}


def message(role, *parts):
    return {"role": role, "content": list(parts)}


ROWS = [
    {
        "messages": [
            message("user", text("What is it?\n"), image(0)),
            message("assistant", text("Red.")),
            message("user", text("And "), image(1), text(" this?")),
            message("assistant", text("Blue.")),
        ],
        "images": [RED, BLUE],
        "source": "made",
    },
    {"messages": [message("user", text("Hi")), message("assistant", text("Ho"))], "images": [], "source": "text"},
    {
        "messages": [message("user", image(1), image(0), text("Which?")), message("assistant", text("Blue, red."))],
        "images": [RED, BLUE],
        "source": "swapped",
    },
]
FEATURES = datasets.Features(
    {
        "messages": [
            {
                "role": datasets.Value("string"),
                "content": [
                    {
                        "type": datasets.Value("string"),
                        "text": datasets.Value("string"),
                        "index": datasets.Value("int64"),
                    }
                ],
            }
        ],
        "images": [datasets.Image()],
        "source": datasets.Value("string"),
    }
)


def dataset(rows=ROWS, features=FEATURES):
    return datasets.Dataset.from_list(rows, features=features)


@pytest.fixture(params=["save_to_disk", "save_to_disk with splits", "parquet folder", "parquet file"])
def spec(request, tmp_path):
    if request.param == "save_to_disk":
        dataset().save_to_disk(tmp_path / "set")
        return str(tmp_path / "set")
    if request.param == "save_to_disk with splits":
        datasets.DatasetDict({"train": dataset().select([1]), "test": dataset()}).save_to_disk(tmp_path / "set")
        return f"{tmp_path / 'set'}:test"
    (tmp_path / "set").mkdir()
    dataset().to_parquet(tmp_path / "set/train-00000-of-00001.parquet")
    return str(tmp_path / ("set" if request.param == "parquet folder" else "set/train-00000-of-00001.parquet"))


def check_conversations(conversations):
    first, second, third = conversations
    assert first.turns[0] == Turn("user", "What is it?\n<image>") and first.turns[2].text == "And <image> this?"
    assert first.answer == "Blue." and first.meta == {"source": "made"}
    assert second.images == () and second.turns == (Turn("user", "Hi"), Turn("assistant", "Ho"))
    assert third.images == first.images[::-1] and all(isinstance(image, bytes) for image in first.images)
    sample = encode(first, tiny_processor())
    means = pixels(sample).mean(dim=(2, 3))
    assert means[0, 0] > 1 > means[0, 2] and means[1, 2] > 1 > means[1, 0]


def test_map_style(spec):
    source = open_source(spec)
    check_conversations([source[i] for i in range(len(source))])
    assert [source.length_hint(i) for i in range(3)] == [(45, 2), (4, 0), (30, 2)]
    with pytest.raises(IndexError, match="record 3 of 3"):
        source[3]


def test_conversations_column_with_one_image():
    rows = [
        {
            "id": "x",
            "conversations": [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}],
            "image": RED,
        }
    ]
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "conversations": [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
            "image": datasets.Image(),
        }
    )
    conversation = HuggingFaceRecords(dataset(rows, features), "made")[0]
    assert conversation.id == "x" and len(conversation.images) == 1
    assert conversation.turns == (Turn("user", "<image>\nQ"), Turn("assistant", "A"))


QA = [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}]


def test_plain_text_content_and_encoded_bytes():
    buffer = io.BytesIO()
    RED.save(buffer, "PNG")
    row = {"messages": QA, "image": {"bytes": buffer.getvalue(), "path": "x.png"}}
    conversation = read_record(row, 0, "made", None)
    assert conversation.images == (buffer.getvalue(),) and conversation.turns[0].text == "<image>Q"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": None}, "data set made, row 0 .*: `messages` is NoneType None; expected a list of turns"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: expected the keys `role` and `content`"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\]: `role` is 'tool'; expected one of human"),
        ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\]: `content` is int 5; expected text"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "expected parts of type text or image"),
        ({"messages": QA, "images": []}, "a turn shows image 0, but there are 0 in `images`"),
        ({"messages": QA, "images": [RED, BLUE]}, r"2 image\(s\), but no turn shows number 1"),
        ({"messages": QA, "images": [7]}, "an image is int 7; expected a path, an image or bytes"),
        ({"messages": QA, "images": ["a.png"]}, "the image is a path .'a.png'.; set image_folder"),
        ({"conversations": "Hi"}, "`conversations` is str 'Hi'; expected a list of turns"),
    ],
)
def test_bad_rows_name_data_set_row_and_column(row, message):
    with pytest.raises(RecordError, match=message):
        read_record(row, 0, "data set made, row 0", None)


def test_images_stored_as_paths_stay_in_the_folder(tmp_path):
    image_folder(tmp_path / "set", ("a.png",))
    rows = [{"messages": QA, "images": ["a.png"]}, {"messages": QA, "images": ["../a.png"]}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set/train.parquet")
    source = open_source(tmp_path / "set/train.parquet")
    assert source[0].images == (tmp_path / "set/a.png",)
    with pytest.raises(RecordError, match="'../a.png' leaves the image folder"):
        source[1]


def test_columns_that_are_not_understood(tmp_path):
    datasets.Dataset.from_list([{"question": "Q", "answer": "A"}]).save_to_disk(tmp_path / "set")
    with pytest.raises(
        ValueError, match=r"has the columns \['question', 'answer'\]; expected `messages` or `conversations`"
    ):
        open_source(tmp_path / "set")


def test_missing_split_and_folder_without_data(tmp_path):
    datasets.DatasetDict({"train": dataset()}).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match="has no split 'test'; it has train. Name one: .*set:train"):
        open_source(f"{tmp_path / 'set'}:test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty cannot be read as a Hugging Face data set"):
        open_source(tmp_path / "empty")


UNREACHABLE = "no-such-owner/no-such-set cannot be fetched from the hub .*local copy.*embedded:train"


def test_hub_that_cannot_be_reached_ends_within_seconds(monkeypatch):
    """One request that fails, to an address where nothing listens; `load_dataset`, which retries, is not tried."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub, "HfApi", lambda real=huggingface_hub.HfApi: real(endpoint="http://127.0.0.1:9")
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("load_dataset was called"))
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=UNREACHABLE):
        open_source("no-such-owner/no-such-set")
    assert time.monotonic() - start < 10


def test_offline_mode_looks_into_the_cache_only():
    """HF_HUB_OFFLINE=1 is set for all tests."""
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=f"(?=.*not in the local cache and HF_HUB_OFFLINE is set){UNREACHABLE}"):
        open_source("no-such-owner/no-such-set:test")
    assert time.monotonic() - start < 10


def test_name_that_the_hub_does_not_know(monkeypatch):
    import httpx2
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    def unknown(*_, **__):
        raise RepositoryNotFoundError("404", response=httpx2.Response(404, request=httpx2.Request("GET", "http://hub")))

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def nothing(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/nmae' doesn't exist on the Hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unknown)
    monkeypatch.setattr(datasets, "load_dataset", nothing)
    with pytest.raises(ValueError, match="data set owner/nmae, split 'train': .* doesn't exist on the Hub"):
        load_from_hub("owner/nmae", "train")
