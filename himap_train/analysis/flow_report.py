"""An analysis of the information flow on disk and on the screen: tables, pictures by layer, a map over an image."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from himap_train.analysis.flow_table import ALL, NORMALISATIONS, Row, column
from himap_train.analysis.knockout import CUTS, KnockedOut
from himap_train.analysis.pictures import draw_kept
from himap_train.analysis.saliency import SampleFlow
from himap_train.data.images import open_image
from himap_train.evaluation.samples import EncodedSamples
from himap_train.evaluation.tables import screen_table
from himap_train.storage import atomic_file

COLOURS = ("#5e81ac", "#d08770", "#2a9d8f", "#b48ead", "#bf616a")
FLOW, KNOCKOUTS, PICTURE, MAP = "flow.csv", "knockouts.csv", "flow.png", "map.png"


def save_flow(folder: Path, rows: Sequence[Row], cuts: Sequence[Row], knocked_out: Sequence[KnockedOut]) -> None:
    """Write flow.csv, knockouts.csv (if anything was cut) and flow.png; rows and cuts are those of `flow_table`."""
    for name, table in ((FLOW, rows), (KNOCKOUTS, cuts)):
        if table:
            with atomic_file(folder / name) as part, part.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(table[0]))
                writer.writeheader()
                writer.writerows({key: _cell(value) for key, value in row.items()} for row in table)
    with atomic_file(folder / PICTURE) as part:
        draw_flow(rows, knocked_out).savefig(part, dpi=120, format="png")


def _cell(value: Any) -> Any:
    """Six digits; nothing where there is no number."""
    return value if not isinstance(value, float) else "" if math.isnan(value) else f"{value:.6g}"


def save_map(file: Path, samples: EncodedSamples, flows: Sequence[SampleFlow]) -> None:
    """Draw over the first image of the first sample, as a PNG, what each of its tokens gives to text, the more the
    brighter.

    Raises:
        ValueError: The family does not tell where its tokens lie.
    """
    record, encoder = samples.first, samples.encoder
    flow = flows[samples.first_place]
    processor, family, image = encoder.processor, encoder.family, encoder.encode(record)["images"][0]
    picture = open_image(record.images[0], record.id, encoder.image_background)
    weights = weights_over_image(flow, family.image_tokens(processor, image))
    drawn = draw_kept(
        family.drawn_over(processor, image, picture),
        list(weights.values()),
        family.token_blocks(processor, image, picture),
        [f"layer {layer}, turn {flow.meta['turn']}" for layer in weights],
    )
    with atomic_file(file) as part:
        drawn.save(part, format="png")


def print_cuts(rows: Sequence[Row]) -> None:
    """Accuracy and consistency of each cut of all samples, on standard output."""
    shown = [
        [row["cut"], row["layers"], f"{row['accuracy']:.3f} ± {row['error']:.3f}", f"{row['consistency']:.3f}",
         f"{row['overlap']:.2f}"]
        for row in rows
        if row["group"] == ALL
    ]  # fmt: skip
    header = ("cut", "layers", "accuracy", "consistency", "overlap")
    Console().print(screen_table("answers where a window of layers is cut", header, shown, left=2))


def draw_flow(rows: Sequence[Row], knocked_out: Sequence[KnockedOut]) -> Figure:
    """What kinds of tokens give under each normalisation; between images and text; shares beside attention; cuts."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    panels = figure.subplots(2, 3)
    for axes, normalisation in zip(panels[0], NORMALISATIONS, strict=True):
        _lines(axes, rows, ("S_sys", "S_img", "S_ins"), normalisation)
        how = "as it is" if normalisation == "none" else f"by number of {normalisation}"
        axes.set(title=f"given by a kind of token, {how}", ylabel="saliency")
    _lines(panels[1, 0], rows, ("S_vv", "S_vt", "S_tv", "S_tt"), "pairs")
    panels[1, 0].set(title="v: image, t: text, from first to second", ylabel="saliency a pair")
    for number, (flow, name) in enumerate((("S_vt", "image to text"), ("S_vv_others", "image to image"))):
        for field, style in (("none", "-"), ("attention", ":")):
            values = np.array(column(rows, flow, field))
            label = f"{name}, {'saliency' if field == 'none' else 'attention'}"
            panels[1, 1].plot(values / values.sum(), style, marker="o", color=COLOURS[number], label=label)
    panels[1, 1].set(title="share of the sum over layers", ylabel="share", ylim=(0, None))
    _cuts(panels[1, 2], knocked_out)
    panels[1, 2].set_visible(bool(knocked_out))
    for axes in panels.flat:
        axes.set_xlabel("layer" if axes is not panels[1, 2] else "middle of the window")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    return figure


def _lines(axes: Axes, rows: Sequence[Row], flows: Sequence[str], normalisation: str) -> None:
    """One line a flow on a logarithmic scale, which has no place for zeros: the label says why they are zero."""
    for name, colour in zip(flows, COLOURS, strict=False):
        reason = next(row["zero"] for row in rows if row["flow"] == name)
        values = [value or np.nan for value in column(rows, name, normalisation)]
        axes.plot(values, marker="o", color=colour, label=name + (f" (0: {reason})" if reason else ""))
    axes.set_yscale("log")


def _cuts(axes: Axes, knocked_out: Sequence[KnockedOut]) -> None:
    """Accuracy by the middle of the window; the last window, the whole decoder, is in the table alone."""
    for name, colour in zip(CUTS, COLOURS, strict=True):
        own = [one for one in knocked_out if one.cut == name][:-1]
        middles = [one.layers.start + (len(one.layers) - 1) / 2 for one in own]
        style = ":" if CUTS[name] else "-"
        axes.plot(middles, [one.accuracy for one in own], style, marker="o", color=colour, label=name)
    for one in knocked_out[:1]:
        axes.axhline(one.accuracy, color="#4c566a", linestyle=":", label="nothing cut")
        axes.set(title="answers with a window of layers cut", ylabel="accuracy", ylim=(0, 1.02))


def weights_over_image(flow: SampleFlow, tokens: int) -> dict[int, dict[int, float]]:
    """For `draw_kept`: of the three layers in which the first image gives most to text what its tokens give, 1 at most.

    Args:
        flow: Of a sample.
        tokens: Image tokens of its first image.
    """
    given = flow.image_to_text[:, :tokens]
    layers = sorted(given.sum(1).topk(min(3, len(given))).indices.tolist())
    return {layer: dict(enumerate((given[layer] / given[layer].max()).nan_to_num().tolist())) for layer in layers}
