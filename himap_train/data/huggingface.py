"""Hugging Face data sets: a folder on disk or a name on the hub, with image columns.

Understood columns: `messages`, or `prompt` and `completion`, or `conversations` (see `forms`), with `images` or
`image`, or neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from himap_train.data.forms import TEXT_KEYS, has_turns, read_record, turns_of
from himap_train.data.records import Conversation, RecordError
from himap_train.data.refusals import IMAGE_KEYS, ONLY_CHOSEN, PAIR_KEYS


class HuggingFaceRecords:
    """Source over a `datasets.Dataset`; images stay undecoded until `encode`.

    Args:
        dataset: the data set.
        name: for messages.
        image_folder: folder for images that are stored as paths; without it such images are refused.
        follow_links: see `resolve_image_path`.

    Raises:
        ValueError: no column with conversations, or one with the answers that are not to be given.
    """

    def __init__(self, dataset: Any, name: str, image_folder: Path | None = None, follow_links: bool = False) -> None:
        columns = dataset.column_names
        if pair := next((column for column in columns if column in PAIR_KEYS), None):
            raise ValueError(f"data set {name} has preference pairs (column `{pair}`), as DPO trains on; {ONLY_CHOSEN}")
        if not has_turns(columns):
            raise ValueError(
                f"data set {name} has the columns {columns}; expected `messages` or `conversations`, with `images` or "
                "`image` (as HuggingFaceH4/llava-instruct-mix-vsft has them), or `prompt` and `completion`"
            )
        typed = image_columns(dataset)
        if typed and not set(IMAGE_KEYS) & set(columns):
            raise ValueError(
                f"data set {name} holds images in {', '.join(typed)}; they are read from `images` or `image`: "
                "dataset.rename_column(...)"
            )
        self._dataset = dataset.with_format("arrow")  # rows as they are stored: images as {"bytes", "path"}
        self._texts = self._dataset.select_columns([c for c in TEXT_KEYS if c in columns])
        self._packed = json_columns(dataset)
        self._no_bytes = self._dataset.remove_columns([c for c in typed if c in IMAGE_KEYS])
        self.name, self.image_folder, self.follow_links = name, image_folder, follow_links

    def __len__(self) -> int:
        """Number of records."""
        return len(self._dataset)

    def __getitem__(self, index: int) -> Conversation:
        """Record `index`; RecordError if it cannot be used."""
        return self._read(index, {}, self._dataset)

    def outline(self, index: int) -> Conversation:
        """The same without reading the images that the data set holds: nothing stands for each."""
        held = self._dataset.num_columns > self._no_bytes.num_columns
        shown = {"images": [_stand_in(image) for image in self._images(index)]} if held else {}
        return self._read(index, shown, self._no_bytes)

    def _read(self, index: int, images: dict[str, Any], rows: Any) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: record {index} of {len(self)}")
        where = f"data set {self.name}, row {index}"
        row = plain_row(rows[index], where, self._packed) | images
        return read_record(row, index, where, self.image_folder, self.follow_links)

    def length_hint(self, index: int) -> tuple[int, int]:
        """(characters, images) of a record without reading its images; (0, 0) for one that cannot be used."""
        try:
            row = plain_row(self._texts[index], self.name, self._packed)
            turns, shown = turns_of({**row, "images": [None] * len(self._images(index))}, self.name)
        except RecordError:
            return 0, 0
        return sum(len(turn.text) for turn in turns), len(shown)

    def _images(self, index: int) -> list[Any]:
        """The images of a row as Arrow has them, without a copy of them."""
        row = self._dataset[index]
        values = [row.column(name)[0] for name in IMAGE_KEYS if name in row.column_names]
        first = next((value for value in values if value.is_valid), None)
        if first is None:
            return []
        return list(first) if hasattr(first.type, "value_type") else [first]


def _stand_in(image: Any) -> Any:
    """Nothing for what the data set holds itself, the path of what lies elsewhere."""
    if not image.is_valid:
        return None
    return b"" if image["bytes"].is_valid else {"bytes": None, "path": image["path"].as_py()}


def image_columns(dataset: Any) -> list[str]:
    """Columns that hold images, or lists of them, by their type."""
    return [column for column, kind in dataset.features.items() if _is_image(kind) or _is_image(_item(kind))]


def _is_image(kind: Any) -> bool:
    return type(kind).__name__ == "Image"


def _item(kind: Any) -> Any:
    """The type of a list's items; None where it is no list."""
    return kind[0] if isinstance(kind, list) else getattr(kind, "feature", None)


def json_columns(dataset: Any) -> dict[str, Any]:
    """Types of the columns of which some parts are stored as JSON: where rows differ in form, as texts beside lists of
    parts do.
    """
    return {column: kind for column, kind in dataset.features.items() if "Json(" in str(kind)}


def plain_row(table: Any, where: str, packed: Mapping[str, Any]) -> dict[str, Any]:
    """The only row of an Arrow table, what `json_columns` found read; RecordError for what Python cannot hold."""
    try:
        row: dict[str, Any] = table.to_pylist()[0]
        return row | {name: _unpacked(row[name], kind) for name, kind in packed.items() if name in row}
    except (ValueError, OverflowError) as error:  # bytes that are not UTF-8, a date that Python does not have
        raise RecordError(f"{where}: {error}") from error


def _unpacked(value: Any, kind: Any) -> Any:
    if value is None:
        return None
    if type(kind).__name__ == "Json":
        return json.loads(value) if isinstance(value, str) else value
    if isinstance(kind, dict):
        return {name: _unpacked(part, kind[name]) for name, part in value.items()}
    item = _item(kind)
    return value if item is None else [_unpacked(part, item) for part in value]
