"""`recipes/search_schedule.py` from the command line: what it leaves in its folder, and what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml
from recipes_cli import run_recipe

from himap_train.embedded.model import embedded_model_path
from himap_train.models.loading import load_config
from himap_train.pruning.reading import read_schedule
from himap_train.search.trials import Objective

DATA = "embedded:validation?scenes=12&seed=5"


def search(folder: Path, *options: object) -> int:
    return run_recipe("search_schedule", "--data", DATA, "--output", folder, "--trials", 3, *options)


def test_two_budgets_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search(tmp_path, "--budgets", "[0.4,0.255]") == 0
    printed = capsys.readouterr().out
    assert "saliency, image to text" in printed
    assert "preset himap" in printed
    files = ["schedule-0.255.yaml", "schedule-0.40.yaml", "search.json", "trials.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    facts = json.loads((tmp_path / "search.json").read_text())
    trials = list(csv.DictReader((tmp_path / "trials.csv").open()))
    config = load_config(embedded_model_path())
    for budget, one in zip((0.4, 0.255), facts["budgets"], strict=True):
        schedule = read_schedule(tmp_path / one["file"])
        cost = schedule.cost(config, facts["image_tokens"], facts["text_tokens"])
        assert cost.flops_ratio == pytest.approx(budget, rel=0.01)
        own = [row for row in trials if float(row["budget"]) == budget]
        best = min(own, key=lambda row: float(row["loss"]))
        assert len(own) == one["trials"] == 3
        assert json.loads(best["schedule"]) == schedule.to_dict() == one["best"]["schedule"]
        assert one["best"]["loss"] <= one["preset"]["loss"] + 0.02
    # One batch: the flow, the dense loss and, for each budget, the preset and three trials.
    assert (facts["samples"], facts["forward_passes"]) == (12, 2 + 2 * (1 + 3))


def test_a_found_schedule_is_what_evaluate_takes(tmp_path: Path) -> None:
    assert search(tmp_path / "found", "--budget", 0.4, "--method", "flow") == 0
    schedule = tmp_path / "found/schedule-0.40.yaml"
    data = "embedded:validation?scenes=7"
    assert run_recipe("evaluate", "--data", data, "--schedule", schedule, "--output", tmp_path / "evaluated") == 0
    row = json.loads((tmp_path / "evaluated/metrics.json").read_text())["rows"][0]
    assert row["schedule"] == yaml.safe_load(schedule.read_text())
    assert row["cost"]["flops_ratio"] == pytest.approx(0.4, rel=0.05)  # prompts are shorter than whole conversations


@pytest.mark.parametrize(("call", "trials"), [(4, [1]), (6, [3])], ids=["within a budget", "at the next one's preset"])
def test_ctrl_c_saves_what_was_tried(tmp_path: Path, monkeypatch, capsys, call: int, trials: list[int]) -> None:
    calls = []
    real = Objective.__call__

    def interrupted(self, schedule):
        calls.append(schedule)
        if len(calls) == call:  # dense, preset and three trials at 0.4, the preset at 0.6
            raise KeyboardInterrupt
        return real(self, schedule)

    monkeypatch.setattr(Objective, "__call__", interrupted)
    with pytest.raises(SystemExit) as stopped:
        search(tmp_path, "--budgets", "[0.4,0.6]")
    assert stopped.value.code == 130
    assert "interrupted; what was tried is saved" in capsys.readouterr().err
    facts = json.loads((tmp_path / "search.json").read_text())["budgets"]
    assert [one["trials"] for one in facts] == trials
    assert facts[0]["interrupted"] == (call == 4)
    assert read_schedule(tmp_path / "schedule-0.40.yaml") in calls[2:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--follow-links", "--budget", "0.05"], "Give at least"),  # an option of `open_samples`, and without a value
        (["--budget", "0.4", "--budgets", "[0.4]"], "give --budget 0.4 or --budgets"),
        ([], "give --budget 0.4 or --budgets"),
        (["--budget", "0.4", "--criteria", "[instruction,imgae]"], "did you mean 'image'"),
        (["--budget", "0.4", "--stages", "8"], "give 1 to 7"),
        (["--budget", "0.4", "--trials", "0"], "give at least 1"),
    ],
)
def test_what_it_refuses(tmp_path: Path, capsys, options: list[str], message: str) -> None:
    arguments = ["--data", DATA, "--output", tmp_path / "new", *options]
    assert run_recipe("search_schedule", *arguments) == 2
    assert message in capsys.readouterr().err


def test_results_that_are_there_stay(tmp_path: Path, capsys) -> None:
    (tmp_path / "schedule-0.40.yaml").write_text("mine")
    assert search(tmp_path, "--budget", 0.4) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "schedule-0.40.yaml").read_text() == "mine"
    (tmp_path / "schedule-mine.yaml").write_text("mine")  # which no search has written
    assert search(tmp_path, "--budget", 0.5) == 2  # of whatever budget
    assert search(tmp_path, "--budget", 0.5, "--overwrite", "true") == 0
    assert sorted(path.name for path in tmp_path.glob("schedule-*")) == ["schedule-0.50.yaml", "schedule-mine.yaml"]
