"""One question answered under a schedule: the answer, what it took, pictures of the patches that each stage kept."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import nn

from himap_train.analysis.pictures import kept_pictures
from himap_train.data.batches import collate, pad_token_id_of
from himap_train.data.encode import Encoder, Sample
from himap_train.data.images import open_image
from himap_train.data.records import Conversation
from himap_train.evaluation.answering import answer_batch, evaluation_mode
from himap_train.evaluation.result import SampleTokens
from himap_train.models.install import install_pruning, pruning_of, record_pruning, remove_pruning, running
from himap_train.models.stock import base_model
from himap_train.pruning.schedule import PruningSchedule


@dataclass(frozen=True)
class Answered:
    """An answer and what it took.

    Attributes:
        text: The greedy answer.
        tokens: Image tokens, other tokens and image tokens left after each stage.
        seconds: Wall time of vision tower, prefill and decoding.
        pictures: For each image what each stage kept of it; empty where the family's tokens cannot be drawn.
    """

    text: str
    tokens: SampleTokens
    seconds: float
    pictures: list[Image.Image]


def answer_question(
    model: nn.Module,
    encoder: Encoder,
    conversation: Conversation,
    schedule: PruningSchedule,
    max_new_tokens: int,
    search: Mapping[str, Any] | None = None,
) -> Answered:
    """Answer the last question of a conversation; afterwards the model has the schedule that it had.

    Dense is a schedule without stages: it runs through the same loop, so its time can be compared.

    Args:
        model: LLaVA or PeftModel around one.
        encoder: From `prompt_encoder`.
        conversation: The images and the question; a last answer is left out.
        schedule: What runs.
        max_new_tokens: Where the answer is cut, at the end of the model's context too.
        search: As in `answer_batch`.

    Raises:
        RecordError: The conversation or one of its images cannot be used, or is too long.
        ValueError: The schedule does not fit the model.
    """
    processor = encoder.processor
    sample = encoder.encode_prompt(conversation)
    max_new_tokens = min(max_new_tokens, room_for_answer(encoder, sample))
    batch = collate([sample], pad_token_id_of(processor.tokenizer), padding_side="left")
    stock = pruning_of(model) is None
    if stock:
        install_pruning(model, schedule)
    try:
        with running(model, schedule), record_pruning(model) as trace, evaluation_mode(model):
            start = time.perf_counter()
            (text,), (tokens,) = answer_batch(model, processor, batch, max_new_tokens, search)
            seconds = time.perf_counter() - start
    finally:
        if stock:
            remove_pruning(model)
    images = [open_image(image, conversation.id, encoder.image_background) for image in conversation.images]
    kept = [rows[0].cpu() for rows in trace.kept]
    try:
        pictures = kept_pictures(processor, sample, images, kept, schedule)
    except ValueError:  # tokens in no grid: the answer is worth something without its pictures
        pictures = []
    return Answered(text, tokens, seconds, pictures)


def room_for_answer(encoder: Encoder, sample: Sample) -> int:
    """Tokens that an answer to a prompt of `prompt_encoder` can have in the model's context."""
    return (encoder.max_length or 2**31) + 1 - len(sample["input_ids"])


def prompt_encoder(model: nn.Module, processor: Any, **images: Any) -> Encoder:
    """Of prompts that leave room for one token of an answer; `images` are the options of `Encoder` about images."""
    base: Any = base_model(model)
    return Encoder(processor, base.config.text_config.max_position_embeddings - 1, **images)
