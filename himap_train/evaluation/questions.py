"""From a source of conversations to batches of questions, with little padding and each process its share.

The source is read in windows of some batches; inside a window conversations are sorted by length, so a batch holds
questions of like length and no more than a window is held.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch

from himap_train.data.records import IMAGE_PLACEHOLDER, Conversation, RecordError, Source, blank
from himap_train.evaluation.choice import json_list, options_of

WINDOW_BATCHES = 16


@dataclass(frozen=True)
class Question:
    """One conversation of the source and its place there, which no other has."""

    index: int
    conversation: Conversation

    @property
    def text(self) -> str:
        """The last user turn without its images: what is asked."""
        turns = self.conversation.turns
        last = next((turn.text for turn in reversed(turns) if turn.role == "user"), "")
        return last.replace(IMAGE_PLACEHOLDER, "").strip()

    @property
    def answers(self) -> list[str]:
        """The accepted answers: the record's `answers` where it has them, else its last assistant turn, else `answer`.

        `answers` is a text or number, or a list of such or of objects with the text under `answer` (VQAv2, VizWiz,
        OK-VQA). A whole number, where the record has options, is one of theirs from 0 (ScienceQA), given as its letter.

        Raises:
            RecordError: There is none, or they are something else.
        """
        meta = self.conversation.meta
        if "answers" not in meta and not blank(self.conversation.answer):
            return [self.conversation.answer]
        key = "answers" if "answers" in meta else "answer"
        answers = _listed(meta.get(key, ""))
        good = all(isinstance(answer, str | int | float) and answer == answer for answer in answers)  # not nan
        if not good or all(blank(str(answer)) for answer in answers):
            found = f"`{key}` is {meta[key]:.200}" if key in meta else "neither an assistant turn nor `answers`"
            raise RecordError(
                f"{self.conversation.where} has no answer to compare with: {found}; expected an answer, or a "
                'list of accepted ones or of {"answer": ...}'
            )
        numbered = {ascii_uppercase.index(letter): letter for letter in options_of(meta)}
        return [numbered.get(a, str(a)) if type(a) is int else str(a) for a in answers]

    @property
    def cluster(self) -> str:
        """What it is about: `meta["scene"]`, else its first image, else itself."""
        if "scene" in self.conversation.meta:
            return self.conversation.meta["scene"]
        if not self.conversation.images:
            return f"#{self.index}"
        image = self.conversation.images[0]
        if isinstance(image, Path):
            return str(image)
        content = image if isinstance(image, bytes) else image.tobytes()
        return hashlib.sha256(content).hexdigest()


def question_batches(
    source: Source, batch_size: int, limit: int | None, skip: Callable[[int, RecordError], None]
) -> Iterator[list[Question]]:
    """Batches of at most `batch_size` questions, each window's longest first.

    With `torch.distributed` each process gets its share. All shares of a window have the same number of samples, so
    that models whose weights are spread over processes stay in step: the last are filled by repeating the first ones.

    Args:
        source: Conversations.
        batch_size: Questions a batch.
        limit: Read so many records at most.
        skip: Called with index and error for a record that cannot be used.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    records = iter(range(source_length(source, limit)))
    while window := list(islice(records, WINDOW_BATCHES * batch_size * world)):
        window += [window[i % len(window)] for i in range(-len(window) % world)]
        questions = []
        for index in window[rank::world]:
            try:
                questions.append(Question(index, source[index]))
            except RecordError as error:
                skip(index, error)
        questions.sort(key=_length, reverse=True)
        while questions:
            batch, questions = questions[:batch_size], questions[batch_size:]  # decoded images of the past can go
            yield batch


def source_length(source: Source, limit: int | None) -> int:
    """Number of records that will be read."""
    if limit is not None and hasattr(source, "up_to"):  # rows of a benchmark, of which several questions may be made
        return int(source.up_to(limit))
    return len(source) if limit is None else min(len(source), limit)


def _listed(value: str) -> list[Any]:
    """Accepted answers as a fact of a record holds them: a text, or JSON. Empty where that is broken."""
    found = json_list(value) if value.startswith("[") else [value] if value else []
    if len(found) == 1 and isinstance(found[0], dict) and isinstance(found[0].get("answer"), list):
        return found[0]["answer"]  # a column of objects as `datasets` gives it: {"answer": [...], "answer_id": [...]}
    return [item.get("answer") if isinstance(item, dict) else item for item in found]


def _length(question: Question) -> tuple[int, int]:
    conversation = question.conversation
    return len(conversation.images), sum(len(turn.text) for turn in conversation.turns)
