"""LLaVA records, one a line, in a file that may be larger than memory.

An index of byte offsets (8 bytes a record) is built when first needed; a record is read from disk when asked for. So
the source is map-style: shuffled, split over workers and resumed like any other.
"""

from __future__ import annotations

import json
import os
from array import array
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from himap_train.data.llava_format import length_hint, parse_llava_record
from himap_train.data.llava_json import check_format, existing_folder
from himap_train.data.records import Conversation, RecordError


class Jsonl:
    """Map-style source over a JSONL file; blank lines and CRLF are fine.

    Args:
        path: the JSONL file.
        image_folder: folder that image paths are relative to; by default the folder of the file.

    Raises:
        FileNotFoundError: no such file, or no such image folder.
        ValueError: none of the first records is in LLaVA's form.
    """

    def __init__(self, path: str | Path, image_folder: str | Path | None = None) -> None:
        self.path = Path(path)
        self.image_folder = existing_folder(image_folder, self.path)
        self._file: BinaryIO | None = None
        self._file_owner = -1
        check_format(self, self.path)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Conversation:
        return parse_llava_record(self._record(index), index, self.path.name, self.image_folder)

    def length_hint(self, index: int) -> tuple[int, int]:
        """(characters, images) of a record without checking it; (0, 0) for a broken line."""
        try:
            return length_hint(self._record(index))
        except RecordError:
            return 0, 0

    @cached_property
    def _offsets(self) -> array[int]:
        offsets, position = array("q"), 0
        with self.path.open("rb") as file:
            for line in file:
                if line.strip():
                    offsets.append(position)
                position += len(line)
        return offsets

    def _record(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: record {index} of {len(self)}")
        file = self._open()
        file.seek(self._offsets[index])
        try:
            return json.loads(file.readline())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RecordError(f"{self.path.name}, record {index}: not JSON ({error})") from error

    def _open(self) -> BinaryIO:
        """The file of this process: a handle shared through a fork would share its read position."""
        if self._file is None or self._file_owner != os.getpid():
            self._file, self._file_owner = self.path.open("rb"), os.getpid()
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}
