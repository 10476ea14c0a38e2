"""Files of a benchmark -> a table of rows: Hugging Face data sets, JSON, JSONL, and TSV as MMBench has them."""

from __future__ import annotations

import base64
import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from himap_train.data.huggingface import image_columns, json_columns, plain_row
from himap_train.data.records import RecordError
from himap_train.data.sources import HUB_NAME, load_from_hub, local_dataset, parts_of
from himap_train.evaluation.benchmarks.cells import index_of
from himap_train.evaluation.benchmarks.table import Benchmark

_JSON = (".json", ".jsonl", ".ndjson")
SEPARATED = {".tsv": "\t", ".csv": ","}
"""Endings of tables as text, and what stands between their columns."""
_LISTS = ("data", "questions", "annotations")  # under which TextVQA, SEED-Bench and VQAv2 keep their records
_FIELD = 2**27  # characters of an image in base64
_SHARD = re.compile(r"-\d+-of-\d+.*")


@dataclass(frozen=True)
class Table:
    """Rows with named columns.

    Attributes:
        name: For messages.
        columns: All that rows may have.
        size: Number of rows.
        row: A row by its number; images as they are stored.
        facts: The same without images, which then are not read.
        folder: Where paths of images start.
        pictures: Columns that hold images by their type.
        alias: That of them which `image` stands for too.
    """

    name: str
    columns: list[str]
    size: int
    row: Callable[[int], dict[str, Any]]
    facts: Callable[[int], dict[str, Any]]
    folder: Path
    pictures: tuple[str, ...] = ()
    alias: str = ""


def open_table(spec: str, benchmark: Benchmark) -> Table:
    """The rows of `file`, `folder`, `owner/name`, each of the last two also with `:split` or `:config:split`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a form that is read, or no such split or config.
        ConnectionError: The hub cannot be reached.
    """
    path, config, split = parts_of(spec)
    ending = path.suffix.lower()
    is_text = path.is_file() and ending in (*_JSON, *SEPARATED)
    if config and path.is_file() or split and is_text:
        raise ValueError(f"{spec}: a file has no configs, and one of text no splits; give {path} alone")
    if is_text:
        rows = _csv_rows(path, SEPARATED[ending]) if ending in SEPARATED else read_json(path)
        return rows_table(str(path), rows, path.parent)
    if path.is_file() and split and split not in ("train", _SHARD.sub("", path.stem)):
        raise ValueError(f"{spec}: a parquet file is one split itself; give {path} alone")
    split = split or benchmark.split
    if path.is_file():
        table = _dataset_table(local_dataset(path, split), spec, path)
    else:
        table = _dataset_table(_dataset(path, config or benchmark.config, split, bool(config)), spec, path)
    if benchmark.images and "image" not in table.columns:
        images = _dataset_table(_dataset(path, benchmark.images, split, True), f"{path}:{benchmark.images}", path)
        table = _joined(table, images, benchmark.group)
    return table


def rows_table(name: str, rows: list[dict[str, Any]], folder: Path) -> Table:
    """A table of rows that are in memory."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return Table(name, columns, len(rows), rows.__getitem__, rows.__getitem__, folder)


def read_json(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON or JSONL file, whatever its ending: a list, one a line, or an object of records by their id.

    Raises:
        ValueError: Not JSON, or not records.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
        found = json.loads(content)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or too deep
        if not str(error).startswith("Extra data"):
            raise ValueError(f"{path} is not JSON: {error}") from error
        found = [_line(path, number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if isinstance(found, dict):
        lists = [found[name] for name in _LISTS if isinstance(found.get(name), list)]
        by_id = [{"question_id": name, **one} for name, one in found.items() if isinstance(one, dict)]
        found = lists[0] if lists else by_id if len(by_id) == len(found) else [found]
    if not isinstance(found, list) or not found or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{path} holds {type(found).__name__} {str(found)[:60]!r}; expected a list of objects")
    return found


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error})") from error


def _csv_rows(path: Path, delimiter: str) -> list[dict[str, Any]]:
    """Rows of a TSV or CSV file. An `image` is base64, a path, or the `index` of the row that has it (MMBench)."""
    csv.field_size_limit(_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            rows: list[dict[str, Any]] = [
                _whole(row, f"{path}, line {reader.line_num}")
                for row in reader
                if any(isinstance(value, str) and value.strip() for value in row.values())
            ]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error
    if not rows:
        raise ValueError(f"{path} holds no rows; expected a line of column names, and one a question")
    by_index = {index_of(row.get("index")): row.get("image") for row in rows}
    for row in rows:
        image = by_index.get(index_of(row.get("image")), row.get("image"))
        if image and len(image) > 255:
            try:
                image = base64.b64decode(image, validate=True)
            except ValueError as error:
                raise ValueError(f"{path}, `index` {row.get('index')}: `image` is not base64 ({error})") from error
        if image is not None:
            row["image"] = image
    return rows


def _whole(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row with a field for each column; ValueError for another number, as where a comma stands in a text."""
    surplus: list[str] = row.pop(None, [])  # type: ignore[call-overload]
    while surplus and not surplus[-1].strip():  # separators at the end of a line
        surplus.pop()
    columns = len(row)
    fields = columns + len(surplus) - sum(value is None for value in row.values())
    if fields != columns:
        raise ValueError(f"{where}: {fields} fields in {columns} columns; put texts with the separator in quotes")
    return row


