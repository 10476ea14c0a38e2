"""A conversation checked, and in the form that chat templates take."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from himap_train.data.records import IMAGE_PLACEHOLDER, Conversation, RecordError, Turn, blank

Message = dict[str, Any]


def check_turns(conversation: Conversation, training: bool) -> None:
    """Raises RecordError, naming the sample, for what no chat template can express or what teaches nothing.

    Args:
        conversation: from any source.
        training: at least one answer, and no empty one.
    """
    where = conversation.where
    turns = (
        conversation.turns[1:]
        if conversation.turns[:1] and conversation.turns[0].role == "system"
        else conversation.turns
    )
    for number, turn in enumerate(turns):
        expected = "assistant" if number % 2 else "user"
        if turn.role != expected:
            raise RecordError(
                f"{where}: turn {number} is of the {turn.role}, expected the {expected}: "
                "after an optional system turn, user and assistant must alternate, the user first"
            )
    if len(turns) < (2 if training else 1):
        what = "no question" if not turns else "a question but no answer"
        raise RecordError(f"{where} has {what}; {'training needs both' if training else 'there is nothing to answer'}")
    if training and any(blank(turn.text) for turn in turns if turn.role == "assistant"):
        raise RecordError(f"{where} has an empty answer; take the record out, or give it an answer")
    for kind in ("video", "audio"):
        if {kind, f"{kind}s"} & set(conversation.meta) and any(f"<{kind}>" in turn.text for turn in turns):
            raise RecordError(f"{where} shows a {kind}, and only images are read; take the record out")
    _check_image_places(conversation, where)


def to_messages(conversation: Conversation) -> list[Message]:
    """Hugging Face chat messages, every `<image>` a part of its own at its place."""
    return [{"role": turn.role, "content": _parts(turn)} for turn in conversation.turns]


def _check_image_places(conversation: Conversation, where: str) -> None:
    places = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in conversation.turns)
    if places != len(conversation.images):
        raise RecordError(
            f"{where}: {places} {IMAGE_PLACEHOLDER} in the conversation but {len(conversation.images)} image(s); "
            "there must be one for each"
        )
    if any(IMAGE_PLACEHOLDER in turn.text for turn in conversation.turns if turn.role != "user"):
        raise RecordError(f"{where}: {IMAGE_PLACEHOLDER} in a turn that is not the user's; only the user shows images")


def _parts(turn: Turn) -> list[dict[str, str]]:
    """Text and images in order. White space next to an image goes: the template sets images apart from text."""
    pieces = re.split(f"({re.escape(IMAGE_PLACEHOLDER)})", turn.text)
    if len(pieces) == 1:
        return [{"type": "text", "text": turn.text}]
    after_image = [False, *(piece == IMAGE_PLACEHOLDER for piece in pieces[:-1])]
    pieces = [piece.lstrip() if after else piece for piece, after in zip(pieces, after_image, strict=True)]
    last_text = max((i for i, piece in enumerate(pieces) if piece.strip() and piece != IMAGE_PLACEHOLDER), default=-1)
    if last_text >= 0:
        pieces[last_text] = pieces[last_text].rstrip()
    return [
        {"type": "image"} if piece == IMAGE_PLACEHOLDER else {"type": "text", "text": piece}
        for piece in pieces
        if piece.strip()
    ]


def first_exchanges(conversation: Conversation, exchanges: int, images: int) -> Conversation:
    """The first questions of a conversation with their answers, and the images that they show."""
    system = conversation.turns[0].role == "system"
    return replace(
        conversation, turns=conversation.turns[: system + 2 * exchanges], images=conversation.images[:images]
    )
