"""Rows of measurements as a table on the screen, as Markdown, JSON and a picture."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from himap_train.evaluation.compare import Row
from himap_train.evaluation.result import Measured
from himap_train.evaluation.sample_metric import GroupScore
from himap_train.storage import atomic_file

COLOURS = ("#4c566a", "#d08770", "#2a9d8f", "#5e81ac", "#b48ead", "#a3be8c", "#bf616a", "#ebcb8b")
FILES = ("metrics.json", "table.md", "accuracy.png")


def save_table(rows: Sequence[Row], folder: Path | str, facts: dict[str, Any] | None = None) -> str:
    """Write metrics.json, table.md and accuracy.png.

    Args:
        rows: The lines of the table.
        folder: Made if it is not there.
        facts: Further entries of metrics.json (the checkpoint, the data, versions).

    Returns:
        The table as Markdown.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown_table(rows)
    write_json(folder / "metrics.json", {**(facts or {}), "rows": [row.to_dict() for row in rows]})
    (folder / "table.md").write_text(text, encoding="utf-8")
    draw_chart(rows).savefig(folder / "accuracy.png", dpi=120)
    return text


def print_table(rows: Sequence[Row]) -> None:
    """The table on standard output, turned: one column a row, as many beside one another as fit with no word cut."""
    console = Console()
    names, *cells = _cells(rows)
    names = [name.replace("only_", "only_\n") for name in names]  # or it alone would take a third of a terminal
    while cells:
        widths = [_least_width(column, console.width) for column in (names, *cells)]
        fits = np.cumsum(widths)[1:] < console.width
        shown = [names, *cells[: max(1, fits.sum())]]
        table = Table()
        for number, (column, width) in enumerate(zip(shown, widths, strict=False)):
            side: Literal["left", "right"] = "right" if number else "left"
            table.add_column(column[0], justify=side, min_width=width - 4, overflow="fold")
        for line in zip(*(column[1:] for column in shown), strict=True):
            table.add_row(*line)
        console.print(table)
        cells = cells[len(shown) - 1 :]


