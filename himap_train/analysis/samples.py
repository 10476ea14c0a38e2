"""A few samples of a run: what each row of its table answered, and pictures of what each stage kept."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from himap_train.analysis.answered import answer_question, prompt_encoder
from himap_train.data.records import RecordError, Source
from himap_train.evaluation.compare import Row
from himap_train.evaluation.questions import Question
from himap_train.evaluation.result import Prediction
from himap_train.pruning.schedule import PruningSchedule
from himap_train.storage import atomic_folder
from himap_train.structured import read_json

FOLDER = "samples"
_FILE = "samples.json"
_EACH, _CANDIDATES = 4, 16
_PICTURE_BYTES = 1_500_000
"""Of all pictures together, so that the report that holds them can be sent by mail."""
_ANSWER = {"name": str, "text": str, "right": bool | None}
_SHAPE = [
    {"id": str, "question": str, "expected": [str], "right": bool | None, "answers": [_ANSWER], "pictures": [str]}
]


def take_samples(
    model: nn.Module,
    processor: Any,
    source: Source,
    schedule: PruningSchedule,
    rows: Sequence[Row],
    max_new_tokens: int,
    **images: Any,
) -> list[dict[str, Any]]:
    """Some right and some wrong answers of the last row that ran a schedule, of every type, those with images first.

    Where weights are spread over processes, all of them must call it.

    Args:
        model: LLaVA or PeftModel around one; what it keeps now is drawn.
        processor: Its processor.
        source: What the rows were measured on.
        schedule: What runs.
        rows: Of the table. Where none ran the schedule, the first records are taken and answered.
        max_new_tokens: Where an answer is cut.
        **images: As in `prompt_encoder`.

    Returns:
        Samples in the form of samples.json, with the pictures themselves; `right` is None where nobody scored it.
    """
    told = next((row for row in reversed(rows) if row.schedule == schedule), None)
    scored = [{prediction.index: prediction for prediction in row.result.predictions} for row in rows]
    groups = _candidates(told.result.predictions) if told else {None: list(range(_CANDIDATES))}
    questions = _read(source, {index for group in groups.values() for index in group})
    new = 1 if told else max_new_tokens
    encoder = prompt_encoder(model, processor, **images)
    samples = []
    for right, group in groups.items():
        usable = [questions[index] for index in group if index in questions]
        usable.sort(key=lambda question: not question.conversation.images)
        for question in usable[: 2 * _EACH // len(groups)]:
            conversation = question.conversation
            try:
                live, expected = answer_question(model, encoder, conversation, schedule, new), question.answers
            except RecordError:
                continue  # the evaluation and the data check have reported it
            answers: list[dict[str, Any]] = [{"name": "this run", "text": live.text, "right": None}]
            if told:
                at = [(row.name, given.get(question.index)) for row, given in zip(rows, scored, strict=True)]
                answers = [{"name": name, "text": it.prediction, "right": it.score >= 0.5} for name, it in at if it]
            facts = {"id": conversation.id, "question": question.text, "expected": expected, "right": right}
            samples.append({**facts, "answers": answers, "pictures": live.pictures})
    return samples


def save_samples(samples: Sequence[dict[str, Any]], run: Path) -> None:
    """Write what `take_samples` gave into a run folder."""
    limit = _PICTURE_BYTES // max(1, sum(len(sample["pictures"]) for sample in samples))
    content = []
    with atomic_folder(run / FOLDER) as folder:
        for number, sample in enumerate(samples):
            names = [f"{number}-{place}.png" for place in range(len(sample["pictures"]))]
            for name, picture in zip(names, sample["pictures"], strict=True):
                (folder / name).write_bytes(_small_png(picture, limit))
            content.append({**sample, "pictures": names})
        (folder / _FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def saved_samples(run: Path) -> list[dict[str, Any]]:
    """The samples of a run folder, pictures as file names; none where it has none."""
    file = run / FOLDER / _FILE
    return read_json(file, _SHAPE) if file.is_file() else []


def _candidates(predictions: Sequence[Prediction]) -> dict[bool | None, list[int]]:
    """Places of right and of wrong answers, the types taking turns."""
    turns: dict[bool | None, list[tuple[int, int]]] = {True: [], False: []}
    seen: Counter[tuple[bool, str]] = Counter()
    for prediction in predictions:
        right = prediction.score >= 0.5
        turns[right].append((seen[right, prediction.type], prediction.index))
        seen[right, prediction.type] += 1
    return {right: [index for _, index in sorted(found)[:_CANDIDATES]] for right, found in turns.items()}


def _read(source: Source, wanted: set[int]) -> dict[int, Question]:
    """The records at these places that can be read."""
    found = {}
    for index in sorted(wanted.intersection(range(len(source)))):
        with suppress(RecordError):
            found[index] = Question(index, source[index])
    return found


def _small_png(picture: Image.Image, limit: int) -> bytes:
    """A PNG of at most so many bytes: few colours, and smaller where that is not enough."""
    while True:
        stream = io.BytesIO()
        picture.quantize(128).save(stream, "PNG", optimize=True)
        if stream.tell() <= limit or max(picture.size) < 100:
            return stream.getvalue()
        picture = picture.resize((round(picture.width * 0.8), max(1, round(picture.height * 0.8))))
