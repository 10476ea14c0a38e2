"""Files of LLaVA records or of `messages`: one JSON list, or JSONL, one record a line, which may be larger than memory.
Both may be packed by gzip; JSONL is then held in memory.

Records are kept as bytes, those of a list in memory and those of JSONL on the disk, and decoded when asked for: as
Python objects the 665k file would take gigabytes, and every worker process would come to hold its own copy (reference
counts write to the pages that a fork shares). So both are shuffled, split over workers and resumed alike.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from array import array
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from himap_train.data.forms import read_record, stored_images, turns_of
from himap_train.data.json_places import check_encoding, offsets, split_list, unpacked
from himap_train.data.records import Conversation, RecordError
from himap_train.structured import each_key_once

_TRIED_AT_OPENING = 10
_RECORD_BYTES = 2**26
"""A longer record is none of text and names of images; as Python objects it would take several times as much."""
_LINES = (".jsonl", ".ndjson")


def is_llava_file(path: Path) -> bool:
    """Whether a file is one of LLaVA records by its ending: json, jsonl or ndjson, also packed, also in capitals."""
    return _ending(path) in (".json", *_LINES)


def _ending(path: Path) -> str:
    """The last ending in small letters, without that of a packed file."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


class LlavaFile:
    """Source over a file of records in any of `forms`; in JSONL blank lines and CRLF are fine.

    Args:
        path: the file; JSONL where it is named *.jsonl or *.ndjson, otherwise a JSON list.
        image_folder: folder that image paths are relative to; by default the folder of the file.
        follow_links: images may lie elsewhere, where symbolic links in the image folder lead.

    Raises:
        FileNotFoundError: no such file, or no such image folder.
        ValueError: not JSON, not UTF-8, a damaged or absurdly large packed file, or none of the first records is in
            LLaVA's form.
    """

    def __init__(self, path: str | Path, image_folder: str | Path | None = None, follow_links: bool = False) -> None:
        self.path, self.follow_links = Path(path), follow_links
        self.image_folder = _existing_folder(image_folder, self.path)
        self._packed: bytes | None = None
        packed, lines = self.path.suffix.lower() == ".gz", _ending(self.path) in _LINES
        if packed or not lines:
            self._packed = unpacked(self.path) if packed else self.path.read_bytes()
        file = self._file if self._packed is None else io.BytesIO(self._packed)
        check_encoding(file.read(4), self.path)
        file.seek(0)
        if self._packed is None or lines:
            self._offsets = offsets(file)
        else:
            records = split_list(self._packed, self.path)
            self._offsets = array("q", accumulate(map(len, records), initial=0))
            self._packed = b"".join(records)
        self._check_format()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Conversation:
        where = f"{self.path.name}, record {index}"
        return read_record(self._record(index), index, where, self.image_folder, self.follow_links)

    def length_hint(self, index: int) -> tuple[int, int]:
        """(characters, images) of a record without checking it; (0, 0) for a broken line."""
        try:
            turns, shown = turns_of(self._record(index), self.path.name)
        except RecordError:
            return 0, 0
        return sum(len(turn.text) for turn in turns), len(shown)

    def first_image(self, index: int) -> str | None:
        """What a record names its first image by, or holds it in; None for a record without, or a broken one."""
        try:
            record = self._record(index)
            _, shown = turns_of(record, self.path.name)
        except RecordError:
            return None
        if not shown:
            return None
        first = stored_images(record)[shown[0]] if isinstance(shown[0], int) else shown[0]
        if isinstance(first, str):
            return first
        return hashlib.sha256(first if isinstance(first, bytes) else repr(first).encode()).hexdigest()

    def _record(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: record {index} of {len(self)}")
        start, end = self._offsets[index : index + 2]
        where, packed = f"{self.path.name}, record {index}", self._packed
        if end - start > _RECORD_BYTES:
            raise RecordError(
                f"{where}: {(end - start) / 1e6:.0f} MB, at most {_RECORD_BYTES / 1e6:.0f} MB are read; "
                "images belong in files of their own"
            )
        line = packed[start:end] if packed is not None else os.pread(self._file.fileno(), end - start, start)
        try:
            record = json.loads(line, object_pairs_hook=each_key_once)
        except RecursionError:
            raise RecordError(f"{where}: lists or objects within one another too deep to be read") from None
        except ValueError as error:  # of JSON, of UTF-8, or a number of more digits than Python takes
            whole = "; is the file one JSON list? Then name it *.json" if line.lstrip().startswith(b"[") else ""
            raise RecordError(f"{where}: not JSON ({error}){whole}") from error
        if not isinstance(record, dict):
            found = f"{type(record).__name__} {record!r:.60}"
            found += "; name a file that is one JSON list *.json" if isinstance(record, list) else ""
            raise RecordError(f"{where}: expected an object with `conversations` or `messages`, found {found}")
        return record

    @cached_property
    def _file(self) -> BinaryIO:
        """The open file. Forked workers share it, which is why it is read by place: they share its position too."""
        return self.path.open("rb")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    def _check_format(self) -> None:
        """Raises ValueError when none of the first records can be used: then the file is wrong, not a record."""
        if not len(self):
            raise ValueError(f"{self.path} holds no records; expected records with `conversations` or `messages`")
        first: RecordError | None = None
        for index in range(min(len(self), _TRIED_AT_OPENING)):
            try:
                self[index]
            except RecordError as error:
                first = first or error
            else:
                return
        raise ValueError(
            f"{self.path} is not in LLaVA's format, nor of `messages`, or goes with another image folder: {first}"
        ) from first


def _existing_folder(image_folder: str | Path | None, path: Path) -> Path:
    """The image folder, or that of the data file when none is given; checks that both exist."""
    if not path.is_file():
        what = "is not a file" if path.exists() else f"does not exist (current folder: {Path.cwd()})"
        raise FileNotFoundError(f"data file {path} {what}")
    folder = Path(image_folder) if image_folder is not None else path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"image_folder {folder} does not exist or is no folder; {path} needs it")
    return folder
