"""The README's table: its commands, and means and spreads over seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recipes_cli import recipe_module

from himap_train.experiments import CONFIGS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def recipe() -> Any:
    return recipe_module("results_table")


def fake_run(folder: Path, names: list[str], score: float) -> None:
    folder.mkdir(parents=True)
    group = {"score": score, "standard_error": 0.01, "count": 50}
    row = {"overall": group, "types": {"where": group}, "image_tokens": 144.0, "kept": [86.0, 14.0]}
    rows = [{"name": name, **row, "cost": {"flops_ratio": 0.37}, "schedule": {}} for name in names]
    (folder / "metrics.json").write_text(json.dumps({"rows": rows}))


def test_mean_and_spread_over_seeds(recipe: Any, tmp_path: Path) -> None:
    for kind in recipe.RUNS:
        names = [name for run, name in recipe.ROWS if run == kind]
        for seed, score in enumerate((0.80, 0.82, 0.84)):
            fake_run(tmp_path / f"{kind}-{seed}", names, score)
    text, figures = recipe.tabulate(tmp_path, [0, 1, 2])
    assert "| HiMAP, adapted | 144 -> 86 -> 14 | 0.37 | 82.0 ± 2.0 | 82 |" in text
    assert set(figures) == set(recipe.ROWS.values())
    assert "50 test questions" in text


def test_runs_differ_in_nothing_but_schedule_and_seed(recipe: Any) -> None:
    for kind in recipe.RUNS:
        given = recipe.options(kind, 1, before=False)
        configs = [given[i + 1] for i, part in enumerate(given) if part == "--config"]
        assert all((ROOT / config).is_file() for config in configs)
        assert configs == [*CONFIGS, *recipe.RUNS[kind]]
        assert given[given.index("--data.seed") + 1] == given[given.index("--seed_everything") + 1] == "1"
