"""`report.html` of a run: one file without anything from elsewhere, made from what lies in the run's folder.

python -m himap_train.analysis.report --run runs/quickstart     # make it again
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from himap_train.analysis.curves import draw_curves, read_curves
from himap_train.analysis.samples import FOLDER, saved_samples
from himap_train.command_line import run_command
from himap_train.storage import atomic_file
from himap_train.structured import read_text

REPORT = "report.html"
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
