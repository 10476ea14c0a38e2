"""`report.html` of a run: one file without anything from elsewhere, made from what lies in the run's folder.

python -m himap_train.analysis.report --run runs/quickstart     # make it again
"""

from __future__ import annotations

import base64
import csv
import io
import sys
from collections import defaultdict
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup
from matplotlib.figure import Figure

from himap_train.analysis.samples import FOLDER, saved_samples
from himap_train.command_line import run_command
from himap_train.evaluation.tables import COLOURS
from himap_train.storage import atomic_file
from himap_train.structured import named, read_text

REPORT = "report.html"
PANELS = (  # title, and how the names of its curves begin
    ("loss", ("train/loss", "val/loss")),
    ("accuracy while training", ("val/accuracy", "val/accuracy_dense")),
    ("kept after the last stage, and FLOPs", ("image tokens kept", "train/flops_ratio")),
    ("keep ratio of a layer", ("keep_ratio/",)),
    ("learning rate", ("lr-",)),
)
Curves = dict[str, dict[int, float]]
_TEMPLATE = Path(__file__).parents[1] / "assets/report.html"


def write_report(run: Path) -> Path:
    """Write the report of a finished run into its folder: scores, samples, curves, and the card of its adapter.

    Args:
        run: A folder that `finetune.py` wrote. What it does not hold (a table, where nothing was measured) is left out.

    Returns:
        The file.

    Raises:
        FileNotFoundError: It holds no adapter, and so no finished run.
        ValueError: A file in it cannot be what the run wrote.
    """
    card, table = run / "adapter/README.md", run / "table.md"
    if not card.is_file():
        raise FileNotFoundError(f"{run} holds no finished run ({card} is not there); give the folder of one")
    curves = draw_curves(read_curves(run))
    drawn = io.BytesIO()
    if curves is not None:
        curves.savefig(drawn, format="png", dpi=100)
    samples = [
        {**sample, "pictures": [_embedded(run / FOLDER / Path(name).name) for name in sample["pictures"]]}
        for sample in saved_samples(run)
    ]
    text = read_text(card).removeprefix("---\n").partition("---\n")[2]  # what stands before is for the hub
    title, _, rest = text.strip().removeprefix("# ").partition("\n")
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(_TEMPLATE.read_text(encoding="utf-8"))
    content = page.render(
        title=title,
        run=str(run),
        table=_html(read_text(table)) if table.is_file() else "",
        chart=_embedded(run / "accuracy.png"),
        samples=samples,
        curves=_data(drawn.getvalue()),
        card=_html(rest.replace("this-folder", str(run / "adapter"))),
        config=read_text(run / "config.yaml"),
    )
    with atomic_file(run / REPORT) as file:
        file.write_text(content, encoding="utf-8")
    return run / REPORT


def main(run: Path) -> None:
    """Make the report of a run again.

    Args:
        run: The folder that finetune.py wrote.
    """
    print(f"wrote {write_report(run)}")


def read_curves(run: Path) -> Curves:
    """Name to value at each step. Of a run in pieces, the later piece holds where two have a step.

    Raises:
        ValueError: A log is no table of numbers.
    """
    curves: Curves = defaultdict(dict)
    files = (run / "logs").glob("version_*/metrics.csv")
    for file in sorted(files, key=lambda file: int(file.parent.name.removeprefix("version_"))):
        with named(file, "is no log of a run"), file.open(encoding="utf-8", newline="") as lines:
            for line in csv.DictReader(lines):
                for name, value in line.items():
                    if value:
                        curves[name][int(line["step"])] = float(value)
    return curves


def draw_curves(curves: Curves) -> Figure | None:
    """A panel for each of `PANELS` that the log has something of; None where it has nothing."""
    panels = [(title, sorted(name for name in curves if name.startswith(starts))) for title, starts in PANELS]
    panels = [(title, names) for title, names in panels if names]
    if not panels:
        return None
    figure = Figure(figsize=(3.6 * len(panels), 2.9), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, name in enumerate(names):
            steps, values = zip(*sorted(curves[name].items()), strict=True)
            axes.plot(steps, values, ".-", color=COLOURS[number % len(COLOURS)], label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
    return figure


def _html(text: str) -> Markup:
    """Markdown as HTML; tags in it are shown, and nothing is linked or fetched."""
    reader = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image", "link", "autolink"])
    return Markup(reader.render(text).replace("image_only_", "image_only_<wbr>"))  # or the widest table is too wide


def _embedded(picture: Path) -> str:
    """A picture as the address of an image, "" where there is none."""
    return _data(picture.read_bytes()) if picture.is_file() else ""


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}" if png else ""


if __name__ == "__main__":
    sys.exit(run_command(main))
