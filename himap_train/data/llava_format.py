"""One record in the form of LLaVA-Instruct-150K and 665K -> Conversation.

`{"id": ..., "image": "a.jpg" | ["a.jpg", ...] | absent, "conversations": [{"from": "human" | "gpt", "value": ...}]}`
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from himap_train.data.images import resolve_image_path
from himap_train.data.records import IMAGE_PLACEHOLDER, Conversation, RecordError, Role, Turn

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_OWN_KEYS = ("id", "image", "images", "conversations")


def parse_llava_record(record: Any, index: int, file: str, image_folder: Path) -> Conversation:
    """Checks one record and gives it the common form; image files are not opened here.

    Args:
        record: the decoded JSON value.
        index: 0-based place in the file.
        file: name of the file, for messages.
        image_folder: folder that image paths are relative to.

    Raises:
        RecordError: not the format (names file, record, key, what was found), or an image path that leaves the folder.
    """
    where = f"{file}, record {index}"
    if not isinstance(record, Mapping):
        raise RecordError(f"{where}: expected an object with `conversations`, found {_kind(record)}")
    name = str(record.get("id", index))
    where = f"{where} (id {name!r})"
    if "conversations" not in record:
        raise RecordError(f"{where}: no key `conversations`, found the keys {sorted(map(str, record))}")
    turns = parse_turns(record["conversations"], where)
    images = tuple(resolve_image_path(path, image_folder, where) for path in _image_names(record, where))
    return Conversation(name, images, turns, meta_of(record, _OWN_KEYS))


def meta_of(record: Mapping[str, Any], known: Iterable[str]) -> dict[str, str]:
    """What a record has beside its `known` keys, as text; lists (such as several accepted `answers`) as JSON."""
    meta: dict[str, str] = {}
    for key, value in record.items():
        items = value if isinstance(value, list) else [value]
        if key not in known and all(isinstance(item, str | int | float) for item in items):
            meta[key] = json.dumps(value) if items is value else str(value)
    return meta


def length_hint(record: Any) -> tuple[int, int]:
    """(characters of text, images) of a record, for grouping by length; (0, 0) for one that cannot be used."""
    if not isinstance(record, Mapping) or not isinstance(turns := record.get("conversations"), list):
        return 0, 0
    values = [turn.get("value") for turn in turns if isinstance(turn, Mapping)]
    texts = [value for value in values if isinstance(value, str)]
    return sum(map(len, texts)), sum(text.count(IMAGE_PLACEHOLDER) for text in texts)


def parse_turns(conversations: Any, where: str) -> tuple[Turn, ...]:
    """The value of `conversations` -> turns. Raises RecordError naming the turn and key that is not as expected."""
    if not isinstance(conversations, list):
        raise RecordError(f"{where}: `conversations` is {_kind(conversations)}; expected a list of turns")
    return tuple(_turn(turn, f"{where}: conversations[{number}]") for number, turn in enumerate(conversations))


def _turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        found = f"the keys {sorted(map(str, turn))}" if isinstance(turn, Mapping) else _kind(turn)
        raise RecordError(f"{where}: expected the keys `from` and `value`, found {found}")
    if turn["from"] not in ROLES:
        raise RecordError(f"{where}: `from` is {turn['from']!r}; expected one of {', '.join(ROLES)}")
    if not isinstance(turn["value"], str):
        raise RecordError(f"{where}: `value` is {_kind(turn['value'])}; expected text")
    return Turn(ROLES[turn["from"]], turn["value"])


def _image_names(record: Mapping[str, Any], where: str) -> list[str]:
    """`image` (or `images`) as a list; absent, null and [] are text-only."""
    key = "image" if "image" in record else "images"
    value = record.get(key)
    names = [] if value is None else value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str):
            raise RecordError(f"{where}: `{key}` is {_kind(value)}; expected a path or a list of paths")
    return names


def _kind(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
