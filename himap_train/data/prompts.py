"""Batches to generate from: prompts padded on the left, the reference answers beside them."""

from __future__ import annotations

from typing import Any

from himap_train.data.batches import pad_token_id_of
from himap_train.data.datasets import EncodedRecords
from himap_train.data.encode import Encoder
from himap_train.data.images import AspectRatio
from himap_train.data.loader import BatchLoader, Collate
from himap_train.data.records import Source
from himap_train.data.sampling import BatchOrder
from himap_train.data.skips import SkipLog


def prompt_loader(
    source: Source,
    processor: Any,
    batch_size: int,
    limit: int | None = None,
    max_length: int | None = None,
    image_aspect_ratio: AspectRatio = "as_processor",
    num_workers: int = 0,
    max_skipped: int | float = 0.01,
    num_replicas: int = 1,
    rank: int = 0,
) -> BatchLoader:
    """Everything up to the last answer of each conversation, in the order of the source.

    Args:
        source: the conversations.
        processor: the checkpoint's LlavaProcessor.
        batch_size: conversations in a batch.
        limit: only the first records.
        max_length: longer prompts are skipped; None for no limit.
        image_aspect_ratio: as in training.
        num_workers: processes that read images and tokenize.
        max_skipped: see SkipLog. What cannot be used is reported and left out.
        num_replicas: number of processes that share the work.
        rank: of this process.

    Returns:
        Loader of batches with `answers` and without `labels`.
    """
    encoder = Encoder(processor, max_length, image_aspect_ratio)
    dataset = EncodedRecords(source, encoder.encode_prompt, SkipLog(len(source), max_skipped, limit), limit)
    order = BatchOrder(len(dataset), batch_size, shuffle=False, num_replicas=num_replicas, rank=rank)
    collate = Collate(pad_token_id_of(processor.tokenizer), "left", keep_substitutes=False)
    return BatchLoader(dataset, order, collate, num_workers)
