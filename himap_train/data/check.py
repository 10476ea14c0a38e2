"""The data check before training: what there is, what will be truncated, what will be skipped and why.

Every record is parsed and its image files looked for; a part of them, spread evenly over the source, is also tokenized
and the headers of its images read. No image is decoded, so 665k records take a minute or two on a local disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from himap_train.data.encode import Encoder
from himap_train.data.images import AspectRatio, image_size
from himap_train.data.records import Conversation, RecordError, Source
from himap_train.data.report import DataReport
from himap_train.data.tokens import ConversationTokenizer, TokenizedExchange
from himap_train.data.turns import check_turns


def check_source(
    source: Source,
    processor: Any,
    max_length: int | None = None,
    limit: int | None = 2000,
    records: int | None = None,
    image_aspect_ratio: AspectRatio = "as_processor",
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
        name: of the source, for the report.

    Returns:
        The report. It raises nothing for broken records: see `DataReport.require_usable`.
    """
    size = len(source) if records is None else min(records, len(source))
    report = DataReport(name or type(source).__name__, max_length, size)
    spread = np.linspace(0, size - 1, size if limit is None else min(limit, size)).astype(int)
    examined = set(spread.tolist())
    encoder, tokenize = Encoder(processor, max_length, image_aspect_ratio), ConversationTokenizer(processor)
    for index in range(size) if hasattr(source, "length_hint") else sorted(examined):
        report.scanned += 1
        try:
            conversation = source[index]
            _count(conversation, report)
            if index in examined:
                report.examined += 1
                _examine(conversation, tokenize(conversation), encoder, report)
        except RecordError as error:
            report.skipped[index] = str(error)
    return report


def _count(conversation: Conversation, report: DataReport) -> None:
    """Counts a record; RecordError if its turns cannot be used or one of its image files is not there."""
    check_turns(conversation, training=True)
    for image in conversation.images:
        if isinstance(image, Path) and not image.is_file():
            image_size(image, f"sample {conversation.id!r}")
    report.images += len(conversation.images)
    report.text_only += not conversation.images
    report.multi_image += len(conversation.images) > 1
    report.answers += sum(turn.role == "assistant" for turn in conversation.turns)


def _examine(
    conversation: Conversation, exchanges: list[TokenizedExchange], encoder: Encoder, report: DataReport
) -> None:
    """Length and image tokens of one record, and whether it fits; RecordError if it cannot be used."""
    where = f"sample {conversation.id!r}"
    counts = [encoder.image_tokens(image_size(image, where)) for image in conversation.images]
    for count in counts:
        report.image_tokens[count] = report.image_tokens.get(count, 0) + 1
    ends = encoder.ends(exchanges, counts)
    report.lengths.append((conversation.id, ends[-1]))
    if encoder.fitting(conversation, ends) < len(ends):
        report.truncated.append(conversation.id)
