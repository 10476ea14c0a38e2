"""The information flow as pictures: flows by layer, knock-outs by window, and a map over the image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from himap_train.analysis.flow_table import NORMALISATIONS, Row, column
from himap_train.analysis.knockout import CUTS, KnockedOut
from himap_train.analysis.saliency import SampleFlow

COLOURS = ("#5e81ac", "#d08770", "#2a9d8f", "#b48ead", "#bf616a")


def draw_flow(rows: Sequence[Row], knocked_out: Sequence[KnockedOut]) -> Figure:
    """What kinds of tokens give under each normalisation; between images and text; shares beside attention; cuts."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    FigureCanvasAgg(figure)
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


def weights_over_image(flow: SampleFlow, tokens: int, most: int = 3) -> dict[int, dict[int, float]]:
    """For `draw_kept`: of the layers in which the first image gives most to text what its tokens give, 1 at most.

    Args:
        flow: Of a sample.
        tokens: Image tokens of its first image.
        most: So many layers at most, by depth.
    """
    given = flow.image_to_text[:, :tokens]
    layers = sorted(given.sum(1).topk(min(most, len(given))).indices.tolist())
    return {layer: dict(enumerate((given[layer] / given[layer].max()).nan_to_num().tolist())) for layer in layers}
