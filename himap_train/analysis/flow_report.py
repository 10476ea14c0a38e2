"""An analysis of the information flow on disk and on the screen."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from himap_train.analysis.flow_figures import draw_flow, weights_over_image
from himap_train.analysis.flow_table import ALL, Row
from himap_train.analysis.knockout import KnockedOut
from himap_train.analysis.pictures import draw_kept
from himap_train.analysis.saliency import SampleFlow
from himap_train.data.images import open_image
from himap_train.evaluation.samples import EncodedSamples
from himap_train.storage import atomic_file

FLOW, CUTS, PICTURE, MAP = "flow.csv", "knockouts.csv", "flow.png", "map.png"


def save_flow(folder: Path, rows: Sequence[Row], cuts: Sequence[Row], knocked_out: Sequence[KnockedOut]) -> None:
    """Write flow.csv, knockouts.csv (if anything was cut) and flow.png; rows and cuts are those of `flow_table`."""
    for name, table in ((FLOW, rows), (CUTS, cuts)):
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
    """Draw over the first image of the first sample what each of its tokens gives to text, the more the brighter.

    Args:
        file: A PNG.
        samples: That were measured.
        flows: From `measure`.

    Raises:
        ValueError: The family does not tell where its tokens lie.
    """
    record, encoder = samples.first, samples.encoder
    flow = next(flow for flow in flows if flow.id == record.id)
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
    table = Table(title="answers where a window of layers is cut")
    for name in ("cut", "layers", "accuracy", "consistency", "overlap"):
        table.add_column(name, justify="left" if name in ("cut", "layers") else "right")
    for row in rows:
        if row["group"] == ALL:
            accuracy = f"{row['accuracy']:.3f} ± {row['error']:.3f}"
            table.add_row(row["cut"], row["layers"], accuracy, f"{row['consistency']:.3f}", f"{row['overlap']:.2f}")
    Console().print(table)
