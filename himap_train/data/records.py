"""One form of record for every source: a conversation about no, one or several images.

Sources (LLaVA JSON, JSONL, Hugging Face data sets, the embedded scenes) yield `Conversation`; everything behind them
knows only this form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from PIL import Image

IMAGE_PLACEHOLDER = "<image>"
"""Marks the place of an image in a turn, as LLaVA's data does, whatever token the checkpoint uses for it."""


def blank(text: str) -> bool:
    """Whether nothing of a text can be seen: white space, zero-width and control characters alone."""
    return not any(character.isprintable() and not character.isspace() for character in text)


Role = Literal["user", "assistant", "system"]
ImageSource = Image.Image | Path | bytes
"""A decoded image, a file, or the bytes of a file. `encode` decodes the last two, so it happens in the workers."""


class RecordError(ValueError):
    """A record that cannot be used: malformed, or its image is missing or broken. Reported, skipped up to a limit."""


@dataclass(frozen=True)
class Turn:
    """What one side says. `<image>` in the text marks where an image belongs."""

    role: Role
    text: str


@dataclass(frozen=True)
class Conversation:
    """One record. The n-th `<image>` in the turns, read in order, stands for `images[n]`.

    Attributes:
        id: name of the record, used in messages and in the lists of evaluated answers.
        images: the images in the order of their places; empty for text-only.
        turns: an optional system turn, then user and assistant in turn.
        meta: further facts as strings; `meta["type"]` is the question type in the embedded data.
        place: where the record stands, such as "a.json, record 3 (id 'x')", for messages.
    """

    id: str
    images: tuple[ImageSource, ...]
    turns: tuple[Turn, ...]
    meta: dict[str, str] = field(default_factory=dict)
    place: str = field(default="", compare=False)

    @property
    def where(self) -> str:
        """What messages call the record: its place, or its name where it has none."""
        return self.place or f"sample {self.id!r}"

    @property
    def answer(self) -> str:
        """The last turn where it is the assistant's, the reference answer in evaluation; else empty."""
        return self.turns[-1].text if self.turns and self.turns[-1].role == "assistant" else ""


class Source(Protocol):
    """A map-style source of conversations. `__getitem__` raises RecordError for a record that cannot be used."""

    def __len__(self) -> int:
        """Number of records."""
        ...

    def __getitem__(self, index: int) -> Conversation:
        """The record at `index`, 0 <= index < len."""
        ...


def changes_with_epoch(source: object) -> bool:
    """Whether a source has other records in each epoch: then its attribute `epoch` must be set to the one wanted."""
    return hasattr(source, "epoch") and not getattr(source, "fixed", False)


def outline(source: Source, index: int) -> Conversation:
    """The record at `index`, without what its images hold where its source can; RecordError as the source raises it."""
    found: Conversation = getattr(source, "outline", source.__getitem__)(index)
    return found
