"""The table over budgets: its grid, its runs, the choice on validation scenes, what is printed and drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recipes_cli import recipe_module
from transformers import AutoConfig

from himap_train import PruningSchedule, load_llava
from himap_train.data.sources import open_source
from himap_train.evaluation.accuracy_against_cost import Scores, draw_trade_off, save_trade_off
from himap_train.evaluation.budgeted import prompt_tokens
from himap_train.experiments import CONFIGS
from himap_train.models.loading import EMBEDDED, resolve_model
from himap_train.search.grid import himap_grid

ROOT = Path(__file__).parents[1]
BUDGETS = [0.25, 0.55]


@pytest.fixture(scope="module")
def recipe() -> Any:
    return recipe_module("budgets_table")


def fake_run(folder: Path, scores: dict[str, float]) -> None:
    folder.mkdir(parents=True)
    rows = [
        {"name": name, "overall": {"score": score}, "flops_ratio": {"mean": 0.4, "sd": 0.0}}
        for name, score in scores.items()
    ]
    (folder / "metrics.json").write_text(json.dumps({"rows": rows}))


def grid(recipe: Any, budget: float) -> list[PruningSchedule]:
    return himap_grid(AutoConfig.from_pretrained(resolve_model(EMBEDDED)), budget, *recipe.TOKENS)


def test_every_candidate_meets_its_budget(recipe: Any) -> None:
    config = load_llava("embedded")[0].config
    for budget in BUDGETS:
        found = grid(recipe, budget)
        assert len(found) == 8
        for schedule in found:
            assert schedule.cost(config, *recipe.TOKENS).flops_ratio == pytest.approx(budget, rel=0.02)
            assert [stage.criterion for stage in schedule.stages] == ["instruction", "image"]


def test_the_mean_prompt_is_as_long_as_the_recipe_says(recipe: Any) -> None:
    """Budgets of all methods are for the same sample."""
    _, processor = load_llava("embedded")
    assert prompt_tokens(open_source(recipe.TEST), processor, "as_processor", 70) == recipe.TOKENS


def test_the_best_candidate_is_taken(recipe: Any, tmp_path: Path) -> None:
    candidates = [PruningSchedule(), PruningSchedule.from_preset("himap"), PruningSchedule.from_preset("vtw")]
    for number, score in enumerate((0.7, 0.8, 0.8)):
        fake_run(tmp_path / f"grid-0.25-{number}", {"adapted pruned": score})
    assert recipe.best_of(tmp_path, 0.25, candidates) == PruningSchedule.from_preset("himap")


def test_runs_of_one_seed_differ_in_the_schedule_alone(recipe: Any, tmp_path: Path) -> None:
    schedule = grid(recipe, 0.55)[0]
    found = dict(recipe.jobs(tmp_path, {0.55: schedule}, {0.55: recipe.QUICKSTART}, [1], 300, 600))
    assert [folder.name for folder in found] == [
        "learned-0.55-1",
        "searched-0.55-1",
        "grid-best-0.55-1",
        "random-0.55-1",
        "elastic-1",
        "dense-1",
    ]
    for folder, given in found.items():
        value = {part: given[place + 1] for place, part in enumerate(given) if part.startswith("--")}
        assert value["--seed_everything"] == value["--data.seed"] == "1" and value["--data.test"] == recipe.TEST
        assert value["--trainer.max_steps"] == ("600" if folder.name == "elastic-1" else "300")
        configs = [given[place + 1] for place, part in enumerate(given) if part == "--config"]
        assert configs[:2] == list(CONFIGS) and all((ROOT / config).is_file() for config in configs)
    by_chance = found[tmp_path / "random-0.55-1"]
    stages = json.loads(by_chance[by_chance.index("--model.schedule") + 1])["stages"]
    assert [stage["criterion"] for stage in stages] == ["random", "random"]
    assert [stage["keep_ratio"] for stage in stages] == [stage.keep_ratio for stage in schedule.stages]


def test_table_and_picture(tmp_path: Path) -> None:
    three = {budget: [(budget, 80.0 + place) for place in range(3)] for budget in BUDGETS}
    scores = {"learned": three, "training-free": {budget: [(budget, 70.0)] for budget in BUDGETS}}
    dense = {"dense fine-tuned": [90.0, 91.0, 92.0], "elastic, run dense": [89.0, 90.0, 91.0]}
    text = save_trade_off(tmp_path, scores, dense)
    assert text == (tmp_path / "budgets.md").read_text()
    assert "| learned | 81.0 ± 1.0 | 81.0 ± 1.0 |" in text and "| training-free | 70.0 | 70.0 |" in text
    assert "dense fine-tuned: 91.0 ± 1.0" in text
    assert json.loads((tmp_path / "budgets.json").read_text())["scores"]["learned"]["0.25"][2] == [0.25, 82.0]
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
