"""Results as Markdown and JSON, with what a time depends on beside the code: machine, versions, and its other users."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from himap_train.benchmark.measurements import Point
from himap_train.benchmark.timing import Spread
from himap_train.evaluation.tables import markdown_lines, write_json
from himap_train.storage import atomic_file
from himap_train.versions import package_versions

FILES = ("benchmark.json", "benchmark.md")
MIB = 2**20
_EXPLAINED = """Every method is timed in pairs with dense: medians, quartiles in brackets. Dense has the layer loop, the
attention kernel and the loss of the pruned rows, so ratios are due to pruning alone; the row `stock` says what is not.
`bound`: the ratio by FLOPs (training step, prefill) or by bytes read (decode); `efficiency`: bound / time ratio.
`causal bound`: by the FLOPs that the causal mask does not hide. A decode time is that of one token. `choosing`: the
share of a prefill that choosing the tokens takes, in pairs with one that keeps as many tokens, the first ones. Peaks
leave weights and inputs out.
"""
_HEADER = [
    *("method", "ms", "dense, ms", "ratio", "bound", "efficiency", "causal bound", "efficiency", "choosing, %"),
    *("peak, MiB", "dense", "KV, MiB", "dense", "tokens/s"),
]


def save(facts: dict[str, Any], found: Sequence[tuple[Point, dict[str, Any]]], folder: Path) -> str:
    """Write `FILES` and return the Markdown.

    Args:
        facts: Command, environment and settings, as JSON types.
        found: What was measured at each point.
        folder: Where to.
    """
    parts, rows = [heading(facts) + _EXPLAINED], [row for point, row in found if not point.axis]
    for measure in dict.fromkeys(row["measure"] for row in rows):
        lines = [_cells(row) for row in rows if row["measure"] == measure]
        parts.append(f"## {measure.replace('_', ' ')}\n\n{markdown_lines(_HEADER, lines)}")
    series: dict[str, list[dict[str, Any]]] = {point.axis: [] for point, _ in found if point.axis}
    for axis, along in series.items():
        along += [{"value": point.value, **row} for point, row in found if point.axis == axis]
        lines = [[str(row["value"]), row["measure"], *_cells(row)] for row in along]
        header = [axis, "measure", *_HEADER]
        parts.append(f"## Along {axis.replace('_', ' ')}\n\n{markdown_lines(header, lines)}")
    if facts.get("out_of_memory"):
        parts.append(f"Out of memory: {'; '.join(facts['out_of_memory'])}.\n")
    return write_results(folder, FILES, facts | {"rows": rows, "series": series}, "\n".join(parts))


def write_results(folder: Path, files: Sequence[str], facts: dict[str, Any], text: str) -> str:
    """Write facts as JSON into the first of `files`, the text into the second; returns it."""
    write_json(folder / files[0], facts)
    with atomic_file(folder / files[1]) as file:
        file.write_text(text, encoding="utf-8")
    return text


def heading(facts: dict[str, Any]) -> str:
    """The command, and where it ran."""
    place, settings = facts["environment"], facts["settings"]
    machine = place["gpu"] or f"{place['processor']}, {place['threads']} of {place['cores']} cores"
    versions = ", ".join(f"{name} {place['versions'][name]}" for name in ("torch", "transformers", "peft"))
    shown = ", ".join(f"{name}={value}" for name, value in settings.items())
    return (
        f"# Benchmark\n\n`{facts['command']}`\n\n{machine}; {versions}; load average {place['load']} before, "
        f"{facts['load_after']} after.\n\n{shown}.\n\n"
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    """As in `_HEADER`."""
    times = [spread(row["seconds"], 1000, 2), spread(row["dense_seconds"], 1000, 2), spread(row["ratio"], 1, 3)]
    bounds = [row[name] for name in ("bound", "efficiency", "causal_bound", "causal_efficiency")]
    choosing = "" if row["choosing"] is None else spread(row["choosing"], 100, 1)
    sizes = [row[name] for name in ("peak", "dense_peak", "kv", "dense_kv")]
    return [
        *(row["method"], *times, *(_number(value, 1, 3) for value in bounds), choosing),
        *(_number(value, 1 / MIB, 1) for value in sizes),
        f"{row['tokens_per_second']:.0f}",
    ]


def spread(values: Spread, factor: float, digits: int) -> str:
    """Median with quartiles."""
    low, high = (f"{factor * value:.{digits}f}" for value in (values.low, values.high))
    return f"{factor * values.median:.{digits}f} [{low}, {high}]"


def _number(value: float | None, factor: float, digits: int) -> str:
    return "" if value is None else f"{factor * value:.{digits}f}"


def environment(device: str) -> dict[str, Any]:
    """Facts as JSON types; `load` is the machine's own one-minute average, None where it has none."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "system": platform.platform(),
        "versions": package_versions(),
        "load": load_average(),
    }


def command_line() -> str:
    """What a user would type to run this process again."""
    return shlex.join(["python", *sys.argv])


def load_average() -> float | None:
    """Runnable processes, averaged over the last minute; the benchmark itself is about one of them."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
