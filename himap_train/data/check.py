"""The data check before training: what there is, what will be truncated, what will be skipped and why.

Every record is parsed and its image files looked for; a part of them, spread evenly over the source, is also tokenized
and the headers of its images read. No image is decoded, so 665k records take a minute or two on a local disk.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from himap_train.data.check_report import DataReport
from himap_train.data.encode import Encoder
from himap_train.data.images import image_header
from himap_train.data.mixing import MixedRecords
from himap_train.data.records import Conversation, RecordError, Source
from himap_train.data.sampling import BatchOrder, padding_waste
from himap_train.data.tokens import ConversationTokenizer, TokenizedExchange
from himap_train.data.turns import check_turns
from himap_train.models.families.base import AspectRatio


def check_source(
    source: Source,
    processor: Any,
    max_length: int | None = None,
    limit: int | None = 2000,
    records: int | None = None,
    image_aspect_ratio: AspectRatio = "as_processor",
    name: str = "",
    batch_size: int | None = None,
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
        batch_size: that of training, to tell how much of its batches will be padding.

    Returns:
        The report. It raises nothing for broken records: see `DataReport.require_usable`.
    """
    size = len(source) if records is None else min(records, len(source))
    report = DataReport(name or type(source).__name__, max_length, size)
    report.sets = str(source) if isinstance(source, MixedRecords) else ""
    spread = np.linspace(0, size - 1, size if limit is None else min(limit, size)).astype(int)
    examined = Counter((source.draw(0, 0)[spread] if isinstance(source, MixedRecords) else spread).tolist())
    stored = getattr(source, "stored", lambda _: hasattr(source, "length_hint"))
    encoder = Encoder(processor, max_length, image_aspect_ratio)
    tokenize = ConversationTokenizer(processor, max_length)
    for index in (i for i in range(size) if i in examined or stored(i)):
        report.scanned += 1
        try:
            conversation = source[index]
            _count(conversation, report)
            for _ in range(examined[index]):  # as often as training would have it among so many
                report.examined += 1
                _examine(conversation, tokenize(conversation), encoder, report)
        except RecordError as error:
            report.skipped[index] = str(error)
    if batch_size and report.lengths:
        report.padding = batch_size, *_padding(report, batch_size)
    return report


def _padding(report: DataReport, batch_size: int) -> tuple[float, float]:
    """Share of padding in batches of the examined records, shuffled and grouped by length."""
    lengths = np.array([min(tokens, report.max_length or tokens) for _, tokens in report.lengths])
    orders = [BatchOrder(len(lengths), batch_size, by) for by in (None, lengths)]
    plain, grouped = (padding_waste(lengths, order.batches(0)) for order in orders)
    return plain, grouped


def _count(conversation: Conversation, report: DataReport) -> None:
    """Counts a record; RecordError if its turns cannot be used or one of its image files is not there."""
    check_turns(conversation, training=True)
    for image in conversation.images:
        if isinstance(image, Path) and not os.path.isfile(image):  # Path's own raises for a locked folder
            image_header(image, conversation.where)
    report.images += len(conversation.images)
    report.text_only += not conversation.images
    report.multi_image += len(conversation.images) > 1
    report.answers += sum(turn.role == "assistant" for turn in conversation.turns)


def _examine(
    conversation: Conversation, exchanges: list[TokenizedExchange], encoder: Encoder, report: DataReport
) -> None:
    """Length and image tokens of one record, and whether it fits; RecordError if it cannot be used."""
    headers = [image_header(image, conversation.where) for image in conversation.images]
    counts = encoder.image_tokens(*(size for size, _ in headers))
    for mode in (mode for _, mode in headers if mode):
        report.modes[mode] = report.modes.get(mode, 0) + 1
    for count in counts:
        report.image_tokens[count] = report.image_tokens.get(count, 0) + 1
    for exchange in exchanges:
        report.token_ids.update(exchange.prompt, exchange.answer)
        report.answer_ids.update(exchange.answer)
    ends = encoder.ends(exchanges, counts)
    report.lengths.append((conversation.id, ends[-1]))
    if encoder.fitting(conversation, ends) < len(ends):
        report.truncated.append(conversation.id)
