"""Records with `messages`, as ms-swift, OpenAI and TRL write them, or with `prompt` and `completion` -> Conversation.

`{"messages": [{"role": ..., "content": text | [part, ...]}], "images": [...] | "image": ... | absent}`. An image stands
where a text says `<image>` or a part is `{"type": "image", "index"?}`, the n-th of them being `images[n]`; a part may
hold its image itself (`image`, `path`, `url`, OpenAI's `image_url`, also as base64). Images of which no message says
where come first, as in TRL.
"""

from __future__ import annotations

import base64
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from himap_train.data.images import image_source
from himap_train.data.llava_format import checked_text, meta_of, parse_turns, record_name, role_of
from himap_train.data.records import IMAGE_PLACEHOLDER, Conversation, RecordError, Turn

_PROMPTED = {"prompt": "user", "completion": "assistant"}
TURN_KEYS = ("messages", "conversations")
TEXT_KEYS = (*TURN_KEYS, *_PROMPTED)
IMAGE_KEYS = ("images", "image")
PAIR_KEYS = ("rejected", "rejected_response", "rejected_messages", "non_preferred_output")
"""Where TRL, LLaMA-Factory, ms-swift and OpenAI keep the answer that is not to be given."""
ONLY_CHOSEN = "only answers to be given are trained on: make each the last turn of a record that has no other"
_TRAINED = ("loss", "weight")
_INLINE = ("image", "image_url", "url", "path")


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
        RecordError: it cannot be used; names record and key.
    """
    key = record_name(None if record.get("id") == "" else record.get("id"), index, where)
    where = f"{where} (id {key!r:.60})"
    turns, shown = turns_of(record, where)
    images = _stored_images(record)
    numbers = {number for number in shown if isinstance(number, int)}
    if numbers and max(numbers) >= len(images):
        raise RecordError(f"{where}: a turn shows image {max(numbers)}, but there are {len(images)} in `images`")
    if unused := sorted(set(range(len(images))) - numbers):
        raise RecordError(f"{where}: {len(images)} image(s), but no turn shows number {unused[0]}")
    values = [images[image] if isinstance(image, int) else image for image in shown]
    sources = tuple(image_source(value, image_folder, where, follow_links) for value in values)
    return Conversation(key, sources, turns, meta_of(record, (*TEXT_KEYS, *IMAGE_KEYS, "id"), where), where)


def refuse_preferences(record: Mapping[str, Any], where: str) -> None:
    """Raises RecordError for a record that also has an answer not to be given (DPO), or may be one (KTO)."""
    if pair := next((key for key in PAIR_KEYS if record.get(key) is not None), None):
        raise RecordError(f"{where} is a preference pair (`{pair}`), as DPO trains on; {ONLY_CHOSEN}")
    for judgement in ("kto_tag", *(["label"] if "conversations" not in record else [])):
        if isinstance(record.get(judgement), bool):
            raise RecordError(f"{where} is judged good or bad (`{judgement}`), as KTO trains on; {ONLY_CHOSEN}")


def turns_of(record: Any, where: str) -> tuple[tuple[Turn, ...], list[Any]]:
    """Turns with `<image>` at the places of images, and for each of these its number in `images`, or the image.

    Raises:
        RecordError: no list of messages, or one that is not as expected.
    """
    if not isinstance(record, Mapping):
        raise RecordError(f"{where}: expected an object with `messages`, found {type(record).__name__}")
    if record.get("conversations") is not None:
        turns = parse_turns(record["conversations"], where)
        return turns, list(range(sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)))
    messages = record.get("messages")
    if messages is None and all(record.get(key) is not None for key in _PROMPTED):
        messages = [message for key, role in _PROMPTED.items() for message in _said(record[key], role)]
    if not isinstance(messages, list):
        raise RecordError(f"{where}: `messages` is {type(messages).__name__}; expected a list of messages")
    shown: list[Any] = []
    turns = tuple(_message(m, shown, f"{where}: messages[{n}]") for n, m in enumerate(messages))
    first = next((n for n, turn in enumerate(turns) if turn.role == "user"), None)
    if shown or first is None:
        return turns, shown
    images = len(_stored_images(record))
    asked = Turn("user", f"{IMAGE_PLACEHOLDER}\n" * images + turns[first].text)
    return (*turns[:first], asked, *turns[first + 1 :]), list(range(images))


def _stored_images(record: Mapping[str, Any]) -> list[Any]:
    value: Any = next((record[key] for key in IMAGE_KEYS if record.get(key) is not None), [])
    return value if isinstance(value, list) else [value]


def _said(value: Any, role: str) -> list[Any]:
    """The messages of a prompt or completion, which may be one text."""
    if isinstance(value, str):
        return [{"role": role, "content": value.strip()}]
    return value if isinstance(value, list) else [value]


def _message(message: Any, shown: list[Any], where: str) -> Turn:
    """One message; appends the images that it shows to `shown`."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise RecordError(f"{where}: expected the keys `role` and `content`, found {reprlib.repr(message)}")
    role, content = role_of(message["role"], f"{where}: role"), message["content"]
    if role == "assistant" and (unset := next((key for key in _TRAINED if message.get(key) in (0, False)), None)):
        raise RecordError(f"{where}: `{unset}` says not to learn this answer, but all are learned; cut it off")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise RecordError(f"{where}: `content` is {type(content).__name__}; expected text or a list of parts")
    return Turn(role, "".join(_part(part, shown, where) for part in parts))


def _part(part: Any, shown: list[Any], where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    following = sum(isinstance(image, int) for image in shown)
    if kind in ("image", "image_url"):
        shown.append(_image(part, following, where))
        return IMAGE_PLACEHOLDER
    if kind != "text" or not isinstance(part.get("text"), str):
        raise RecordError(f"{where}: expected parts of type text or image, found {reprlib.repr(part)}")
    text = checked_text(part["text"], f"{where}: `text`")
    shown.extend(range(following, following + text.count(IMAGE_PLACEHOLDER)))
    return text


def _image(part: Mapping[str, Any], following: int, where: str) -> Any:
    """What a part shows: its own image, the one in `images` that its `index` names, or the next of those."""
    value = next((part[key] for key in _INLINE if part.get(key) is not None), None)
    if isinstance(value, Mapping) and "url" in value:
        value = value["url"]
    if isinstance(value, str) and value.startswith("data:"):
        head, _, packed = value.partition(",")
        try:
            return base64.b64decode(packed, validate=True)
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
