"""The README's table: what fine-tuning under pruning gives back, against its controls, over several seeds.

python recipes/results_table.py

Each seed fine-tunes the embedded model three times for the same number of steps: pruned by HiMAP, dense, and pruned at
random. The first is `configs/results.yaml`; the controls change nothing but the schedule. Runs that are there already
are not repeated, so an interrupted table goes on where it stopped.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from himap_train.command_line import run_command
from himap_train.evaluation.accuracy_against_cost import mean_and_spread
from himap_train.evaluation.tables import markdown_lines
from himap_train.experiments import common_options, fine_tune_all, rows_of

RUNS: dict[str, list[str]] = {
    "himap": [],
    "random": ["configs/control_random.yaml"],
    "dense": ["configs/control_dense.yaml"],
}
# Run and row of its metrics.json -> name in the table; the rows before training are the same in every run.
ROWS = {
    ("himap", "dense, not fine-tuned"): "dense, not fine-tuned",
    ("himap", "training-free pruned"): "HiMAP, training-free",
    ("himap", "adapted pruned"): "HiMAP, adapted",
    ("himap", "adapted, evaluated dense"): "HiMAP, adapted, run dense",
    ("dense", "fine-tuned dense"): "fine-tuned dense",
    ("dense", "fine-tuned dense, then pruned"): "fine-tuned dense, then HiMAP",
    ("random", "training-free pruned"): "random, training-free",
    ("random", "adapted pruned"): "random, adapted",
}


def main(seeds: list[int] = [0, 1, 2], output: Path = Path("runs/results"), workers: int = 2) -> None:  # noqa: B006
    """Run what is missing, then print and save the table.

    Args:
        seeds: One fine-tuning of each kind for each.
        output: Folder of the runs, results.md and results.json.
        workers: Runs at a time, one thread each.
    """
    # The rows before training do not depend on the seed: the first is enough.
    jobs = {output / f"{kind}-{seed}": options(kind, seed, seed == seeds[0]) for kind in RUNS for seed in seeds}
    fine_tune_all(jobs, workers)
    text, figures = tabulate(output, seeds)
    (output / "results.md").write_text(text, encoding="utf-8")
    (output / "results.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(text)


def options(kind: str, seed: int, before: bool) -> list[str]:
    """Options of one run of the ordinary command line."""
    return [*common_options(seed, *RUNS[kind]), "--evaluation.before", "true" if before else "false"]


def tabulate(output: Path, seeds: list[int]) -> tuple[str, dict[str, Any]]:
    """Markdown with mean ± standard deviation over the seeds, and the same figures as JSON types."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for kind in RUNS:
        for seed in seeds:
            for row in rows_of(output / f"{kind}-{seed}"):
                if (kind, row["name"]) in ROWS:
                    found[ROWS[kind, row["name"]]].append(row)
    types = sorted(next(iter(found.values()))[0]["types"])
    header = ["", "image tokens", "`flops_ratio`", "overall", *types]
    lines: list[list[str]] = []
    figures = {}
    for name in ROWS.values():
        rows = found[name]
        scores = {"overall": [100 * row["overall"]["score"] for row in rows]}
        scores |= {kind: [100 * row["types"][kind]["score"] for row in rows] for kind in types}
        tokens = " -> ".join(f"{count:.0f}" for count in (rows[0]["image_tokens"], *rows[0]["kept"]))
        cells = [mean_and_spread(scores["overall"])]
        cells += [f"{statistics.mean(scores[kind]):.0f}" for kind in types]
        lines.append([name, tokens, f"{rows[0]['cost']['flops_ratio']:.2f}", *cells])
        figures[name] = {"scores": scores, "tokens": tokens, "cost": rows[0]["cost"], "schedule": rows[0]["schedule"]}
    count = found["HiMAP, adapted"][0]["overall"]["count"]
    note = (
        f"Exact match in %, {count} test questions; mean ± standard deviation over seeds {', '.join(map(str, seeds))}."
    )
    return f"{markdown_lines(header, lines)}\n{note}\n", figures


if __name__ == "__main__":
    sys.exit(run_command(main))
