"""From the bytes of a JSON or JSONL file, packed or not, to the places of its records, without decoding them for good.

What is wrong with one record is left to the reading of that record.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from array import array
from pathlib import Path
from typing import BinaryIO

_UNPACKED_BYTES, _UNPACKED_TIMES = 2**26, 50  # what a packed file may grow to: the larger; records shrink by ten or so
_PIECE = 2**20
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_PARTS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)


def offsets(file: BinaryIO | io.BytesIO) -> array[int]:
    """The place where each line that is not blank begins, and the end: 8 bytes a record. Holds no long line."""
    offsets, position = array("q"), 0
    start: int | None = 0
    while piece := file.readline(_PIECE):
        if start is not None and piece.strip():
            offsets.append(start)
            start = None
        position += len(piece)
        if piece.endswith(b"\n"):
            start = position
    offsets.append(position)
    return offsets


def unpacked(path: Path) -> bytes:
    """Content of a file packed by gzip, as far as it may grow."""
    limit = max(_UNPACKED_BYTES, _UNPACKED_TIMES * path.stat().st_size)
    try:
        with gzip.open(path) as file:
            content = file.read(limit + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is cut off, damaged or not packed by gzip: {error}") from error
    if len(content) > limit:
        raise ValueError(
            f"{path} holds over {limit / 1e6:.0f} MB in {path.stat().st_size / 1e6:.1f} MB, more than records of text "
            "shrink by; if it is right, unpack it (gunzip) and name the unpacked file"
        )
    return content


def check_encoding(start: bytes, path: Path) -> None:
    """Raises ValueError where the first bytes of a file are not those of JSON in UTF-8."""
    encoding = json.detect_encoding(start)
    if not encoding.startswith("utf-8"):
        raise ValueError(
            f"{path} is not UTF-8 text but seems to be {encoding.upper()}; convert it: "
            f"iconv -f {encoding.upper()} -t UTF-8"
        )


def split_list(content: bytes, path: Path) -> list[bytes]:
    """The records of a JSON list as they are written.

    One that Python cannot decode (too deep, a number of thousands of digits, not UTF-8) is left to the reading of that
    record.

    Raises:
        ValueError: not JSON, or no list.
    """
    text = content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    try:
        at = _behind_space(text, 0)
        if text[at : at + 1] != "[":
            records = json.loads(text, parse_int=float)  # of any number of digits
            found = f"the keys {sorted(records)[:8]!r:.300}" if isinstance(records, dict) else type(records).__name__
            raise ValueError(f"{path}: expected a list of records, found {found}")
        places = list[tuple[int, int]]()
        at = _behind_space(text, at + 1)
        while text[at : at + 1] != "]":
            places.append((at, _end_of_value(text, at)))
            at = _behind_space(text, places[-1][1])
            if text[at : at + 1] == ",":
                at = _behind_space(text, at + 1)
                if text[at : at + 1] == "]":
                    raise json.JSONDecodeError("a comma behind the last record", text, at)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        if (rest := _behind_space(text, at + 1)) < len(text):
            raise json.JSONDecodeError("Extra data", text, rest)
    except json.JSONDecodeError as error:
        hint = "; one record a line is JSONL: name the file *.jsonl" if error.msg.startswith("Extra data") else ""
        raise ValueError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}{hint}"
        ) from error
    except RecursionError:
        raise ValueError(f"{path}: expected a list of records, found objects within one another too deep") from None
    return [text[start:end].encode("utf-8", "surrogateescape") for start, end in places]


def _behind_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _end_of_value(text: str, at: int) -> int:
    """Where the JSON value that begins at `at` ends."""
    try:
        return _DECODER.raw_decode(text, at)[1]
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError):
        pass
    depth = 0
    for part in _PARTS.finditer(text, at):
        depth += (part[0] in "[{") - (part[0] in "]}")
        if depth < 0 or (depth == 0 and part[0] == ","):
            return part.start()
        if depth == 0:
            return part.end()
    return len(text)
