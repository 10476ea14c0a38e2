"""Many runs of the ordinary command line, for tables: what is there already is not run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from himap_train.analysis.report import REPORT
from himap_train.evaluation.accuracy_against_cost import point

_FINETUNE = Path(__file__).resolve().parents[1] / "recipes/finetune.py"
METRICS = "metrics.json"
CONFIGS = ("configs/quickstart.yaml", "configs/adapted.yaml")
"""Configs of every fine-tuning in the README's tables."""


def common_options(seed: int, *configs: str) -> list[str]:
    """What the fine-tunings of a table share, with a seed and `configs` behind the common ones."""
    merged = [part for config in (*CONFIGS, *configs) for part in ("--config", config)]
    return [*merged, "--seed_everything", str(seed), "--data.seed", str(seed)]


def fine_tune_all(jobs: Mapping[Path, Sequence[str]], workers: int) -> None:
    """Run `recipes/finetune.py` for each folder with its options, `workers` at a time on one thread each.

    Raises:
        RuntimeError: A run failed, or one with other options is there; names its log or its options, which lie beside
            its folder. The others go on to their ends.
    """
    with ThreadPoolExecutor(workers) as pool:
        runs = [pool.submit(_fine_tune, folder, options) for folder, options in jobs.items()]
    for run in runs:
        run.result()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's table."""
    content = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    return list(content["rows"])


def row_of(folder: Path, name: str) -> dict[str, Any]:
    """One row of a run's table.

    Raises:
        ValueError: It has none of that name.
    """
    rows = {row["name"]: row for row in rows_of(folder)}
    if name not in rows:
        raise ValueError(f"{folder} has no row {name!r}, but {', '.join(rows)}: give another --output")
    return rows[name]


def points(output: Path, run: str, seeds: Sequence[int], row: str = "adapted pruned") -> list[tuple[float, float]]:
    """`flops_ratio` and accuracy in % of one row of a run, for each seed."""
    return [point(row_of(output / f"{run}-{seed}", row)) for seed in seeds]


def _fine_tune(folder: Path, options: Sequence[str]) -> None:
    asked, file = json.dumps(list(options), indent=1) + "\n", folder.with_name(f"{folder.name}.options.json")
    if folder.exists() and file.exists() and file.read_text(encoding="utf-8") != asked:
        raise RuntimeError(f"{folder} is a run with other options ({file}): give another --output")
    if (folder / REPORT).exists():  # the last thing that a run writes
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(asked, encoding="utf-8")
    again = ["--resume", "auto"] if (folder / "config.yaml").exists() else []
    command = [sys.executable, str(_FINETUNE), *options, "--output", str(folder), *again]
    with folder.with_name(f"{folder.name}.log").open("w", encoding="utf-8") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"the run {folder} failed with status {done.returncode}; see {log.name}")
