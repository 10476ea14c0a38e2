"""Files of LLaVA records: one JSON list (LLaVA-Instruct), or JSONL, one record a line, which may be larger than memory.

Records are kept as bytes, those of a list in memory and those of JSONL on the disk, and decoded when asked for: as
Python objects the 665k file would take gigabytes, and every worker process would come to hold its own copy (reference
counts write to the pages that a fork shares). So both are shuffled, split over workers and resumed alike.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from himap_train.data.llava_format import length_hint, parse_llava_record
from himap_train.data.records import Conversation, RecordError

_TRIED_AT_OPENING = 10


class LlavaFile:
    """Map-style source over a file of LLaVA records; in JSONL blank lines and CRLF are fine.

    Args:
        path: the file; JSONL where it is named *.jsonl, otherwise a JSON list.
        image_folder: folder that image paths are relative to; by default the folder of the file.

    Raises:
        FileNotFoundError: no such file, or no such image folder.
        ValueError: not JSON, or none of the first records is in LLaVA's form.
    """

    def __init__(self, path: str | Path, image_folder: str | Path | None = None) -> None:
        self.path = Path(path)
        self.image_folder = _existing_folder(image_folder, self.path)
        self._packed: bytes | None = None
        if self.path.suffix == ".jsonl":
            self._offsets = _offsets(self._file)
        else:
            lines = [json.dumps(record).encode() for record in _load_list(self.path)]
            self._offsets, self._packed = _offsets(lines), b"".join(lines)
        self._check_format()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Conversation:
        return parse_llava_record(self._record(index), index, self.path.name, self.image_folder)

    def length_hint(self, index: int) -> tuple[int, int]:
        """(characters, images) of a record without checking it; (0, 0) for a broken line."""
        try:
            return length_hint(self._record(index))
        except RecordError:
            return 0, 0

    def _record(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: record {index} of {len(self)}")
        start, end = self._offsets[index : index + 2]
        packed = self._packed
        line = packed[start:end] if packed is not None else os.pread(self._file.fileno(), end - start, start)
        try:
            return json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RecordError(f"{self.path.name}, record {index}: not JSON ({error})") from error

    @cached_property
    def _file(self) -> BinaryIO:
        """The open file. Forked workers share it, which is why it is read by place: they share its position too."""
        return self.path.open("rb")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    def _check_format(self) -> None:
        """Raises ValueError when none of the first records can be used: then the file is wrong, not a record."""
        if not len(self):
            raise ValueError(f"{self.path} holds no records; expected records with `conversations`")
        first: RecordError | None = None
        for index in range(min(len(self), _TRIED_AT_OPENING)):
            try:
                self[index]
            except RecordError as error:
                first = first or error
            else:
                return
        raise ValueError(f"{self.path} is not in LLaVA's format, or goes with another image folder: {first}") from first


def _offsets(lines: Iterable[bytes]) -> array[int]:
    """The place where each line that is not blank begins, and the end: 8 bytes a record."""
    offsets, position = array("q"), 0
    for line in lines:
        if line.strip():
            offsets.append(position)
        position += len(line)
    offsets.append(position)
    return offsets


def _existing_folder(image_folder: str | Path | None, path: Path) -> Path:
    """The image folder, or that of the data file when none is given; checks that both exist."""
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist (current folder: {Path.cwd()})")
    folder = Path(image_folder) if image_folder is not None else path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"image_folder {folder} does not exist or is no folder; {path} needs it")
    return folder


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
