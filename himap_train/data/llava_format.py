"""One record in the form of LLaVA-Instruct-150K and 665K -> Conversation.

`{"id": ..., "image": "a.jpg" | ["a.jpg", ...] | absent, "conversations": [{"from": "human" | "gpt", "value": ...}]}`
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from himap_train.data.images import resolve_image_path
from himap_train.data.records import Conversation, RecordError, Role, Turn

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_OWN_KEYS = ("id", "image", "images", "conversations")
_ANY_FORM = ("answer", "answers", "options", "choices")  # judged when they are needed
_LONGEST_ID = 1000
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlist = 12


def parse_llava_record(
    record: Any, index: int, file: str, image_folder: Path, follow_links: bool = False
) -> Conversation:
    """Checks one record and gives it the common form; image files are not opened here.

    Args:
        record: the decoded JSON value.
        index: 0-based place in the file.
        file: name of the file, for messages.
        image_folder: folder that image paths are relative to.
        follow_links: see `resolve_image_path`.

    Raises:
        RecordError: not the format (names file, record, key, what was found), or an image path that leaves the folder.
    """
    where = f"{file}, record {index}"
    if not isinstance(record, Mapping):
        raise RecordError(f"{where}: expected an object with `conversations`, found {_kind(record)}")
    name = record_name(record.get("id"), index, where)
    where = f"{where} (id {name!r:.60})"
    if "conversations" not in record:
        raise RecordError(f"{where}: no key `conversations`, found the keys {_SHORT.repr(sorted(record))}")
    turns = parse_turns(record["conversations"], where)
    names = _image_names(record, where)
    images = tuple(resolve_image_path(path, image_folder, where, follow_links) for path in names)
    return Conversation(name, images, turns, meta_of(record, _OWN_KEYS, where), where)


def record_name(value: Any, index: int, where: str) -> str:
    """A record's `id` as text, its index where it has none; RecordError for what names nothing."""
    if value is None:
        return str(index)
    if not isinstance(value, str | int | float):
        raise RecordError(f"{where}: `id` is {_kind(value)}; expected text or a number")
    if len(name := checked_text(str(value), f"{where}: `id`")) > _LONGEST_ID:
        raise RecordError(f"{where}: `id` has {len(name)} characters; at most {_LONGEST_ID} are taken")
    return name


def checked_text(value: Any, what: str) -> str:
    """The value itself where it is text that can be written down; RecordError that begins with `what` otherwise."""
    if not isinstance(value, str):
        raise RecordError(f"{what} is {_kind(value)}; expected text")
    try:
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{what} has half a character, {value[error.start]!r} at {error.start}, as where an emoji was cut in two; "
            "take it out"
        ) from None
    return value


def meta_of(record: Mapping[str, Any], known: Iterable[str], where: str) -> dict[str, str]:
    """What a record has beside its `known` keys, as text; lists, and answers and options that are no text, as JSON.

    Raises:
        RecordError: text with half a character.
    """
    meta: dict[str, str] = {}
    for key, value in record.items():
        items = value if isinstance(value, list) else [value]
        any_form = key in _ANY_FORM and not isinstance(value, str | None)
        if any_form or (key not in known and all(isinstance(item, str | int | float) for item in items)):
            listed = any_form or items is value
            meta[key] = json.dumps(items, ensure_ascii=False, default=str) if listed else str(value)
            checked_text(key + meta[key], f"{where}: `{key!r:.60}`")
    return meta


def parse_turns(conversations: Any, where: str) -> tuple[Turn, ...]:
    """The value of `conversations` -> turns. Raises RecordError naming the turn and key that is not as expected."""
    if not isinstance(conversations, list):
        raise RecordError(f"{where}: `conversations` is {_kind(conversations)}; expected a list of turns")
    return tuple(_turn(turn, f"{where}: conversations[{number}]") for number, turn in enumerate(conversations))


def _turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        found = f"the keys {_SHORT.repr(sorted(turn))}" if isinstance(turn, Mapping) else _kind(turn)
        raise RecordError(f"{where}: expected the keys `from` and `value`, found {found}")
    return Turn(role_of(turn["from"], f"{where}: `from` is"), checked_text(turn["value"], f"{where}: `value`"))


def role_of(value: Any, what: str) -> Role:
    """Who speaks; RecordError that begins with `what` for nobody known."""
    if not isinstance(value, str) or value not in ROLES:
        raise RecordError(f"{what} {_SHORT.repr(value)}; expected one of {', '.join(ROLES)}")
    return ROLES[value]


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
    return f"{type(value).__name__} {_SHORT.repr(value)}"
