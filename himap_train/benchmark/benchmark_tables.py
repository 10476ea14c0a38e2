"""Results as Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from himap_train.benchmark.measured_method import Row
from himap_train.benchmark.plots import draw_series, draw_table
from himap_train.benchmark.timing import Spread
from himap_train.evaluation.tables import json_ready, markdown_lines
from himap_train.storage import atomic_file

FILES = ("benchmark.json", "benchmark.md", "methods.png", "series.png")
MIB = 2**20
_TIMING = ("method", "ms", "dense, ms", "ratio", "bound", "efficiency", "causal bound", "efficiency", "choosing, %")


@dataclass(frozen=True)
class Results:
    """All that a run has found.

    Attributes:
        facts: Command, environment and settings, as JSON types.
        rows: Methods at one shape.
        series: Rows along each axis, with the axis' value.
    """

    facts: dict[str, Any]
    rows: list[Row]
    series: dict[str, list[tuple[int, Row]]]

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            **self.facts,
            "rows": [row.to_dict() for row in self.rows],
            "series": {
                axis: [{"value": value, **row.to_dict()} for value, row in rows] for axis, rows in self.series.items()
            },
        }


def save(results: Results, folder: Path) -> str:
    """Write `FILES` and return the Markdown."""
    text = markdown(results)
    with atomic_file(folder / FILES[0]) as file:
        file.write_text(json.dumps(json_ready(results.to_dict()), indent=2) + "\n", encoding="utf-8")
    with atomic_file(folder / FILES[1]) as file:
        file.write_text(text, encoding="utf-8")
    if results.rows:
        draw_table(results.rows).savefig(folder / FILES[2], dpi=120)
    if results.series:
        draw_series(results.series).savefig(folder / FILES[3], dpi=120)
    return text


def markdown(results: Results) -> str:
    """All tables."""
    parts = [_facts(results.facts)]
    for measure in dict.fromkeys(row.measure for row in results.rows):
        rows = [row for row in results.rows if row.measure == measure]
        parts.append(f"## {measure.replace('_', ' ')}\n\n{markdown_lines(*_method_cells(rows))}")
    for axis, points in results.series.items():
        parts.append(f"## Along {axis.replace('_', ' ')}\n\n{markdown_lines(*_series_cells(axis, points))}")
    return "\n".join(parts)


def _facts(facts: dict[str, Any]) -> str:
    place, settings = facts["environment"], facts["settings"]
    machine = place["gpu"] or f"{place['processor']}, {place['threads']} of {place['cores']} cores"
    versions = ", ".join(f"{name} {place['versions'][name]}" for name in ("torch", "transformers", "peft"))
    shown = ", ".join(f"{name}={value}" for name, value in settings.items())
    return (
        f"# Benchmark\n\n`{facts['command']}`\n\n{machine}; {versions}; load average {place['load']} before, "
        f"{facts['load_after']} after.\n\n{shown}.\n\nEvery method is timed in pairs with dense: medians, quartiles in "
        "brackets. `bound`: the ratio by FLOPs (training step, prefill) or by bytes read (decode); `efficiency`: "
        "bound / time ratio. `causal bound`: by the FLOPs that the causal mask does not hide. A decode time is "
        "that of one token. `choosing`: the share of a prefill that choosing takes, in pairs with one that keeps "
        "as many tokens, the first ones. Peaks leave weights and inputs out.\n"
    )


def _timing_cells(row: Row) -> list[str]:
    """Method, times, ratio, bounds and efficiencies, as in `_TIMING`."""
    times = [spread(row.seconds, 1000, 2), spread(row.dense_seconds, 1000, 2), spread(row.ratio, 1, 3)]
    bounds = (row.bound, row.efficiency, row.causal_bound, row.causal_efficiency)
    choosing = "" if row.choosing is None else spread(row.choosing, 100, 1)
    return [row.method, *times, *(_number(value, 1, 3) for value in bounds), choosing]


def _method_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    header = [*_TIMING, "peak, MiB", "dense", "KV, MiB", "dense"]
    lines = [
        [
            *_timing_cells(row),
            *(_number(value, 1 / MIB, 1) for value in (row.peak, row.dense_peak, row.kv, row.dense_kv)),
            f"{row.tokens_per_second:.0f}",
            row.why,
        ]
        for row in rows
    ]
    return [*header, "tokens/s", "why"], lines


def _series_cells(axis: str, found: Sequence[tuple[int, Row]]) -> tuple[list[str], list[list[str]]]:
    header = [axis, "measure", *_TIMING, "peak ratio", "KV ratio"]
    lines = [
        [
            str(value),
            row.measure,
            *_timing_cells(row),
            _ratio(row.peak, row.dense_peak),
            _ratio(row.kv, row.dense_kv),
        ]
        for value, row in found
    ]
    return header, lines


def spread(values: Spread, factor: float, digits: int) -> str:
    """Median with quartiles."""
    low, high = (f"{factor * value:.{digits}f}" for value in (values.low, values.high))
    return f"{factor * values.median:.{digits}f} [{low}, {high}]"


def _ratio(value: int | None, dense: int | None) -> str:
    return f"{value / dense:.3f}" if value and dense else ""


def _number(value: float | None, factor: float, digits: int) -> str:
    return "" if value is None else f"{factor * value:.{digits}f}"
