"""The rows of an ablation as a Markdown table, and as heat maps over two things that were varied."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from himap_train.benchmark.benchmark_tables import MIB
from himap_train.evaluation.accuracy_against_cost import mean_and_spread
from himap_train.evaluation.tables import markdown_lines
from himap_train.pruning.schedule import PruningSchedule
from himap_train.pruning.stage import PruningStage

Panels = dict[tuple[str, str, str], dict[tuple[str, str], float]]
"""Title, what goes down and what goes across -> label down and label across -> score in %."""
_PARTS = ("criterion", "layer", "keep")
_COSTS = ("`flops_ratio`", "image only", "prefill, ms", "of dense", "decode, ms", "of dense")
_SIZES = ("peak, MiB", "of dense", "KV, MiB", "of dense")


class Line:
    """The rows of one schedule, one a seed.

    Attributes:
        rows: As `ablation_rows` has them.
        parts: Stage by stage its criteria, its layers, and what it keeps; a range of layers counts once.
        places: The last stage of each among all of the schedule.
        scores: In %, one a seed.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows, self.places = rows, list[int]()
        self.parts: tuple[list[str], ...] = [], [], []
        waits: PruningStage | None = None
        for number, stage in enumerate(PruningSchedule.from_dict(rows[0]["schedule"]).stages):
            if stage.waits:
                waits = waits or stage
                continue
            layer = f"{waits.layer}..{stage.layer} <{waits.attention_below}" if waits else str(stage.layer)
            labels = stage.criterion, layer, str(next(iter(stage.keep.to_dict().values())))
            for part, label in zip(self.parts, labels, strict=True):
                part.append(label)
            self.places.append(number)
            waits = None
        self.scores = [100 * row["overall"]["score"] for row in rows]

    def mean(self, *keys: str | int) -> float:
        """The figure that stands under these keys of a row."""
        found: list[Any] = list(self.rows)
        for key in keys:
            found = [value[key] for value in found]
        return statistics.fmean(found)


def lines_of(rows: Sequence[dict[str, Any]]) -> list[Line]:
    """Rows of the same schedule together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row["schedule"]), []).append(row)
    return [Line(group) for group in groups.values()]


def ablation_table(lines: Sequence[Line]) -> str:
    """GitHub Markdown, ending with what its numbers are; the first line is dense."""
    first = lines[0].rows[0]
    header = ["criteria", "layers", "keep", f"{first['metric']}, %", "image tokens", *_COSTS, *_SIZES]
    return (
        f"{markdown_lines(header, [_cells(line, lines[0]) for line in lines])}\n{first['overall']['count']} samples; ± "
        "standard error of the mean, or standard deviation over the seeds where tokens are drawn. Times and memory: a "
        "batch of prompts, vision tower included; medians of the prefill and of a decoded token, and of their ratios "
        "in pairs with dense; the most bytes of the prefill beside weights and inputs, and its cache.\n"
    )


def _cells(line: Line, dense: Line) -> list[str]:
    error = line.rows[0]["overall"]["standard_error"] if len(line.rows) == 1 else None
    tokens = [line.mean("image_tokens"), *(line.mean("kept", place) for place in line.places)]
    cells = [", ".join(line.parts[0]) or "dense", *map(", ".join, line.parts[1:])]
    cells += [mean_and_spread(line.scores) + ("" if error is None else f" ± {100 * error:.1f}")]
    cells += [" -> ".join(f"{count:.1f}".removesuffix(".0") for count in tokens)]
    cells += [f"{line.mean(ratio, 'mean'):.3f}" for ratio in ("flops_ratio", "image_only_flops_ratio")]
    for name in ("prefill", "decode"):
        seconds, ratio = (line.mean(name, figure, "median") for figure in ("seconds", "of_dense"))
        cells += [f"{1000 * seconds:.2f}", f"{ratio:.3f}"]
    for size in ("peak_bytes", "kv_bytes"):
        cells += [f"{line.mean(size) / MIB:.1f}", f"{line.mean(size) / dense.mean(size):.3f}"]
    return cells


def panels_of(lines: Sequence[Line]) -> Panels:
    """A heat map for whatever varies in two directions while the rest stands.

    Of two stages the first against the second, in criteria, in layers or in what they keep; where there is no such,
    all stages together: criteria, layers and what they keep against one another.
    """
    stages, whole = Panels(), Panels()
    for line in lines[1:]:
        joined, score = [", ".join(part) for part in line.parts], statistics.fmean(line.scores)
        for part, name in enumerate(_PARTS):
            a, b = (other for other in range(3) if other != part)
            if len(line.parts[part]) == 2:
                first, second = line.parts[part]
                title = f"{_PARTS[a]} {joined[a]}\n{_PARTS[b]} {joined[b]}"
                stages.setdefault((title, f"{name} of stage 1", f"{name} of stage 2"), {})[first, second] = score
            whole.setdefault((f"{name} {joined[part]}", _PARTS[a], _PARTS[b]), {})[joined[a], joined[b]] = score
    for panels in (stages, whole):  # what has two lines of several cells is more than a line or a diagonal
        lengths = {key: Counter(down for down, _ in cells).values() for key, cells in panels.items()}
        if planes := {key: panels[key] for key, counts in lengths.items() if sum(n > 1 for n in counts) > 1}:
            return planes
    return {}


def draw_heat_maps(panels: Panels, label: str) -> Figure:
    """All panels, of which there is one at least, on one scale of colours."""
    across, down = min(len(panels), 4), math.ceil(len(panels) / 4)
    names = {name for cells in panels.values() for pair in cells for name in pair}
    width = 2.4 + 0.08 * max(map(len, names)) + 0.3 * max(len({column for _, column in c}) for c in panels.values())
    figure = Figure(figsize=(1.2 + width * across, 0.6 + 3.2 * down), layout="constrained")
    places = figure.subplots(down, across, squeeze=False).flatten()
    scores = [score for cells in panels.values() for score in cells.values()]
    low, high = min(scores), max(scores)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    for axes, ((title, vertical, horizontal), cells) in zip(places, panels.items(), strict=False):
        rows, columns = (sorted(dict.fromkeys(key[axis] for key in cells), key=_size) for axis in (0, 1))
        values = [[cells.get((row, column), math.nan) for column in columns] for row in rows]
        shown = axes.imshow(values, vmin=low, vmax=high, aspect="auto")
        for (row, column), score in cells.items():
            colour = "black" if score > (low + high) / 2 else "white"
            axes.text(columns.index(column), rows.index(row), f"{score:.1f}", color=colour, ha="center", va="center")
        slanted = {"rotation": 25, "ha": "right"} if max(map(len, columns)) > 6 else {}
        axes.set_xticks(range(len(columns)), columns, **slanted)
        axes.set_yticks(range(len(rows)), rows)
        axes.set(xlabel=horizontal, ylabel=vertical)
        axes.set_title(title, fontsize=9)
    figure.colorbar(shown, ax=list(places), label=label)
    return figure


def _size(label: str) -> list[float]:
    """What sorts numbers by size, and leaves all else behind them as it came."""
    return [float(part) if part.replace(".", "", 1).isdigit() else math.inf for part in label.split(", ")]