def _dataset(path: Path, config: str, split: str, named: bool) -> Any:
    """A Hugging Face data set, on disk or from the hub; `named`: the user names the config, which must be there."""
    if not path.exists():
        if HUB_NAME.fullmatch(str(path)):
            return load_from_hub(str(path), split, config or None)
        raise FileNotFoundError(
            f"data {str(path)!r} is not there (current folder: {Path.cwd()}); expected a file *.json, *.jsonl, *.tsv, "
            "*.csv or *.parquet, a folder with a Hugging Face data set, or the name of one on the hub, the last two "
            "also with :split or :config:split"
        )
    shards: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted(path.rglob("*.parquet")) if path.is_dir() else ():
        folders = [part for part in file.relative_to(path).parts[:-1] if part != "data"]
        shards["/".join(folders)][_SHARD.sub("", file.stem)].append(str(file))
    if not shards:
        return local_dataset(path, split)
    if config not in shards:
        if len(shards) > 1 or named:
            raise ValueError(
                f"{path} has no config {config!r}; it has {', '.join(map(repr, shards))}. Name one: "
                f"{path}:{next(iter(shards))}:{split}"
            )
        config = next(iter(shards))
    if split not in shards[config]:
        found = list(shards[config])
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(found)}. Name one: {path}:{found[0]}")
    import datasets

    return datasets.load_dataset("parquet", data_files=shards[config][split], split="train")


def _dataset_table(dataset: Any, name: str, path: Path) -> Table:
    images, packed = image_columns(dataset), json_columns(dataset)
    labels = {column: kind.names for column, kind in dataset.features.items() if hasattr(kind, "names")}
    own_name = len(images) == 1 and not {"image", "images"} & set(dataset.column_names)  # of the column of images
    whole = dataset.with_format("arrow")
    light = whole.remove_columns(images)

    def reading(rows: Any) -> Callable[[int], dict[str, Any]]:
        def read(index: int) -> dict[str, Any]:
            row = plain_row(rows[index], f"data set {name}, row {index}", packed)
            row = {c: _label(labels[c], v) if c in labels else v for c, v in row.items()}
            return {"image": row[images[0]], **row} if own_name and rows is whole else row

        return read

    folder = path if path.is_dir() else path.parent
    columns, alias = [*dataset.column_names, *(["image"] if own_name else [])], images[0] if own_name else ""
    return Table(name, columns, len(dataset), reading(whole), reading(light), folder, tuple(images), alias)


def _label(names: list[str], number: int | None) -> str | None:
    """None, too, where a number says that there is none: -1, as in test splits."""
    return None if number is None or number < 0 else names[number]


def _joined(table: Table, images: Table, column: str) -> Table:
    """Rows of `table` with the image of `images` whose `id` stands in their `column`."""
    if column not in table.columns or not {"id", "image"} <= set(images.columns):
        raise ValueError(
            f"{table.name} has the columns {table.columns} and {images.name} {images.columns}; expected {column!r} in "
            "the first, `id` and `image` in the second"
        )
    places = {images.facts(number)["id"]: number for number in range(images.size)}

    def row(index: int) -> dict[str, Any]:
        found = table.row(index)
        if (name := found[column]) not in places:
            raise RecordError(f"{table.name}, row {index}: image {name!r} is not in {images.name}")
        return {**found, "image": images.row(places[name])["image"]}

    return replace(table, columns=[*table.columns, "image"], row=row)
