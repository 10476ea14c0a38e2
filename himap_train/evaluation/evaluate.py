"""`evaluate`: a model answers a data set under the schedule that is installed on it, and the answers are scored."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from himap_train.bar import progress_bar
from himap_train.checkpoints.finite import require_finite
from himap_train.checkpoints.load import installed_schedule
from himap_train.data.batches import Batch, collate, pad_token_id_of
from himap_train.data.encode import Encoder
from himap_train.data.loader import worker_options
from himap_train.data.records import Conversation, RecordError, Source
from himap_train.data.skips import SkipLog
from himap_train.evaluation.answering import answer_batch, evaluation_mode
from himap_train.evaluation.metrics import make_metrics
from himap_train.evaluation.questions import Question, question_batches, source_length
from himap_train.evaluation.result import EvaluationResult, Prediction, SampleTokens, measured_tokens
from himap_train.evaluation.sample_metric import SampleMetric
from himap_train.models.families.base import AspectRatio, Background
from himap_train.models.stock import base_model
from himap_train.processes import from_all
from himap_train.ranges import require_possible

logger = logging.getLogger(__name__)


def evaluate(
    model: nn.Module,
    processor: Any,
    source: Source,
    *,
    batch_size: int = 64,
    max_new_tokens: int = 16,
    metrics: Sequence[str] = ("exact",),
    limit: int | None = None,
    image_aspect_ratio: AspectRatio | None = None,
    image_background: Background | None = None,
    max_skipped: int | float = 0.01,
    progress: bool = True,
    num_workers: int = 0,
) -> EvaluationResult:
    """Answer every question of `source` greedily and score the answers.

    Runs whatever schedule is installed on the model. Under `torch.distributed` each process answers its share and all
    return the same result.

    Args:
        model: LLaVA or PeftModel around one; its training mode is given back as it was.
        processor: Its processor.
        source: Conversations; the last assistant turn is the reference.
        batch_size: Questions in a batch.
        max_new_tokens: Where an answer is cut.
        metrics: Names from `METRICS`; the first gives the score.
        limit: Use so many records at most, from the start of the source.
        image_aspect_ratio: By default as the checkpoint was trained; "pad" makes images square first, as LLaVA-1.5 was.
        image_background: Colour under transparent images, "white" or "black"; by default as it was trained.
        max_skipped: Unusable records that are tolerated: a number, or a fraction below 1. They are not scored.
        progress: Show a bar.
        num_workers: Processes that decode images and encode ahead of the model; 0 does it between the answers.

    Raises:
        RuntimeError: The schedule did not act.
        TooManySkippedError: More unusable records than `max_skipped`.
        ValueError: Unknown metric, nothing to score, or a weight of the model is nan or inf.
    """
    start = time.perf_counter()
    numbers = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "limit": limit}
    require_possible({f"evaluation.{name}": value for name, value in numbers.items()})
    require_finite(model.named_parameters(), "the model", "There is nothing to score: take another checkpoint")
    base: Any = base_model(model)
    scorers = make_metrics(metrics)
    total = source_length(source, limit)
    longest = base.config.text_config.max_position_embeddings - max_new_tokens
    if longest < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, which leaves no room for a prompt: give less")
    encoder = Encoder(processor, longest, image_aspect_ratio, image_background)
    tokens: list[tuple[int, SampleTokens]] = []
    predictions: list[Prediction] = []
    skipped = SkipLog(total, max_skipped)
    with evaluation_mode(model), progress_bar("evaluating", total, progress) as advance:
        for count, batch, padded in _encoded(
            question_batches(source, batch_size, limit, skipped.add), encoder, scorers, skipped, num_workers
        ):
            if padded:
                texts, found = answer_batch(model, processor, padded, max_new_tokens)
                made = _score(scorers, batch, texts)
                predictions += made
                tokens += zip((prediction.index for prediction in made), found, strict=True)
            advance(count)
    parts = from_all((tokens, predictions, skipped.reasons, scorers))
    for number, scorer in enumerate(scorers):
        scorer.join(scored[number] for *_, scored in parts)
    # What several processes made once: the first's, as in the scores.
    ran = {index: sample for found, *_ in reversed(parts) for index, sample in found}
    by_index = {prediction.index: prediction for _, made, *_ in reversed(parts) for prediction in made}
    _warn_of_cut_answers(processor.tokenizer, by_index.values(), max_new_tokens)
    overall, types = scorers[0].summary()
    samples = [ran[index] for index in sorted(ran)]
    return EvaluationResult(
        metric=scorers[0].name,
        overall=overall,
        types=types,
        figures={name: value for scorer in scorers for name, value in scorer.figures(scorer.rows()).items()},
        **vars(measured_tokens(samples, installed_schedule(model), base.config)),
        seconds=time.perf_counter() - start,
        predictions=[by_index[index] for index in sorted(by_index)],
        skipped=sorted({reason for _, _, reasons, _ in parts for reason in reasons}),
    )


def _warn_of_cut_answers(tokenizer: Any, predictions: Collection[Prediction], most: int) -> None:
    """Say how many answers cannot be given in full."""

    def cut(answer: str) -> bool:
        return len(answer) > most and len(tokenizer(answer, add_special_tokens=False)["input_ids"]) > most

    number = sum(bool(made.answers) and all(map(cut, made.answers)) for made in predictions)
    if number:
        logger.warning(
            "%d of %d expected answers are longer than max_new_tokens (%d), where what is generated is cut: give more",
            number,
            len(predictions),
            most,
        )


class _Encoding(Dataset[tuple[Batch | None, dict[int, RecordError]]]):
    """Conversations -> the padded batch of those that can be encoded, and by place why others cannot."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def __getitem__(self, conversations: list[Conversation]) -> tuple[Batch | None, dict[int, RecordError]]:
        samples, errors = [], {}
        for place, conversation in enumerate(conversations):
            try:
                samples.append(self._encoder.encode_prompt(conversation))
            except RecordError as error:
                errors[place] = error
        pad = pad_token_id_of(self._encoder.processor.tokenizer)
        return collate(samples, pad, padding_side="left") if samples else None, errors


