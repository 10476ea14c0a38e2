"""How long each record will be in tokens, estimated from its number of characters and images: enough to group by."""

from __future__ import annotations

from typing import Any

import numpy as np

from himap_train.data.encode import Encoder
from himap_train.data.images import image_size
from himap_train.data.records import IMAGE_PLACEHOLDER, RecordError, Source

_PROBES = 64  # records that are tokenized to learn how many characters make a token


def estimate_lengths(source: Source, encoder: Encoder, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Estimated tokens of the first `limit` records, and how many of them are image tokens.

    Args:
        source: with a method `length_hint(index) -> (characters, images)` no record is parsed and no image touched.
        encoder: for the tokenizer and the image tokens.
        limit: only that many records.

    Returns:
        Tokens (n,) int64, image tokens included, at most the encoder's max_length; 0 for records that cannot be used.
        Image tokens (n,) int64.
    """
    size = len(source) if limit is None else min(limit, len(source))
    hints = np.array([hint(source, index) for index in range(size)], dtype=np.int64).reshape(size, 2)
    per_token, image_tokens = _probe(source, encoder, size)
    characters = hints[:, 0] - hints[:, 1] * len(IMAGE_PLACEHOLDER)
    in_images = hints[:, 1] * image_tokens
    lengths = np.ceil(characters / per_token).astype(np.int64) + in_images
    return lengths if encoder.max_length is None else lengths.clip(max=encoder.max_length), in_images


def hint(source: Any, index: int) -> tuple[int, int]:
    """(characters, images) of a record, made where the source cannot tell without; (0, 0) where it cannot be used."""
    if hasattr(source, "length_hint"):
        found: tuple[int, int] = source.length_hint(index)
        return found
    try:
        conversation = source[index]
    except RecordError:
        return 0, 0
    return sum(len(turn.text) for turn in conversation.turns), len(conversation.images)


def _probe(source: Source, encoder: Encoder, size: int) -> tuple[float, int]:
    """(characters a token, tokens an image) over records spread over the source."""
    characters = tokens = image_tokens = 0
    tokenizer = encoder.processor.tokenizer
    for index in np.unique(np.linspace(0, size - 1, min(size, _PROBES)).astype(int)):
        try:
            conversation = source[int(index)]
            texts = [turn.text.replace(IMAGE_PLACEHOLDER, "") for turn in conversation.turns]
            characters += sum(map(len, texts))
            tokens += sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
            sizes = (image_size(image, conversation.id) for image in conversation.images)
            image_tokens = max(image_tokens, *encoder.image_tokens(*sizes), 0)
        except RecordError:
            continue
    return max(characters, 1) / max(tokens, 1), image_tokens
