"""From a benchmark's name and files, or a prompt and columns, to questions and how they are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from himap_train.data.forms import TURN_KEYS
from himap_train.data.records import Source
from himap_train.data.refusals import unread_pictures
from himap_train.data.sources import open_source
from himap_train.evaluation.benchmarks.files import SEPARATED, Table, open_table
from himap_train.evaluation.benchmarks.llava_files import AskedForLetters, is_question_file, with_answers
from himap_train.evaluation.benchmarks.records import BenchmarkRecords
from himap_train.evaluation.benchmarks.table import BENCHMARKS, Benchmark
from himap_train.evaluation.result import Prediction
from himap_train.pruning.names import check_keys


@dataclass(frozen=True)
class Task:
    """Questions, the metrics that score them (("none",) without answers), where answers are cut, and what kind of
    submission is written ("" for none).
    """

    source: Source
    metrics: tuple[str, ...] = ("exact",)
    max_new_tokens: int = 16
    export: str = ""

    def facts(self, index: int) -> dict[str, Any]:
        """The row of a question without images; empty where the source has none."""
        return self.source.facts(index) if isinstance(self.source, BenchmarkRecords) else {}

    def own(self, predictions: Sequence[Prediction]) -> list[Prediction]:
        """Answers to what the file asks itself, without those to rotations that were made of it."""
        made = self.source.is_rotation if isinstance(self.source, BenchmarkRecords) else lambda _: False
        return [one for one in predictions if not made(one.index)]


def open_task(
    data: str,
    benchmark: str | None = None,
    answers: Path | None = None,
    image_folder: str | None = None,
    follow_links: bool = False,
    **columns: str,
) -> Task:
    """Questions from any file; without a benchmark or columns those of `open_source`, or of `question` and `answer`.

    Args:
        data: As in `open_source`, and *.tsv and *.csv, and `:config:split` behind a Hugging Face data set.
        benchmark: Name in `BENCHMARKS`.
        answers: Answer file for LLaVA's question files.
        image_folder: Where image paths start.
        follow_links: See `resolve_image_path`.
        **columns: Texts for fields of `Benchmark` (prompt, answer, options, type) in place of its own; "" leaves them.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No such benchmark, or its files are not as expected.
        ConnectionError: The hub cannot be reached.
    """
    own: dict[str, Any] = {name: value for name, value in columns.items() if value}
    if benchmark is not None:
        check_keys("--benchmark", {benchmark: None}, list(BENCHMARKS))
    if benchmark is None and not own and Path(data).suffix.lower() not in SEPARATED:
        if answers is not None:
            raise ValueError(f"--answers {answers} goes with a --benchmark, which says how answers belong to questions")
        try:
            return Task(open_source(data, image_folder, split="test", follow_links=follow_links))
        except ValueError as error:
            hint = "; rows with a question and an answer each are read by --prompt '{question}'"
            raise ValueError(f"{error}{hint if Path(data).is_file() else ''}") from error
    free = Benchmark(
        "{question}", ("choice" if own.get("options") else "exact",), needs_image="image" in own, blind_rows=True
    )
    entry = replace(BENCHMARKS[benchmark] if benchmark else free, **own)
    table = open_table(data, entry)
    if set(TURN_KEYS) & set(table.columns):
        source = open_source(data, image_folder, split=entry.split, follow_links=follow_links)
        if entry.type == "with_image":
            source = AskedForLetters(source)
        return Task(source, entry.metrics or ("none",), entry.max_new_tokens, entry.export)
    if is_question_file(table):
        if answers is None and not entry.export:
            raise ValueError(f"{data} is LLaVA's question file; name the benchmark's file of answers: --answers FILE")
        table, entry = with_answers(table, entry, answers)
    elif answers is not None:
        raise ValueError(
            f"--answers {answers} goes with LLaVA's question files; {data} has the columns {table.columns}"
        )
    records = BenchmarkRecords(table, entry, Path(image_folder) if image_folder else None, follow_links)
    if benchmark is None:
        _require_shown(table, entry, data)
    if not records.scored and not entry.export:
        raise ValueError(f"{data}: column {entry.answer!r} is empty, so there is nothing to score; is it a test split?")
    return Task(records, entry.metrics if records.scored else ("none",), entry.max_new_tokens, entry.export)


def _require_shown(table: Table, entry: Benchmark, data: str) -> None:
    """Raise ValueError where a file has pictures that nobody would be shown."""
    read = entry.image.replace("|", ",").split(",")
    twice = "image" if table.alias in read else table.alias  # one column under two names: under the other one
    columns = [column for column in table.columns if column != twice]
    found = ",".join(unread_pictures(columns, read, table.pictures))
    if found:
        raise ValueError(
            f"{data} has what looks like pictures in {found}, which would not be shown: give --image-column {found}"
        )
