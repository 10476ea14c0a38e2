"""Fixed samples that a decoder is run on again and again: encoded, batched and their images encoded once.

So another schedule, or another cut of the attention, costs the decoder alone. Samples without an image say nothing
about pruning and are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from himap_train.checkpoints.load import Dtype, load_with_schedule
from himap_train.data.batches import collate, pad_token_id_of
from himap_train.data.encode import IGNORED, Encoder, Sample
from himap_train.data.records import IMAGE_PLACEHOLDER, Conversation, RecordError, Source
from himap_train.data.skips import SkipLog
from himap_train.data.sources import open_source
from himap_train.evaluation.answering import evaluation_mode
from himap_train.evaluation.questions import Question, question_batches, source_length
from himap_train.models.attention import OwnAttention
from himap_train.models.families import family_of
from himap_train.models.families.base import AspectRatio
from himap_train.models.features import encode_and_read, hidden_states
from himap_train.models.stock import base_model


@dataclass(frozen=True)
class EncodedBatch:
    """What `hidden_states` takes: input_ids, attention_mask and labels (B, S), and the features of the images.

    `ids` and `meta` are those of the records.
    """

    texts: dict[str, Tensor]
    encoded: Any
    sizes: dict[str, Tensor]
    ids: list[str]
    meta: list[dict[str, str]]

    @property
    def labels(self) -> Tensor:
        """(B, S), -100 where nothing is predicted."""
        return self.texts["labels"]

    def states(self, model: nn.Module, own_attention: OwnAttention | None = None) -> Tensor:
        """Final states, (B, S, D); the arguments are those of `hidden_states`."""
        return hidden_states(
            model,
            input_ids=self.texts["input_ids"],
            attention_mask=self.texts["attention_mask"],
            labels=self.labels,
            images=self.sizes,
            mm_encoder_outputs={"image": self.encoded},
            own_attention=own_attention,
        )


@dataclass(frozen=True)
class EncodedSamples:
    """The batches, and what they hold.

    Attributes:
        batches: In the order of length.
        count: Samples.
        image_tokens: Image tokens of a sample, mean.
        text_tokens: Text tokens of a sample's prompt, mean: without its last answer, which a prefill has not.
        supervised: Positions that are predicted, of all samples.
        too_long: Turns that are left out, as the context has no room for all before them.
        first: A record that is among them.
        first_place: Which sample it is, counted through the batches; ids may be the same.
        encoder: What encoded them.
    """

    batches: list[EncodedBatch]
    count: int
    image_tokens: float
    text_tokens: float
    supervised: int
    too_long: int
    first: Conversation
    first_place: int
    encoder: Encoder

    @property
    def tokens(self) -> dict[str, int]:
        """The sample of mean length, as `schedule.cost` takes it."""
        return {"image_tokens": round(self.image_tokens), "text_tokens": round(self.text_tokens)}


def open_samples(
    checkpoint: str = "embedded",
    data: str = "embedded:validation?scenes=300&seed=5",
    *,
    image_folder: str | None = None,
    follow_links: bool = False,
    dtype: Dtype = "auto",
    device: str = "auto",
    **reading: Any,
) -> tuple[Any, Any, EncodedSamples]:
    """A dense model, its processor, and samples of some data.

    Args:
        checkpoint: "embedded", a run or adapter folder, a merged folder, or any stock LLaVA (folder or hub name).
        data: embedded:validation, a LLaVA file (.json, .jsonl), a Hugging Face data set (folder, .parquet, owner/name).
        image_folder: Where the data's image paths start; by default the folder of its file.
        follow_links: Symbolic links in the image folder may lead out of it.
        dtype: Dtype of the weights; "auto" as they are stored.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        **reading: Options of `read_samples`.
    """
    source = open_source(data, image_folder, follow_links=follow_links)
    model, processor = load_with_schedule(checkpoint, "none", dtype, device)
    return model, processor, read_samples(model, processor, source, **reading)


def read_samples(
    model: nn.Module,
    processor: Any,
    source: Source,
    *,
    samples: int = 300,
    batch_size: int = 32,
    seed: int = 0,
    image_aspect_ratio: AspectRatio | None = None,
    max_skipped: int | float = 0.01,
    each_turn: bool = False,
) -> EncodedSamples:
    """Read, encode and batch samples.

    Args:
        model: LLaVA or PeftModel around one; encodes the images, whose features stay on its device.
        processor: Its processor.
        source: Conversations with answers.
        samples: Records with images and answers, drawn from the data; fewer if there are not so many.
        batch_size: Samples in a batch.
        seed: Which records are drawn.
        image_aspect_ratio: By default as the checkpoint was trained; "pad" makes images square first, as LLaVA-1.5 was.
        max_skipped: Unusable records that are tolerated: a number, or a fraction below 1.
        each_turn: Make a sample of every turn, which ends with that turn and supervises its answer alone; its
            `meta["turn"]` counts from 1. The record's type is that of its last turn, the others have none.

    Raises:
        TooManySkippedError: More unusable records than `max_skipped`, such as questions without answers.
        ValueError: `samples` or `batch_size` below 1, or no sample has an image.
    """
    if min(samples, batch_size) < 1:
        raise ValueError(f"{samples} samples in batches of {batch_size}: both must be at least 1")
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
    shown = itertools.islice((index for index in order if _may_show(source, index)), samples)
    drawn: Any = Subset(cast(Any, source), sorted(shown))
    base: Any = base_model(model)
    encoder = Encoder(processor, base.config.text_config.max_position_embeddings, image_aspect_ratio)
    skipped = SkipLog(source_length(drawn, samples), max_skipped)
    questions = itertools.chain.from_iterable(question_batches(drawn, batch_size, samples, skipped.add))
    encoded, too_long, first = _encoded(questions, encoder, skipped, each_turn)
    if first is None:
        raise ValueError(
            f"none of {len(order)} records can be searched on: {len(drawn)} may have an image and were read, "
            f"{len(drawn) - skipped.count} without an image and {skipped.count} unusable; give conversations with "
            "images and answers"
        )
    encoded.sort(key=lambda sample: len(sample["input_ids"]))
    pad = pad_token_id_of(processor.tokenizer)
    with evaluation_mode(model):
        batches = [_batch(base, encoded[i : i + batch_size], pad) for i in range(0, len(encoded), batch_size)]
    prompts = sum(int((sample["labels"] == IGNORED).nonzero().max()) + 1 for sample in encoded)
    image = sum(int((sample["input_ids"] == base.config.image_token_id).sum()) for sample in encoded)
    return EncodedSamples(
        batches=batches,
        count=len(encoded),
        image_tokens=image / len(encoded),
        text_tokens=(prompts - image) / len(encoded),
        supervised=sum(int((sample["labels"][1:] != IGNORED).sum()) for sample in encoded),
        too_long=too_long,
        first=first[0],
        first_place=next(place for place, sample in enumerate(encoded) if sample is first[1]),
        encoder=encoder,
    )


def _encoded(
    questions: Iterable[Question], encoder: Encoder, skipped: SkipLog, each_turn: bool
) -> tuple[list[Sample], int, tuple[Conversation, Sample] | None]:
    """Samples with an image, how many turns were too long, and the first record that has one, with its sample."""
    samples, too_long = list[Sample](), 0
    first: tuple[Conversation, Sample] | None = None
    for question in questions:
        before = len(samples)
        try:
            if each_turn:
                turns = [encoder.encode(turn) for turn in _turns(question.conversation)]
                whole = [_last_answer_alone(sample) for sample in turns if not sample["dropped_exchanges"]]
                samples, too_long = samples + whole, too_long + len(turns) - len(whole)
            else:
                samples.append(encoder.encode(question.conversation))
        except RecordError as error:
            skipped.add(question.index, error)
            continue
        shown = next((sample for sample in samples[before:] if sample["images"]), None)
        if first is None and shown is not None:
            first = question.conversation, shown
    return [sample for sample in samples if sample["images"]], too_long, first


def _may_show(source: Source, index: int) -> bool:
    """Whether a record has an image, as far as can be told without checking it: broken ones are to be reported."""
    characters, images = source.length_hint(index) if hasattr(source, "length_hint") else (0, 0)
    return images > 0 or not characters


def _turns(conversation: Conversation) -> Iterator[Conversation]:
    """The conversation up to each of its answers."""
    answers = [place for place, turn in enumerate(conversation.turns, start=1) if turn.role == "assistant"]
    for number, end in enumerate(answers or [len(conversation.turns)], start=1):
        turns = conversation.turns[:end]
        shown = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
        meta = conversation.meta if number >= len(answers) else {}
        yield replace(conversation, turns=turns, images=conversation.images[:shown], meta={**meta, "turn": str(number)})


def _last_answer_alone(sample: Sample) -> Sample:
    """Of the supervised tokens only those behind the last that is not: the last answer."""
    labels = sample["labels"].clone()
    labels[: int((labels == IGNORED).nonzero().max())] = IGNORED
    return {**sample, "labels": labels}


def _batch(base: Any, samples: list[Sample], pad_token_id: int) -> EncodedBatch:
    batch: Any = collate(samples, pad_token_id, pad_to_multiple_of=8)  # CPU kernels are set up anew for each length
    texts = {name: batch[name].to(base.device) for name in ("input_ids", "attention_mask", "labels")}
    family = family_of(base)
    images = {name: values.to(base.device) for name, values in batch["images"].items()}
    encoded, sizes = encode_and_read(base, images), family.position_inputs(images)
    return EncodedBatch(texts, encoded, sizes, batch["ids"], batch["meta"])
