"""Hugging Face data sets: a folder on disk or a name on the hub, with image columns.

Understood columns: `messages`, or `prompt` and `completion`, or `conversations` (see `forms`), with `images` or
`image`, or neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from himap_train.data.forms import IMAGE_KEYS, ONLY_CHOSEN, PAIR_KEYS, TEXT_KEYS, has_turns, read_record, turns_of
from himap_train.data.records import Conversation, RecordError


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
        self.name, self.image_folder, self.follow_links = name, image_folder, follow_links

    def __len__(self) -> int:
        """Number of records."""
        return len(self._dataset)

    def __getitem__(self, index: int) -> Conversation:
        """Record `index`; RecordError if it cannot be used."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: record {index} of {len(self)}")
        where = f"data set {self.name}, row {index}"
        return read_record(plain_row(self._dataset[index], where), index, where, self.image_folder, self.follow_links)

    def length_hint(self, index: int) -> tuple[int, int]:
        """(characters, images) of a record without reading its images; (0, 0) for one that cannot be used."""
        try:
            row = plain_row(self._texts[index], self.name)
            turns, shown = turns_of({**row, "images": [None] * self._images(index)}, self.name)
        except RecordError:
            return 0, 0
        return sum(len(turn.text) for turn in turns), len(shown)

    def _images(self, index: int) -> int:
        """How many images a row has, without a copy of them."""
        row = self._dataset[index]
        values = [row.column(name)[0] for name in IMAGE_KEYS if name in row.column_names]
        return next((len(value) if hasattr(value.type, "value_type") else 1 for value in values if value.is_valid), 0)


def image_columns(dataset: Any) -> list[str]:
    """Columns that hold images, or lists of them, by their type."""
    return [column for column, kind in dataset.features.items() if "Image(" in str(kind)]


def plain_row(table: Any, where: str) -> dict[str, Any]:
    """The only row of an Arrow table; RecordError for what Python cannot hold."""
    try:
        row: dict[str, Any] = table.to_pylist()[0]
        return row
    except (ValueError, OverflowError) as error:  # bytes that are not UTF-8, a date that Python does not have
        raise RecordError(f"{where}: {error}") from error
