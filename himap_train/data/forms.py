"""Records as people write them, from a file or a data set -> Conversation.

LLaVA: `{"id": ..., "image": "a.jpg" | ["a.jpg", ...] | absent, "conversations": [{"from": "human" | "gpt", "value":
...}]}`; each `<image>` stands for the next image.

ms-swift, OpenAI and TRL: `{"messages": [{"role": ..., "content": text | [part, ...]}], "images": [...] | "image": ... |
absent}`, or `prompt` and `completion`. An image stands where a text says `<image>` or a part is `{"type": "image",
"index"?}`, the n-th of them being `images[n]`; a part may hold its image itself (`image`, `path`, `url`, OpenAI's
`image_url`, also as base64). Images of which no message says where come first, as in TRL.
"""

from __future__ import annotations

import base64
import json
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from himap_train.data.images import image_source
from himap_train.data.records import IMAGE_PLACEHOLDER, Conversation, RecordError, Role, Turn, blank
from himap_train.data.refusals import IMAGE_KEYS, refuse_other_tasks, refuse_unread

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_PROMPTED = {"prompt": "user", "completion": "assistant"}
_TURN = {"conversations": ("from", "value"), "messages": ("role", "content")}
"""Who speaks and what is said, in a turn of each."""
TURN_KEYS = tuple(_TURN)
TEXT_KEYS = (*TURN_KEYS, *_PROMPTED)
_SYSTEM = ("system", "system_prompt")
"""Where LLaMA-Factory and ms-swift keep what stands before the turns."""
_ANY_FORM = ("answer", "answers", "options", "choices")  # judged when they are needed
_TRAINED = ("loss", "weight")
_INLINE = ("image", "image_url", "url", "path")
_LONGEST_ID = 1000
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlist = 12


def has_turns(keys: Collection[str]) -> bool:
    """Whether records with these keys have what is said."""
    return not set(TURN_KEYS).isdisjoint(keys) or _PROMPTED.keys() <= set(keys)


def read_record(
    record: Mapping[str, Any], index: int, where: str, image_folder: Path | None, follow_links: bool = False
) -> Conversation:
    """Checks one record and gives it the common form; image files are not opened here.

    Args:
        record: with one of `TEXT_KEYS`.
        index: 0-based place in its source.
        where: the same for messages.
        image_folder: folder for images that are stored as paths; without it such images are refused.
        follow_links: see `resolve_image_path`.

    Raises:
        RecordError: it cannot be used (names record, key, what was found), or an image path leaves the folder.
    """
    refuse_other_tasks(record, where)
    key = _name(record.get("id"), index, where)
    where = f"{where} (id {key!r:.60})"
    turns, shown = turns_of(record, where)
    turns, images = (*_system(record, turns, where), *turns), stored_images(record)
    refuse_unread(record, images, turns, shown, where)
    numbers = {number for number in shown if isinstance(number, int)}
    if numbers and max(numbers) >= len(images):
        raise RecordError(f"{where}: a turn shows image {max(numbers)}, but there are {len(images)} in `images`")
    if unused := sorted(set(range(len(images))) - numbers):
        raise RecordError(f"{where}: {len(images)} image(s), but no turn shows number {unused[0]}")
    values = [images[image] if isinstance(image, int) else image for image in shown]
    sources = tuple(image_source(value, image_folder, where, follow_links) for value in values)
    return Conversation(key, sources, turns, _meta(record, where), where)


def turns_of(record: Mapping[str, Any], where: str) -> tuple[tuple[Turn, ...], list[Any]]:
    """Turns with `<image>` at the places of images, and for each of these its number in `images`, or the image.

    Raises:
        RecordError: no list of turns, or one that is not as expected.
    """
    if not has_turns(record):
        found = _SHORT.repr(sorted(record))
        raise RecordError(f"{where}: no key `conversations` and no `messages`, found the keys {found}")
    images, shown = len(stored_images(record)), list[Any]()
    messages = record.get("messages")
    if record.get("conversations") is not None or not record.keys() & {"messages", *_PROMPTED}:
        return _turns(record["conversations"], "conversations", shown, where), list(range(images))
    if messages is None and all(record.get(key) is not None for key in _PROMPTED):
        messages = [message for key, role in _PROMPTED.items() for message in _said(record[key], role)]
    turns = _turns(messages, "messages", shown, where)
    first = next((n for n, turn in enumerate(turns) if turn.role == "user"), None)
    if shown or first is None:
        return turns, shown
    asked = Turn("user", f"{IMAGE_PLACEHOLDER}\n" * images + turns[first].text)
    return (*turns[:first], asked, *turns[first + 1 :]), list(range(images))


