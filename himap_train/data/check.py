"""The data check before training: what there is, what will be truncated, what will be skipped and why.

Every record is parsed and its image files looked for; a part of them, spread evenly over the source, is also tokenized
and the headers of its images read. No image is decoded, so 665k records take a minute or two on a local disk.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from himap_train.data.encode import Encoder
from himap_train.data.images import image_size
from himap_train.data.mixing import MixedRecords
from himap_train.data.records import Conversation, RecordError, Source, outline
from himap_train.data.skips import TooManySkippedError, skip_limit
from himap_train.data.tokens import ConversationTokenizer, TokenizedExchange
from himap_train.data.turns import check_turns
from himap_train.models.families.base import AspectRatio

_SHOWN = 10


@dataclass
class DataReport:
    """Findings of `check_source`.

    Attributes:
        name: name of the source.
        max_length: that lengths were compared with; None for no limit.
        records: records in the source (or in its first part, if the check was limited to that).
        scanned: how many of them were parsed and their image files looked for.
        examined: how many of these were tokenized and the headers of their images read.
        images: images of the scanned records.
        text_only: scanned records without image.
        multi_image: scanned records with several.
        answers: answers in the scanned records.
        image_tokens: tokens an image -> number of examined images that take so many.
        lengths: (id, tokens) of the examined records, image tokens included.
        prompts: (image tokens, other tokens) of those that are used, up to the last answer that fits.
        token_ids: those of the examined records.
        answer_ids: tokens of their answers -> how often.
        truncated: ids of examined records that lose questions at the end.
        skipped: id or index of a record that cannot be used -> why.
        sets: of a mix, how many samples of each set an epoch takes.
    """

    name: str
    max_length: int | None
    records: int
    scanned: int = 0
    examined: int = 0
    images: int = 0
    text_only: int = 0
    multi_image: int = 0
    answers: int = 0
    image_tokens: dict[int, int] = field(default_factory=dict)
    lengths: list[tuple[str, int]] = field(default_factory=list)
    prompts: list[tuple[int, int]] = field(default_factory=list)
    token_ids: set[int] = field(default_factory=set)
    answer_ids: Counter[int] = field(default_factory=Counter)
    truncated: list[str] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)
    sets: str = ""

    def percentile(self, percent: float) -> int:
        """Tokens that this percentage of the examined records does not exceed; 0 if none was examined."""
        return int(np.percentile([n for _, n in self.lengths], percent, method="higher")) if self.lengths else 0

    def prompt_tokens(self) -> tuple[int, int] | None:
        """Image tokens and other tokens of a prompt with images on average: what a prefill runs, and so what a budget
        is of. Of any prompt where none has images; None where none was examined.
        """
        if not self.prompts:
            return None
        image, text = np.mean([prompt for prompt in self.prompts if prompt[0]] or self.prompts, axis=0)
        return round(image), round(text)

    def longest(self, count: int = 5) -> list[tuple[str, int]]:
        """(id, tokens) of the longest examined records, the longest first."""
        return sorted(dict(self.lengths).items(), key=lambda item: -item[1])[:count]

    def require_usable(self, max_skipped: int | float) -> None:
        """Raises TooManySkippedError when training would end for its broken records; see SkipLog for `max_skipped`."""
        limit = skip_limit(self.records, max_skipped)
        if len(self.skipped) > limit:
            raise TooManySkippedError(
                f"{self.name}: {len(self.skipped)} of {self.scanned} records cannot be used, max_skipped allows "
                f"{limit}.\n{self._problems()}\nRepair the data or set a larger max_skipped"
            )

    def __str__(self) -> str:
        tokens = ", ".join(str(n) for n in sorted(self.image_tokens)) or "none"
        over = len(self.truncated)
        lines = [
            f"data {self.name}: {self.records} records, {self.scanned} looked through, {self.examined} tokenized",
            *([self.sets] if self.sets else []),
            f"  images       {self.images}; records with several {self.multi_image}, text-only {self.text_only}",
            f"  image tokens {tokens} an image",
            f"  answers      {self.answers}",
            f"  length       median {self.percentile(50)}, 95 % up to {self.percentile(95)}, "
            f"longest {self.percentile(100)} tokens (max_length {self.max_length})",
            "  longest      " + ", ".join(f"{name!r} {tokens}" for name, tokens in self.longest()),
            f"  truncated    {over} of {self.examined}: they lose their last questions with the answers",
            f"  skipped      {len(self.skipped)} of {self.scanned}",
        ]
        return "\n".join(lines + ([self._problems()] if self.skipped else []))

    def _problems(self) -> str:
        shown = [f"    - {reason}" for reason in list(self.skipped.values())[:_SHOWN]]
        more = len(self.skipped) - len(shown)
        return "\n".join(shown + ([f"    and {more} more"] if more else []))


def spread_over(source: Source, size: int, limit: int | None) -> np.ndarray:
    """Indices of at most `limit` of the first `size` samples that an epoch takes, spread evenly over them."""
    places = np.linspace(0, size - 1, size if limit is None else min(limit, size)).astype(int)
    return source.draw(0, 0)[places] if isinstance(source, MixedRecords) else places


def check_source(
    source: Source,
    processor: Any,
    max_length: int | None = None,
    limit: int | None = 2000,
    records: int | None = None,
    image_aspect_ratio: AspectRatio | None = None,
    name: str = "",
) -> DataReport:
    """Checks a source.

    Args:
        source: the conversations. One that makes its records (no `length_hint`) is only looked at in `limit` places.
        processor: the checkpoint's LlavaProcessor.
        max_length: most tokens of a sample, as in training.
        limit: how many records to tokenize; None for all.
        records: only the first records of the source, as `train_limit` in training.
        image_aspect_ratio: as in training.
        name: name of the source, for the report.

    Returns:
        The report. It raises nothing for broken records: see `DataReport.require_usable`.
    """
    size = len(source) if records is None else min(records, len(source))
    report = DataReport(name or type(source).__name__, max_length, size)
    report.sets = str(source) if isinstance(source, MixedRecords) else ""
    examined = Counter(spread_over(source, size, limit).tolist())
    stored = getattr(source, "stored", lambda _: hasattr(source, "length_hint"))
    encoder = Encoder(processor, max_length, image_aspect_ratio)
    tokenize = ConversationTokenizer(processor, max_length)
    for index in (i for i in range(size) if i in examined or stored(i)):
        report.scanned += 1
        try:
            conversation = source[index] if index in examined else outline(source, index)
            _count(conversation, report)
            for _ in range(examined[index]):  # as often as training would have it among so many
                report.examined += 1
                _examine(conversation, tokenize(conversation), encoder, report)
        except RecordError as error:
            report.skipped[index] = str(error)
    return report


def _count(conversation: Conversation, report: DataReport) -> None:
    """Counts a record; RecordError if its turns cannot be used or one of its image files is not there."""
    check_turns(conversation, training=True)
    for image in conversation.images:
        if isinstance(image, Path) and not os.path.isfile(image):  # Path's own raises for a locked folder
            image_size(image, conversation.where)
    report.images += len(conversation.images)
    report.text_only += not conversation.images
    report.multi_image += len(conversation.images) > 1
    report.answers += sum(turn.role == "assistant" for turn in conversation.turns)


def _examine(
    conversation: Conversation, exchanges: list[TokenizedExchange], encoder: Encoder, report: DataReport
) -> None:
    """Length and image tokens of one record, and whether it fits; RecordError if it cannot be used."""
    places = encoder.places(conversation)
    counts = [place.count(encoder.processor.image_token_id) for place in places]
    for count in counts:
        report.image_tokens[count] = report.image_tokens.get(count, 0) + 1
    for exchange in exchanges:
        report.token_ids.update(exchange.prompt, exchange.answer)
        report.answer_ids.update(exchange.answer)
    ends = encoder.ends(exchanges, places)
    report.lengths.append((conversation.id, ends[-1]))
    kept = encoder.fitting(conversation, ends)
    image = sum(counts[: encoder.shown(exchanges[:kept])])
    report.prompts.append((image, ends[kept - 1] - len(exchanges[kept - 1].answer) - image))
    if kept < len(ends):
        report.truncated.append(conversation.id)
