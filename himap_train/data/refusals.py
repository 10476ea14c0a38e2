"""Records that mean something else than a conversation about images whose answers are learned: refused, by name.

Silently trained on, they would teach the answer that is not to be given, or about pictures that nobody was shown.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from himap_train.data.records import RecordError, Turn

IMAGE_KEYS = ("images", "image")
PAIR_KEYS = ("rejected", "rejected_response", "rejected_messages", "non_preferred_output")
"""Where TRL, LLaMA-Factory, ms-swift and OpenAI keep the answer that is not to be given."""
ONLY_CHOSEN = "only answers to be given are trained on: make each the last turn of a record that has no other"
_PICTURES = re.compile(
    r"(image|img|picture|photo)s?(_?(path|file|name|url|bytes|base64|b64|list|[0-9]+)s?)*", re.IGNORECASE
)
_NUMBERED = re.compile(r"(?<!base)(?<!b)(?<![0-9])[0-9]+$", re.IGNORECASE)
_OTHER_MEDIA = ("video", "audio")
_BOXES = re.compile(r"<(?:bbox|ref-object)>")
_NAMED_IN_TEXT = re.compile(r"<img>[^<>\n]+</img>")


def unread_pictures(
    keys: Collection[str], read: Collection[str] = IMAGE_KEYS, typed: Collection[str] = ()
) -> list[str]:
    """Keys that look like pictures, or are `typed` so, and are not `read`; beside one that is, only numbered ones."""
    beside = not set(read).isdisjoint(keys)
    looks = [key for key in keys if key not in read and (key in typed or _PICTURES.fullmatch(key))]
    return [key for key in looks if not beside or _NUMBERED.search(key)]


def refuse_other_tasks(record: Mapping[str, Any], where: str) -> None:
    """Raises RecordError for a record with an answer that is not to be given (DPO), or may be (KTO), or with tools."""
    if pair := next((key for key in PAIR_KEYS if record.get(key) is not None), None):
        raise RecordError(f"{where} is a preference pair (`{pair}`), as DPO trains on; {ONLY_CHOSEN}")
    for judgement in ("kto_tag", *(["label"] if "conversations" not in record else [])):
        if isinstance(record.get(judgement), bool):
            raise RecordError(f"{where} is judged good or bad (`{judgement}`), as KTO trains on; {ONLY_CHOSEN}")
    tools = record.get("tools")
    if (isinstance(tools, list) and any(isinstance(tool, Mapping) for tool in tools)) or (
        isinstance(tools, str) and tools.strip().strip("[]{} ")
    ):
        raise RecordError(f"{where} has `tools`, of which no turn would be told; write them into a system turn")


def refuse_unread(
    record: Mapping[str, Any], images: Sequence[Any], turns: Sequence[Turn], shown: Sequence[Any], where: str
) -> None:
    """Raises RecordError for pictures, boxes, videos or sound that a record has and no turn would get."""
    other = unread_pictures([name for name in record if record[name]])
    other += ["media"] * (isinstance(record.get("media"), list | dict) and bool(record["media"]) and not images)
    if other and (images or not shown or any(isinstance(image, int) for image in shown)):
        raise RecordError(
            f"{where}: images are read from `image` or `images`, found `{', '.join(other)}`: rename or remove it"
        )
    for kind in _OTHER_MEDIA if not shown else ():
        found = next((key for key in (kind, f"{kind}s") if isinstance(record.get(key), str | list | dict)), None)
        if found and record[found]:
            raise RecordError(f"{where} has `{found}` and no image, and only images are read; take the record out")
    for turn in turns:
        if record.get("objects") and (mark := _BOXES.search(turn.text)):
            raise RecordError(f"{where}: {mark[0]} stands for what `objects` holds; write that into the text itself")
        if named := _NAMED_IN_TEXT.search(turn.text):
            raise RecordError(f"{where}: {named[0]!r:.80} names an image; write <image>, and its path into `images`")
