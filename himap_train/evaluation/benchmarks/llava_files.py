"""LLaVA's own question files (`{"question_id", "image", "text", "category"}`, prompts and all) with the answer files of
the benchmarks, and its ScienceQA conversations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from himap_train.data.records import IMAGE_PLACEHOLDER, Conversation, Source, Turn
from himap_train.evaluation.benchmarks.files import Table, read_json, rows_table
from himap_train.evaluation.benchmarks.records import column_in, value_in
from himap_train.evaluation.benchmarks.table import LETTER, Benchmark

ANSWERS = "answers|label|answer|multiple_choice_answer"
_ANSWER_IS = re.compile(r"The answer is ([A-Z])\.")
_OPTION = re.compile(r"\(([A-E])\) (.+?)(?= \([A-E]\) |\n|$)")


def is_question_file(table: Table) -> bool:
    """Whether rows are LLaVA's questions, which hold the whole prompt."""
    return {"question_id", "text"} <= set(table.columns) and "question" not in table.columns


def with_answers(table: Table, benchmark: Benchmark, answers: Path | None) -> tuple[Table, Benchmark]:
    """LLaVA's questions as rows of a benchmark, the answers of its own file beside them.

    Args:
        table: The questions.
        benchmark: Its entry.
        answers: The answer file: `coco_pope_*.json` or their folder, `TextVQA_0.5.1_val.json`, GQA's
            `testdev_balanced_questions.json`, VQAv2's annotations, `SEED-Bench.json`, MME's folder of texts, ...

    Raises:
        FileNotFoundError: No such file.
        ValueError: A question has no answer there.
    """
    rows = [table.row(number) for number in range(table.size)]
    if answers is not None:
        by_key = {_key(entry, benchmark.match): entry for entry in _entries(answers)}
        keys = [_key(row, benchmark.match) for row in rows]
        if lost := [key for key in keys if key not in by_key]:
            raise ValueError(
                f"{answers} has no answer to {len(lost)} of the {len(rows)} questions of {table.name}, the first with "
                f"({', '.join(benchmark.match)}) {lost[0]}; it has {len(by_key)} such as {next(iter(by_key), ())}. Are "
                "both of one benchmark and split?"
            )
        rows = [{**by_key[key], **row} for key, row in zip(keys, rows, strict=True)]
    joined = rows_table(table.name, rows, table.folder)
    own: dict[str, Any] = {"prompt": "{text}", "answer": ANSWERS, "type": column_in(joined.columns, benchmark.type)}
    return joined, replace(benchmark, **own, key="question_id", options="", group="", numbered=False)


def _entries(answers: Path) -> Iterator[dict[str, Any]]:
    """Entries of an answer file, or of all in a folder; the category stands in the name there."""
    if not answers.exists():
        raise FileNotFoundError(f"answer file {answers} does not exist (current folder: {Path.cwd()})")
    files = [answers] if answers.is_file() else sorted([*answers.rglob("coco_pope_*.json"), *answers.rglob("*.txt")])
    if not files:
        raise ValueError(f"folder {answers} holds neither coco_pope_*.json nor MME's *.txt; name the answer file")
    for file in files:
        if answers.is_dir() and file.suffix == ".txt":
            for line in file.read_text(encoding="utf-8").splitlines():
                question, _, answer = line.partition("\t")
                category = file.relative_to(answers).parts[0]
                yield {"category": category, "stem": file.stem, "question": question, "answer": answer.strip()}
        else:
            for entry in read_json(file):
                yield {"category": file.stem.rpartition("_")[2], **entry}


def _key(entry: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, ...]:
    """What tells a question of LLaVA and an entry of an answer file that they are of one another."""
    question = str(value_in(entry, "question|text") or "").split("\n")[0].replace("Please answer yes or no.", "")
    known = {
        "question": " ".join(question.lower().split()),
        "image_id": value_in(entry, "image_id|question_id"),
        "stem": entry.get("stem", Path(str(entry.get("question_id"))).stem),
    }
    return tuple(str(known.get(name, entry.get(name))) for name in names)


class AskedForLetters:
    """LLaVA's ScienceQA conversations, with the request for a letter, and the letter of "The answer is A." as answer.

    Args:
        source: The conversations.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Conversation:
        found = self._source[index]
        if not found.turns:
            return found  # which is refused where it is encoded
        text = found.turns[0].text.replace(IMAGE_PLACEHOLDER, "").strip()
        asked = text if text.endswith(LETTER) else text + LETTER
        right = _ANSWER_IS.search(found.answer)
        turns = (
            Turn("user", f"{IMAGE_PLACEHOLDER}\n" * len(found.images) + asked),
            Turn("assistant", right[1] if right else found.answer),
        )
        meta = {**found.meta, **dict(_OPTION.findall(text)), "type": "image" if found.images else "text"}
        return replace(found, turns=turns, meta=meta)