def _least_width(column: Sequence[str], available: int) -> int:
    """Of a column with its border: no word of its heading is cut, no figure but one that takes half of the screen."""
    heading, *cells = column
    parts = [*heading.split(), *(part for cell in cells for part in re.split(" -> |\n", cell))]
    return min(4 + max(map(len, parts)), available // 2 - 1)  # one more than it has, which rich may take by rounding


def markdown_table(rows: Sequence[Row]) -> str:
    """The table as GitHub Markdown, ending with what its numbers are."""
    header, *lines = _cells(rows)
    table, result = markdown_lines(header, lines), rows[0].result
    spread = "; tokens and ratios ± standard deviation over samples" if any(r.schedule.by_sample for r in rows) else ""
    score = f"{result.metric} score in %, ± standard error of the mean over {result.overall.count} samples"
    return f"{table}\n{score}{spread}.\n"


def markdown_lines(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A GitHub Markdown table of figures: the first column left, the others right; what would end a cell is escaped."""
    marks = [":--", *["--:"] * (len(header) - 1)]
    escaped = ([" ".join(cell.split()).replace("|", r"\|") for cell in line] for line in (header, marks, *lines))
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def screen_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, **look: Any) -> Table:
    """A table for a console: the first `left` columns to the left, the others to the right; `look` as rich has it."""
    table = Table(title=title, **look)
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < left else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    return table


def write_json(file: Path, content: Any) -> None:
    """Write what `json_ready` makes of it; the file is whole or not there."""
    with atomic_file(file) as part:
        part.write_text(json.dumps(json_ready(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def json_ready(value: Any) -> Any:
    """Dataclasses as objects, tuples as lists, and null for NaN and infinities, which JSON does not have."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """Header and one line of text a row."""
    if not rows:
        raise ValueError("there are no rows to make a table of")
    types = sorted({name for row in rows for name in row.result.types})
    header = ["", "overall", *types, "image tokens", "flops_ratio", "image_only_flops_ratio"]
    lines = []
    for row in rows:
        scores = [_score(row.result.types.get(name)) for name in types]
        cost = [_ratio(row, ratio) for ratio in (row.result.flops_ratio, row.result.image_only_flops_ratio)]
        lines.append([row.name, _score(row.result.overall, spread=True), *scores, tokens_text(row), *cost])
    return [header, *lines]


def tokens_text(row: Row) -> str:
    """Image tokens of a sample and what each stage leaves: "144 -> 72 -> 18"; means where samples differ, and where
    that is the schedule's doing their standard deviation: "144 -> 51.3 ± 12.0".
    """
    spreads = row.result.kept_sd if row.schedule.by_sample else (0.0,) * len(row.result.kept)
    numbers = zip((row.result.image_tokens, *row.result.kept), (0.0, *spreads), strict=True)
    return " -> ".join(
        f"{mean:.0f}"
        if abs(mean - round(mean)) < 0.05 and sd < 0.05
        else f"{mean:.1f}" + (f" ± {sd:.1f}" if sd else "")
        for mean, sd in numbers
    )


def _ratio(row: Row, measured: Measured | None) -> str:
    """Mean over samples, with the standard deviation where the schedule lets samples keep numbers of their own."""
    if measured is None:
        return ""
    return f"{measured.mean:.3f}" + (f" ± {measured.sd:.3f}" if row.schedule.by_sample else "")


def _score(score: GroupScore | None, spread: bool = False) -> str:
    if score is None or math.isnan(score.score):
        return ""
    error = f" ± {100 * score.standard_error:.1f}" if spread and math.isfinite(score.standard_error) else ""
    return f"{100 * score.score:.1f}{error}"


def draw_chart(rows: Sequence[Row]) -> Figure:
    """Bars with standard errors, overall first; beside them overall accuracy over `flops_ratio` where it is known."""
    types = sorted({name for row in rows for name in row.result.types})
    with_cost = any(row.cost for row in rows)
    widths = [max(4.0, 1.0 + 0.25 * (len(types) + 1) * (len(rows) + 1)), 4.5][: 1 + with_cost]
    figure = Figure(figsize=(sum(widths), 4.4), layout="constrained")
    axes = figure.subplots(1, len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})[0]
    _bars(axes[0], rows, types)
    if with_cost:
        _cost(axes[1], rows)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(rows)), frameon=False)
    return figure


def _bars(axes: Axes, rows: Sequence[Row], types: list[str]) -> None:
    places, width = np.arange(len(types) + 1), 0.8 / len(rows)
    for number, row in enumerate(rows):
        groups = [row.result.overall, *(row.result.types.get(name) for name in types)]
        heights = [100 * group.score if group else 0.0 for group in groups]
        errors = [100 * np.nan_to_num(group.standard_error) if group else 0.0 for group in groups]
        offsets = places + (number - (len(rows) - 1) / 2) * width
        bars = axes.bar(offsets, heights, width, yerr=errors, label=row.name, color=_colour(number), ecolor="#999999")
        axes.bar_label(bars, fmt="%.0f", fontsize=6, padding=1)
    many = len(types) > 3
    axes.set_xticks(places, ["overall", *types], rotation=30 if many else 0, ha="right" if many else "center")
    axes.set_ylim(0, 105)
    axes.set_ylabel(f"{rows[0].result.metric} score, %")
    axes.spines[["top", "right"]].set_visible(False)


def _cost(axes: Axes, rows: Sequence[Row]) -> None:
    for number, row in enumerate(rows):
        if ratio := row.result.flops_ratio:
            error = 100 * np.nan_to_num(row.result.overall.standard_error)
            axes.errorbar(ratio.mean, 100 * row.result.overall.score, yerr=error, fmt="o", color=_colour(number))
    axes.set_xlim(0, 1.05)
    axes.set_ylim(0, 105)
    axes.set_xlabel("flops_ratio of the prefill")
    axes.set_ylabel("overall, %")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