def _as_it_is(encoded: Any) -> Any:
    return encoded


def _encoded(
    batches: Iterator[list[Question]], encoder: Encoder, scorers: list[SampleMetric], skipped: SkipLog, num_workers: int
) -> Iterator[tuple[int, list[Question], Batch | None]]:
    """The number of questions read, those that can be used, and their batch: those that every metric can score,
    whatever the answer. Only conversations go to the workers, and only tensors come back.
    """
    waiting: deque[tuple[int, list[Question]]] = deque()

    def conversations() -> Iterator[list[Conversation]]:
        for read in batches:
            good = []
            for question in read:
                try:
                    for scorer in scorers:
                        scorer.check(_answers(question, scorers), question.conversation)
                except RecordError as error:
                    skipped.add(question.index, error)
                else:
                    good.append(question)
            waiting.append((len(read), good))
            yield [question.conversation for question in good]

    options: dict[str, Any] = {"batch_size": None, "sampler": conversations(), "collate_fn": _as_it_is}
    for padded, errors in DataLoader(_Encoding(encoder), **options, **worker_options(num_workers)):
        count, good = waiting.popleft()
        for place, error in errors.items():
            skipped.add(good[place].index, error)
        yield count, [question for place, question in enumerate(good) if place not in errors], padded


def _answers(question: Question, scorers: list[SampleMetric]) -> list[str]:
    """Its accepted answers; none where nothing compares with them, as in test sets that servers score."""
    return question.answers if any(scorer.reads_answers for scorer in scorers) else []


def _score(scorers: list[SampleMetric], batch: list[Question], texts: list[str]) -> list[Prediction]:
    answers = [_answers(question, scorers) for question in batch]
    meta = [question.conversation.meta for question in batch]
    keys, clusters = [str(question.index) for question in batch], [question.cluster for question in batch]
    for scorer in scorers:
        scorer.update(texts, answers, meta, keys, clusters)
    return [
        Prediction(
            index=question.index,
            id=question.conversation.id,
            type=question.conversation.meta.get("type", ""),
            prompt=question.text,
            prediction=text,
            answers=accepted,
            score=scorers[0].measure(text, accepted, question.conversation.meta)[0],
        )
        for question, accepted, text in zip(batch, answers, texts, strict=True)
    ]
