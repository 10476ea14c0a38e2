"""A benchmark's rows as a source of conversations: the question as it is asked, the accepted answers, the type."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from himap_train.data.forms import checked_text
from himap_train.data.images import image_source
from himap_train.data.records import IMAGE_PLACEHOLDER, Conversation, RecordError, Turn
from himap_train.evaluation.benchmarks.cells import as_list, index_of, options_in
from himap_train.evaluation.benchmarks.files import Table
from himap_train.evaluation.benchmarks.table import Benchmark
from himap_train.evaluation.choice import CIRCULAR_OFFSET

_MADE = ("question", "options", "options_in_line")  # names in prompts that are no columns of their own
_TRIED = 100


class BenchmarkRecords:
    """Map-style source of a benchmark's questions. Images stay undecoded.

    Where the metric is `circular` and the file has no rotations of the options (MMBench numbers them i + 10^6 ...),
    they are made.

    Args:
        table: Its rows.
        benchmark: What the columns are.
        image_folder: Where paths of images start; by default the folder of the file.
        follow_links: See `resolve_image_path`.

    Raises:
        ValueError: A column is missing, or no row counts.
    """

    def __init__(
        self, table: Table, benchmark: Benchmark, image_folder: Path | None = None, follow_links: bool = False
    ) -> None:
        self._table, self._benchmark, self._prompt = table, benchmark, Prompt(benchmark.prompt)
        self._folder, self._links = image_folder or table.folder, follow_links
        self._options = benchmark.options.split(",") if benchmark.options else []
        self._check_columns()
        rows = list(range(table.size))
        if benchmark.only and benchmark.only[0] in table.columns:
            rows = [i for i in rows if str(table.facts(i).get(benchmark.only[0])) == benchmark.only[1]]
        self._places = [(row, 0) for row in rows]
        if not self._places:
            raise ValueError(f"{table.name}: none of its {table.size} rows counts ({benchmark.only or 'it is empty'})")
        answers = (value_in(table.facts(row), benchmark.answer) for row in rows[:_TRIED])
        self.scored = bool(benchmark.metrics) and any(answer not in (None, []) for answer in answers)
        circular = self.scored and "circular" in benchmark.metrics
        if circular and not any(self._index(row) >= CIRCULAR_OFFSET for row in rows):
            self._places = [(row, turn) for row in rows for turn in range(len(self._labelled(table.facts(row))))]

    def __len__(self) -> int:
        """Number of questions."""
        return len(self._places)

    def facts(self, index: int) -> dict[str, Any]:
        """The row of a question as the file has it, without images."""
        return self._table.facts(self._places[index][0])

    def __getitem__(self, index: int) -> Conversation:
        """Question `index`; RecordError if it cannot be used."""
        place, turn = self._places[index]
        row, benchmark = self._table.row(place), self._benchmark
        where = f"{self._table.name}, row {place}"
        columns = (value_in(row, column) for column in benchmark.image.split(","))
        found = [image for held in columns for image in (held if isinstance(held, list) else [held])]
        images = [image_source(image, self._folder, where, self._links) for image in found if image is not None]
        labelled = self._labelled(row)
        texts = list(labelled.values())
        options = dict(zip(ascii_uppercase, texts[turn:] + texts[:turn], strict=False))
        self._require(row, bool(images), where)
        question = str(value_in(row, benchmark.question) or "").replace(benchmark.without or "\0", "")
        made = {
            "question": question.strip(),
            "options": "\n".join(f"{letter}. {text}" for letter, text in options.items()),
            "options_in_line": " ".join(f"({letter}) {text}" for letter, text in options.items()),
        }
        text = self._prompt.fill({**row, **made})
        if text.count(IMAGE_PLACEHOLDER) != len(images):  # else it says itself where they belong
            text = "".join([f"{IMAGE_PLACEHOLDER}\n"] * len(images)) + text.replace(IMAGE_PLACEHOLDER, "")
        turns = (Turn("user", text),)
        meta = options | self._meta(row, bool(images))
        if self.scored:
            meta["answers"] = self._answers(value_in(row, benchmark.answer), labelled, turn, where)
        checked_text(" ".join([text, *meta.values()]), f"{where}: the text")
        if benchmark.key == "index":
            meta["index"] = str(self._index(place) + turn * CIRCULAR_OFFSET)
        name = meta.get("index", value_in(row, benchmark.key))
        return Conversation(str(place if name is None else name), tuple(images), turns, meta, where)

    def up_to(self, limit: int) -> int:
        """Number of questions that the first `limit` rows make: rotations of one are asked together or not at all."""
        rows = set(list(dict.fromkeys(row for row, _ in self._places))[:limit])
        return sum(row in rows for row, _ in self._places)

    def is_rotation(self, index: int) -> bool:
        """Whether a question was made here of a row's own."""
        return self._places[index][1] > 0

    def _require(self, row: Mapping[str, Any], shown: bool, where: str) -> None:
        """RecordError for a row that has nothing to ask, or nothing to ask about: it would be answered blindly."""
        benchmark = self._benchmark
        asks = [name for name in self._prompt.names if name not in _MADE]
        asks += [benchmark.question] if "question" in self._prompt.names else []
        if asks and all(value_in(row, name) is None for name in asks):
            raise RecordError(f"{where}: there is nothing in `{'`, `'.join(asks)}`; expected a question")
        if not shown and not benchmark.blind_rows:
            raise RecordError(f"{where}: there is nothing in `{benchmark.image}`; expected an image")

    def _check_columns(self) -> None:
        benchmark, columns = self._benchmark, self._table.columns
        wanted = [name for name in self._prompt.names if name not in _MADE]
        wanted += [benchmark.question] if "question" in self._prompt.names else []
        wanted += [benchmark.type] if benchmark.type not in ("", "with_image") else []
        wanted += self._options[:2] or [name for name in self._prompt.names if name in _MADE[1:]]
        wanted += [] if benchmark.export else [benchmark.answer]
        wanted += benchmark.image.split(",") if benchmark.needs_image else []
        missing = [name for name in wanted if not column_in(columns, name)]
        if missing:
            raise ValueError(
                f"{self._table.name} has the columns {columns}; expected also {', '.join(map(repr, missing))}. Is it "
                "this benchmark's file? Other columns: --prompt '{question} ...', --answer-column, --options-column, "
                "--type-column, --image-column"
            )

    def _index(self, place: int) -> int:
        """MMBench's number of a question; its row where the file has none."""
        index = index_of(self._table.facts(place).get("index", place))
        return int(index) if index.isdecimal() else place

    def _labelled(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Texts of the options in order, by what the file calls them."""
        if len(self._options) == 1:
            return options_in(value_in(row, self._options[0]), f"{self._table.name}, column {self._options[0]!r}")
        texts = [value_in(row, column) for column in self._options]
        there = texts[: texts.index(None) if None in texts else None]
        return dict(zip(ascii_uppercase, map(str, there), strict=False))

    def _meta(self, row: Mapping[str, Any], with_image: bool) -> dict[str, str]:
        kind, group = value_in(row, self._benchmark.type), value_in(row, self._benchmark.group)
        if self._benchmark.type == "with_image":
            kind = "image" if with_image else "text"
        facts = {"type": ", ".join(map(str, kind)) if isinstance(kind, list) else kind, "scene": group}
        return {name: str(value) for name, value in facts.items() if value is not None}

    def _answers(self, answer: Any, labelled: dict[str, str], turn: int, where: str) -> str:
        """Accepted answers as JSON; those that name an option by its letter now."""
        texts = list(labelled.values())
        letters = list(ascii_uppercase[: len(texts)])
        found = as_list(answer)
        if [*labelled] != letters:
            named = dict(zip(labelled, letters, strict=True))
            found = [named.get(str(one), one) for one in found]
        if self._benchmark.numbered or turn:
            for place, one in enumerate(found):
                number = int(one) if str(one).isdecimal() else letters.index(one) if one in letters else -1
                if not 0 <= number < len(texts):
                    raise RecordError(f"{where}: the answer is {one!r:.60}; expected one of the options {texts}")
                found = [*found[:place], letters[(number - turn) % len(texts)], *found[place + 1 :]]
        return json.dumps(found, ensure_ascii=False, default=str)


def column_in(columns: Mapping[str, Any] | list[str], names: str) -> str:
    """The first of "name|name|..." that there is, "" for none; "a.b" is `b` within column `a`."""
    return next((name for name in names.split("|") if name in columns or name.split(".")[0] in columns), "")


def value_in(row: Mapping[str, Any], names: str) -> Any:
    """What a row has there; None where it has nothing (an empty cell, or "nan" as pandas writes one)."""
    value: Any = row
    name = column_in(row, names)
    for part in [name] if name in row else name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return None if value in ("", "nan") else value


class Prompt(string.Formatter):
    r"""`{column}`, lists with commas; `{column:N/A}` with what stands for an empty one. A line of empty columns goes.

    Args:
        template: For `str.format`; `\n` written out is a new line too, as shells pass it.

    Raises:
        ValueError: The braces do not match, or have no name within.
    """

    def __init__(self, template: str) -> None:
        self.template = template.replace("\\n", "\n")
        try:
            self.names = [name for _, name, *_ in self.parse(self.template) if name is not None]
        except ValueError as error:
            raise ValueError(f"prompt {template!r}: {error}; write a brace that is no column's twice") from error
        if not all(self.names):
            raise ValueError(f"prompt {template!r}: braces without a column; name one, as in {{question}}")

    def fill(self, values: Mapping[str, Any]) -> str:
        """The template with the values of a row."""
        lines = []
        for line in self.template.split("\n"):
            text = self.vformat(line, (), values)
            if text.strip() or not any(name for _, name, *_ in self.parse(line)):
                lines.append(text)
        return "\n".join(lines)

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        """Columns by name; never an attribute."""
        return value_in(kwargs, field_name), field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        """The text of a value, or what stands for an empty one."""
        listed = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        return format_spec if listed is None or listed == "" else str(listed)
