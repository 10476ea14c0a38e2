"""The table of adapted methods: what its runs differ in, and what is read from them; and the picture of such tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recipes_cli import recipe_module

from himap_train.evaluation.accuracy_against_cost import Scores, draw_trade_off, save_trade_off
from himap_train.experiments import CONFIGS
from himap_train.pruning.schedule import PruningSchedule

ROOT = Path(__file__).parents[1]
BUDGETS, DATA = [0.1, 0.2, 0.6], {"train": "embedded:fine-train", "test": "embedded:fine-test"}


@pytest.fixture(scope="module")
def recipe() -> Any:
    return recipe_module("adapted_table")


def fake_run(folder: Path, scores: dict[str, float]) -> None:
    folder.mkdir(parents=True)
    rows = [
        {"name": name, "overall": {"score": score}, "flops_ratio": {"mean": 0.4, "sd": 0.0}}
        for name, score in scores.items()
    ]
    (folder / "metrics.json").write_text(json.dumps({"rows": rows}))


def test_runs_of_one_seed_differ_in_the_method_alone(recipe: Any, tmp_path: Path) -> None:
    names = list(recipe.FORMS)
    found = dict(recipe.jobs(tmp_path, names, BUDGETS, [0, 1], 150, DATA))
    assert {folder.name for folder in found} == {f"{name}-{seed}" for name in ["dense", *names] for seed in (0, 1)}
    before = []
    for folder, given in found.items():
        value = {part: given[place + 1] for place, part in enumerate(given) if part.startswith("--")}
        name, seed = folder.name.rsplit("-", 1)
        assert value["--seed_everything"] == value["--data.seed"] == seed and value["--trainer.max_steps"] == "150"
        assert value["--data.train"] == DATA["train"] and value["--data.test"] == DATA["test"]
        schedule = PruningSchedule.from_dict(json.loads(value["--model.schedule"]))
        assert schedule == recipe.FORMS.get(name, PruningSchedule())
        configs = [given[place + 1] for place, part in enumerate(given) if part == "--config"]
        assert configs == [*CONFIGS, *(["configs/elastic.yaml"] if schedule.stages else [])]
        assert all((ROOT / config).is_file() for config in configs)
        pays = ("dart", "sparsevlm", "last_token", "instruction", "himap", "hidrop")  # one of eight layers in full
        lowest = 0.2 if name in pays else 0.1
        assert value.get("--pruning.elastic.budgets") == (f"[{lowest}, 0.6]" if schedule.stages else None)
        if value["--evaluation.before"] == "true":
            before.append(folder.name)
    assert before == [f"{name}-0" for name in ["dense", *names] if "learned" not in name]


def test_a_method_without_a_budget_is_refused(recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"himap meets no budget of \[0.1\], it needs 0.2: .* leave it out"):
        dict(recipe.jobs(tmp_path, ["himap"], [0.1], [0], 150, DATA))


def test_what_is_read_from_the_runs(recipe: Any, tmp_path: Path) -> None:
    for seed in (0, 1):
        both = {f"{row} pruned at {b}": 0.5 + seed / 10 for row in ("training-free", "adapted") for b in BUDGETS}
        for name in ("uniform", "learned", "himap"):
            fake_run(tmp_path / f"{name}-{seed}", both | {"adapted, evaluated dense": 0.8})
        fake_run(tmp_path / f"dense-{seed}", {"fine-tuned dense": 0.9, "dense, not fine-tuned": 0.6 + seed})
    scores, dense = recipe.results(tmp_path, ["uniform", "learned", "himap"], BUDGETS, [0, 1])
    assert list(scores) == ["uniform", "uniform, adapted", "learned, adapted", "himap", "himap, adapted"]
    assert list(scores["himap, adapted"]) == [0.2, 0.6] and list(scores["uniform"]) == BUDGETS
    assert scores["uniform"][0.2] == [(0.4, 50.0)] and scores["learned, adapted"][0.6] == [(0.4, 50.0), (0.4, 60.0)]
    assert dense["dense, fine-tuned"] == [90.0, 90.0] and dense["dense, not fine-tuned"] == [60.0]
    assert dense["learned, adapted, run dense"] == [80.0, 80.0]


def test_table_and_picture(tmp_path: Path) -> None:
    three = {budget: [(budget, 80.0 + place) for place in range(3)] for budget in BUDGETS}
    scores = {"learned": three, "training-free": {budget: [(budget, 70.0)] for budget in BUDGETS}}
    dense = {"dense fine-tuned": [90.0, 91.0, 92.0], "elastic, run dense": [89.0, 90.0, 91.0]}
    text = save_trade_off(tmp_path, scores, dense)
    assert text == (tmp_path / "budgets.md").read_text()
    assert "| learned | 81.0 ± 1.0 | 81.0 ± 1.0 |" in text and "| training-free | 70.0 | 70.0 |" in text
    assert "dense fine-tuned: 91.0 ± 1.0" in text
    assert json.loads((tmp_path / "budgets.json").read_text())["scores"]["learned"]["0.2"][2] == [0.2, 82.0]
    assert (tmp_path / "budgets.png").stat().st_size > 10_000


def test_picture_shows_means_and_spreads() -> None:
    scores: Scores = {
        "a": {0.3: [(0.3, 80.0), (0.31, 84.0)], 0.6: [(0.6, 90.0), (0.6, 90.0)]},
        "b": {0.3: [(0.3, 70.0)]},
    }
    axes = draw_trade_off(scores, [91.0]).axes[0]
    line: Any = axes.containers[0].lines[0]  # type: ignore[union-attr]
    assert line.get_ydata().tolist() == [82.0, 90.0] and line.get_xdata().tolist() == pytest.approx([0.305, 0.6])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dense, fine-tuned", "a", "b"]
