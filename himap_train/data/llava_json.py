"""A LLaVA-Instruct file: one JSON list of records.

The records are kept as packed bytes and decoded when asked for: as Python objects the 665k file would take gigabytes,
and every worker process would come to hold its own copy (reference counts write to the pages that a fork shares).
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from himap_train.data.llava_format import length_hint, parse_llava_record
from himap_train.data.records import Conversation, RecordError

_TRIED_AT_OPENING = 10


class LlavaJson:
    """Map-style source over a LLaVA JSON file.

    Args:
        path: the JSON file.
        image_folder: folder that image paths are relative to; by default the folder of the file.

    Raises:
        FileNotFoundError: no such file, or no such image folder.
        ValueError: not a JSON list of records in LLaVA's form.
    """

    def __init__(self, path: str | Path, image_folder: str | Path | None = None) -> None:
        self.path = Path(path)
        self.image_folder = existing_folder(image_folder, self.path)
        packed = [json.dumps(record).encode() for record in _load_list(self.path)]
        self._ends = np.cumsum([len(piece) for piece in packed], dtype=np.int64)
        self._bytes = b"".join(packed)
        check_format(self, self.path)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Conversation:
        return parse_llava_record(self._record(index), index, self.path.name, self.image_folder)

    def length_hint(self, index: int) -> tuple[int, int]:
        """(characters, images) of a record without checking it."""
        return length_hint(self._record(index))

    def _record(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: record {index} of {len(self)}")
        start = int(self._ends[index - 1]) if index else 0
        return json.loads(self._bytes[start : int(self._ends[index])])


def existing_folder(image_folder: str | Path | None, path: Path) -> Path:
    """The image folder, or that of the data file when none is given; checks that both exist."""
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist (current folder: {Path.cwd()})")
    folder = Path(image_folder) if image_folder is not None else path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"image_folder {folder} does not exist or is no folder; {path} needs it")
    return folder


def check_format(source: Any, path: Path) -> None:
    """Raises ValueError when none of the first records can be used: then it is the file that is wrong, not a record."""
    first: RecordError | None = None
    for index in islice(range(len(source)), _TRIED_AT_OPENING):
        try:
            source[index]
        except RecordError as error:
            first = first or error
        else:
            return
    if first is None:
        raise ValueError(f"{path} holds no records; expected records with `conversations`")
    raise ValueError(f"{path} is not in LLaVA's format, or goes with another image folder: {first}") from first


def _load_list(path: Path) -> list[Any]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); expected JSON") from error
    except json.JSONDecodeError as error:
        hint = "; one record a line is JSONL: name the file *.jsonl" if error.msg.startswith("Extra data") else ""
        raise ValueError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}{hint}"
        ) from error
    if not isinstance(records, list):
        found = f"the keys {sorted(records)[:8]}" if isinstance(records, dict) else type(records).__name__
        raise ValueError(f"{path}: expected a list of records, found {found}")
    return records
