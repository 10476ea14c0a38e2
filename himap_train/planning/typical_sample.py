"""Where a plan's numbers of tokens come from: the conversations of the training data."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from himap_train.data.check import spread_over
from himap_train.data.encode import Encoder
from himap_train.data.module import LlavaDataModule
from himap_train.data.records import RecordError
from himap_train.data.tokens import ConversationTokenizer
from himap_train.models.families import family_of_config
from himap_train.models.families.image_form import check_limit, limit_images
from himap_train.models.families.processing import FILES
from himap_train.models.loading import load_processor, resolve_model
from himap_train.models.training_cost import tokens_of_image
from himap_train.planning.run_plan import Kind, Sample

TEXT_TOKENS, SUPERVISED = 115, 60
"""Of a question and an answer under LLaVA-1.5's system prompt, where no data can be read."""
_READ = 400


def read_sample(
    data: LlavaDataModule, path: str, config: Any, text_tokens: int | None, supervised: int | None, images: int
) -> tuple[Sample, str]:
    """Tokens of a conversation, from the training data where they can be read, and where they come from.

    Args:
        data: Data of the config; of images no more than the headers are read.
        path: As `model.path`, for the tokenizer.
        config: Configuration of the model.
        text_tokens: Given instead of what the data says.
        supervised: Given instead of what the data says.
        images: Images of a conversation, where the data says nothing.

    Raises:
        ValueError: The model's folder has a processor that cannot be used.
    """
    check_limit(family_of_config(config), data.max_image_tokens)
    image_tokens = min(tokens_of_image(config), data.max_image_tokens or sys.maxsize)
    here = any((Path(path) / name).is_file() for name in (*FILES, "tokenizer.json", "tokenizer_config.json"))
    processor = limit_images(load_processor(path, config), data.max_image_tokens) if here else None
    if text_tokens is None:
        try:
            processor = processor or limit_images(load_processor(resolve_model(path), config), data.max_image_tokens)
            sample, where = _from_data(data, processor, image_tokens)
            if supervised is not None:
                kinds = tuple(replace(kind, supervised=supervised) for kind in sample.kinds)
                sample = replace(sample, supervised=supervised, most_supervised=supervised, kinds=kinds)
            return sample, where
        except (OSError, ValueError, RecordError) as error:
            reason = f"the training data cannot be read here ({str(error).splitlines()[0]})"
        text_tokens = TEXT_TOKENS
        where = f"{reason}; {text_tokens} text tokens assumed, give --text_tokens"
    else:
        where = f"{text_tokens} text tokens as given"
    answer = min(SUPERVISED, text_tokens) if supervised is None else supervised
    return Sample(images, image_tokens, text_tokens, text_tokens, answer, answer), where


def _from_data(data: LlavaDataModule, processor: Any, usual: int) -> tuple[Sample, str]:
    """Up to `_READ` conversations, spread over what an epoch takes; images that are not here have `usual` tokens."""
    source = data.source("train")
    assert source is not None
    size = min(data.limits["train"] or len(source), len(source))
    tokenize, encoder = ConversationTokenizer(processor), Encoder(processor, None, data.image_aspect_ratio)
    rows = []
    for index in spread_over(source, size, _READ):
        try:
            conversation = source[int(index)]
            exchanges = tokenize(conversation)
        except RecordError:
            continue
        images = len(conversation.images)
        try:
            places = encoder.places(conversation)
        except RecordError:
            places = [[processor.image_token_id] * usual] * images
        shown = sum(place.count(processor.image_token_id) for place in places)
        text = sum(len(one.prompt) + len(one.answer) for one in exchanges) - images + sum(map(len, places)) - shown
        room = text if data.max_length is None else max(data.max_length - shown, 0)
        answers = sum(len(one.answer) for one in exchanges)
        rows.append((images, shown, min(text, room), min(answers, room)))
    if not rows:
        raise ValueError("no record of it can be used")
    table = np.array(rows)
    kinds = tuple(
        Kind(float((table[:, 0] == images).mean()), *table[table[:, 0] == images].mean(0).round().astype(int).tolist())
        for images in np.unique(table[:, 0])
    )
    alone, seen = table[table[:, 0] == 0], table[table[:, 0] > 0]
    most, typical = table[:, 3].max(), seen if len(seen) else table
    images = int(np.median(typical[:, 0]))
    each = round(typical[:, 1].sum() / max(typical[:, 0].sum(), 1))
    # Images beyond those of most conversations count as text: the longest row may be the one that has them.
    longest = (typical[:, 1] + typical[:, 2]).max() - images * each
    text, answers = typical[:, 2:].mean(0).round().astype(int)
    share = f", {len(alone) / len(table):.0%} of them without images" if len(alone) else ""
    where = f"{len(rows)} conversations of the training data{share}; FLOPs are their mean, memory is for the longest"
    longest_alone = int(alone[:, 2].max()) if len(alone) else 0
    found = Sample(images, each, int(text), int(longest), int(answers), int(most), kinds, longest_alone)
    return found, where
