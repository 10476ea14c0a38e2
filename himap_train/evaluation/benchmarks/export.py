"""Answers in the form that a judge or an evaluation server takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from himap_train.evaluation.result import Prediction
from himap_train.evaluation.vqa import normalise_text

SUBMISSIONS = ("submission.json", "submission.jsonl", "submission.xlsx", "submission.tsv")
Row = dict[str, Any]

_FORMS: dict[str, Callable[[Prediction, Row], Row]] = {
    "vqa": lambda one, row: {"question_id": _number(one.id), "answer": normalise_text(one.prediction)},
    "vizwiz": lambda one, row: {"image": row.get("image", one.id), "answer": normalise_text(one.prediction)},
    "docvqa": lambda one, row: {"questionId": _number(one.id), "answer": one.prediction},
    "mmvet": lambda one, row: {f"v1_{one.id.removeprefix('v1_')}": one.prediction},
    "llava-bench": lambda one, row: {
        "question_id": _number(one.id),
        "prompt": one.prompt,
        "text": one.prediction,
        "answer_id": str(one.index),
        "model_id": "himap-train",
        "metadata": {},
    },
    "mmbench": lambda one, row: {**{k: v for k, v in row.items() if k != "image"}, "prediction": one.prediction},
}


def export(kind: str, predictions: Sequence[Prediction], facts: Callable[[int], Row], folder: Path) -> Path:
    """Write a submission.

    Args:
        kind: `export` of a benchmark.
        predictions: The answers to what the file asks itself.
        facts: The row of a question, by its index.
        folder: That exists.

    Returns:
        The file, one of `SUBMISSIONS`; MMBench's Excel file as TSV where openpyxl is not installed.
    """
    content: Any = [_FORMS[kind](one, facts(one.index)) for one in predictions]
    if kind == "mmbench":
        import pandas

        path = folder / ("submission.xlsx" if find_spec("openpyxl") else "submission.tsv")
        sheet = pandas.DataFrame(content)
        sheet.to_excel(path, index=False) if path.suffix == ".xlsx" else sheet.to_csv(path, sep="\t", index=False)
        return path
    path = folder / ("submission.jsonl" if kind == "llava-bench" else "submission.json")
    if kind == "mmvet":
        content = {name: text for one in content for name, text in one.items()}
    lines = content if kind == "llava-bench" else [content]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def _number(name: str) -> int | str:
    return int(name) if name.isdecimal() else name