def _system(record: Mapping[str, Any], turns: tuple[Turn, ...], where: str) -> tuple[Turn, ...]:
    """The system turn that stands beside the turns; none where they have the same."""
    key = next((key for key in _SYSTEM if isinstance(record.get(key), str) and not blank(record[key])), None)
    if key is None:
        return ()
    text = checked_text(record[key], f"{where}: `{key}`")
    own = [turn.text for turn in turns if turn.role == "system"]
    if own and [said.strip() for said in own] != [text.strip()]:
        raise RecordError(f"{where}: `{key}` is {text!r:.60}, and a system turn says {own[0]!r:.60}; leave one of them")
    return () if own else (Turn("system", text),)


def stored_images(record: Mapping[str, Any]) -> list[Any]:
    """`image` (or `images`) as a list; absent, null and [] are text-only."""
    value: Any = next((record[key] for key in IMAGE_KEYS if record.get(key) not in (None, [])), [])
    return value if isinstance(value, list) else [value]


def _said(value: Any, role: str) -> list[Any]:
    """The messages of a prompt or completion, which may be one text."""
    if isinstance(value, str):
        return [{"role": role, "content": value.strip()}]
    return value if isinstance(value, list) else [value]


def _turns(turns: Any, key: str, shown: list[Any], where: str) -> tuple[Turn, ...]:
    if not isinstance(turns, list):
        raise RecordError(f"{where}: `{key}` is {_kind(turns)}; expected a list of turns")
    return tuple(_turn(turn, *_TURN[key], shown, f"{where}: {key}[{number}]") for number, turn in enumerate(turns))


def _turn(turn: Any, who: str, what: str, shown: list[Any], where: str) -> Turn:
    """One turn; appends the images that it shows to `shown`."""
    if not isinstance(turn, Mapping) or not {who, what} <= set(turn):
        found = f"the keys {_SHORT.repr(sorted(turn))}" if isinstance(turn, Mapping) else _kind(turn)
        raise RecordError(f"{where}: expected the keys `{who}` and `{what}`, found {found}")
    speaker, content = turn[who], turn[what]
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise RecordError(f"{where}: `{who}` is {_SHORT.repr(speaker)}; expected one of {', '.join(ROLES)}")
    role = ROLES[speaker]
    if role == "assistant" and (unset := next((key for key in _TRAINED if turn.get(key) in (0, False)), None)):
        raise RecordError(f"{where}: `{unset}` says not to learn this answer, but all are learned; cut it off")
    if what == "content" and isinstance(content, list):
        return Turn(role, "".join(_part(part, shown, where) for part in content))
    return Turn(role, _text(content, shown, f"{where}: `{what}`"))


def _part(part: Any, shown: list[Any], where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("image", "image_url"):
        shown.append(_image(part, _following(shown), where))
        return IMAGE_PLACEHOLDER
    if kind != "text" or not isinstance(part.get("text"), str):
        raise RecordError(f"{where}: expected parts of type text or image, found {reprlib.repr(part)}")
    return _text(part["text"], shown, f"{where}: `text`")


def _text(value: Any, shown: list[Any], what: str) -> str:
    text, following = checked_text(value, what), _following(shown)
    shown.extend(range(following, following + text.count(IMAGE_PLACEHOLDER)))
    return text


def _following(shown: list[Any]) -> int:
    """The number of the next image that is not part of a message."""
    return sum(isinstance(image, int) for image in shown)


def _image(part: Mapping[str, Any], following: int, where: str) -> Any:
    """What a part shows: its own image, the one in `images` that its `index` names, or the next of those."""
    value = next((part[key] for key in _INLINE if part.get(key) is not None), None)
    if isinstance(value, Mapping) and "url" in value:
        value = value["url"]
    if isinstance(value, str) and value.startswith("data:"):
        head, _, packed = value.partition(",")
        try:
            return base64.b64decode("".join(packed.split()), validate=True)  # tools write it in lines
        except ValueError as error:
            raise RecordError(f"{where}: the image {head!r:.60} is not base64: {error}") from None
    if value is not None:
        return value
    value = part.get("index")
    if value is None:
        return following
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value != value // 1:
        raise RecordError(f"{where}: `index` of an image is {reprlib.repr(value)}; expected a number from 0 on")
    return int(value)


def _name(value: Any, index: int, where: str) -> str:
    """A record's `id` as text, its index where it has none; RecordError for what names nothing."""
    if value is None or value == "":
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


def _meta(record: Mapping[str, Any], where: str) -> dict[str, str]:
    """What else a record has, as text; lists, and answers and options that are no text, as JSON."""
    meta: dict[str, str] = {}
    for key, value in record.items():
        items = value if isinstance(value, list) else [value]
        any_form = key in _ANY_FORM and not isinstance(value, str | None)
        known = key in (*TEXT_KEYS, *IMAGE_KEYS, *_SYSTEM, "id")
        if any_form or (not known and all(isinstance(item, str | int | float) for item in items)):
            listed = any_form or items is value
            meta[key] = json.dumps(items, ensure_ascii=False, default=str) if listed else str(value)
            checked_text(key + meta[key], f"{where}: `{key!r:.60}`")
    return meta


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {_SHORT.repr(value)}"
