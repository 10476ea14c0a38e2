"""Hugging Face data sets: a folder on disk or a name on the hub, with image columns.

Understood columns: `messages` (`[{role, content: text | [{type: "text", text} | {type: "image", index}]}]`, as
llava-instruct-mix-vsft has them) or `conversations` (as LLaVA JSON has them), with `images` or `image`, or neither.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from himap_train.data.images import resolve_image_path
from himap_train.data.llava_format import checked_text, meta_of, parse_turns, record_name, role_of
from himap_train.data.records import IMAGE_PLACEHOLDER, Conversation, ImageSource, RecordError, Turn

TEXT_COLUMNS = ("messages", "conversations")
IMAGE_COLUMNS = ("images", "image")


class HuggingFaceRecords:
    """Map-style source over a `datasets.Dataset`; images stay undecoded until `encode`.

    Args:
        dataset: the data set.
        name: for messages.
        image_folder: folder for images that are stored as paths; without it such images are refused.
        follow_links: see `resolve_image_path`.

    Raises:
        ValueError: no column with conversations.
    """

    def __init__(self, dataset: Any, name: str, image_folder: Path | None = None, follow_links: bool = False) -> None:
        check_columns(dataset.column_names, name)
        self._dataset = dataset.with_format("arrow")  # rows as they are stored: images as {"bytes", "path"}
        self._texts = self._dataset.select_columns([c for c in TEXT_COLUMNS if c in dataset.column_names])
        self.name, self.image_folder, self.follow_links = name, image_folder, follow_links

    def __len__(self) -> int:
        """Number of records."""
        return len(self._dataset)

    def __getitem__(self, index: int) -> Conversation:
        """Record `index`; RecordError if it cannot be used."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: record {index} of {len(self)}")
        row = plain_row(self._dataset[index], f"data set {self.name}, row {index}")
        return parse_row(row, index, self.name, self.image_folder, self.follow_links)

    def length_hint(self, index: int) -> tuple[int, int]:
        """(characters, images) of a record without reading its images; (0, 0) for one that cannot be used."""
        try:
            turns, indices = _turns(plain_row(self._texts[index], self.name), self.name)
        except RecordError:
            return 0, 0
        return sum(len(turn.text) for turn in turns), len(indices)


class HuggingFaceStream:
    """Streaming source over a `datasets.IterableDataset`. Arguments as `HuggingFaceRecords`."""

    def __init__(self, dataset: Any, name: str, image_folder: Path | None = None, follow_links: bool = False) -> None:
        if dataset.column_names is not None:
            check_columns(dataset.column_names, name)
        self._dataset = dataset.decode(False) if dataset.features else dataset
        self.name, self.image_folder, self.follow_links = name, image_folder, follow_links

    def records(self) -> Iterator[Callable[[], Conversation]]:
        """All records in order, parsed when called."""
        for index, row in enumerate(self._dataset):
            yield partial(parse_row, row, index, self.name, self.image_folder, self.follow_links)


def check_columns(columns: list[str], name: str) -> None:
    """Raises ValueError when no column has conversations."""
    if not set(columns) & set(TEXT_COLUMNS):
        raise ValueError(
            f"data set {name} has the columns {columns}; expected `messages` or `conversations`, with `images` or "
            "`image` (as HuggingFaceH4/llava-instruct-mix-vsft has them)"
        )


def plain_row(table: Any, where: str) -> dict[str, Any]:
    """The only row of an Arrow table; RecordError for what Python cannot hold."""
    try:
        row: dict[str, Any] = table.to_pylist()[0]
        return row
    except (ValueError, OverflowError) as error:  # bytes that are not UTF-8, a date that Python does not have
        raise RecordError(f"{where}: {error}") from error


def parse_row(
    row: Mapping[str, Any], index: int, name: str, image_folder: Path | None, follow_links: bool = False
) -> Conversation:
    """One row -> Conversation.

    Raises:
        RecordError: the row cannot be used; names data set, row and column.
    """
    where = f"data set {name}, row {index}"
    key = record_name(None if row.get("id") == "" else row.get("id"), index, where)
    where = f"{where} (id {key!r:.60})"
    turns, indices = _turns(row, where)
    column = next((c for c in IMAGE_COLUMNS if row.get(c) is not None), None)
    value = row[column] if column else []
    images = [
        image_source(image, image_folder, where, follow_links)
        for image in (value if isinstance(value, list) else [value])
    ]
    if indices and max(indices) >= len(images):
        raise RecordError(f"{where}: a turn shows image {max(indices)}, but there are {len(images)} in `images`")
    if set(range(len(images))) != set(indices):
        unused = sorted(set(range(len(images))) - set(indices))
        raise RecordError(f"{where}: {len(images)} image(s), but no turn shows number {unused[0]}")
    known = (*TEXT_COLUMNS, *IMAGE_COLUMNS, "id")
    return Conversation(key, tuple(images[i] for i in indices), turns, meta_of(row, known, where), where)


def _turns(row: Mapping[str, Any], where: str) -> tuple[tuple[Turn, ...], list[int]]:
    """Turns with `<image>` at the places of images, and which image each of these shows."""
    if row.get("conversations") is not None:
        turns = parse_turns(row["conversations"], where)
        return turns, list(range(sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)))
    messages = row.get("messages")
    if not isinstance(messages, list):
        raise RecordError(f"{where}: `messages` is {type(messages).__name__}; expected a list of messages")
    indices: list[int] = []
    return tuple(_message(m, indices, f"{where}: messages[{n}]") for n, m in enumerate(messages)), indices


def _message(message: Any, indices: list[int], where: str) -> Turn:
    """One message; appends the numbers of the images that it shows to `indices`."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise RecordError(f"{where}: expected the keys `role` and `content`, found {reprlib.repr(message)}")
    role, content = role_of(message["role"], f"{where}: role"), message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise RecordError(f"{where}: `content` is {type(content).__name__}; expected text or a list of parts")
    return Turn(role, "".join(_part(part, indices, where) for part in parts))


def _part(part: Any, indices: list[int], where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        indices.append(_number(part.get("index"), len(indices), where))
        return IMAGE_PLACEHOLDER
    if kind != "text" or not isinstance(part.get("text"), str):
        raise RecordError(f"{where}: expected parts of type text or image, found {reprlib.repr(part)}")
    text = checked_text(part["text"], f"{where}: `text`")
    indices.extend(range(len(indices), len(indices) + text.count(IMAGE_PLACEHOLDER)))
    return text


def _number(value: Any, following: int, where: str) -> int:
    """Which image a part shows: its `index`, or the next one."""
    if value is None:
        return following
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value != value // 1:
        raise RecordError(f"{where}: `index` of an image is {reprlib.repr(value)}; expected a number from 0 on")
    return int(value)


def image_source(value: Any, folder: Path | None, where: str, follow_links: bool) -> ImageSource:
    """An image as a row holds it: decoded, bytes, a path below `folder`, or {"bytes", "path"}."""
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        value = value["bytes"]
    if isinstance(value, Image.Image | bytes):
        return value
    path = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(path, str):
        raise RecordError(f"{where}: an image is {type(value).__name__}; expected an image, bytes or a path")
    if folder is None:
        raise RecordError(
            f"{where}: the image is a path ({path!r:.80}); set image_folder to the folder that holds the images"
        )
    return resolve_image_path(path, folder, where, follow_links)
