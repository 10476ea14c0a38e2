"""Searches, ablations and information flows: what was measured stays, what changed is measured anew, on any records."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from recipes_cli import recipe_module, run_recipe

from himap_train.analysis import knockout
from himap_train.embedded.model import embedded_model_path
from himap_train.evaluation.samples import open_samples
from himap_train.models.loading import EMBEDDED, load_config
from himap_train.search.space import Space

SCENES = "embedded:validation?scenes=6&seed=5"
QUICK = ("--limit", 4, "--rounds", 1, "--timed-prompts", 2, "--controls", "[]")
ONE = ("--layers", "[[1]]", "--ratios", "[[0.5]]", "--criteria", "[[instruction]]")


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Twelve records of text alone and three with an image behind them."""
    said = [{"from": "human", "value": "what is red ?"}, {"from": "gpt", "value": "sun"}]
    shown = [{"from": "human", "value": "<image>\nwhat is red ?"}, {"from": "gpt", "value": "sun"}]
    rows: list[dict[str, Any]] = [{"id": f"t{n}", "conversations": said} for n in range(12)]
    for number in range(3):
        Image.new("RGB", (20, 20), "red").save(tmp_path / f"{number}.png")
        rows.append({"id": f"i{number}", "image": f"{number}.png", "conversations": shown})
    (tmp_path / "mixed.json").write_text(json.dumps(rows))
    return tmp_path / "mixed.json"


def _ablate(folder: Path, *options: object) -> int:
    return run_recipe("ablate", *QUICK, *ONE, "--output", folder, *options)


def _times(folder: Path) -> list[float]:
    return [row["seconds"] for row in json.loads((folder / "rows.json").read_text())["rows"]]


def test_samples_are_drawn_among_records_with_images(records: Path) -> None:
    for seed in range(3):
        drawn = open_samples(EMBEDDED, str(records), samples=2, seed=seed)[2]
        assert drawn.count == 2 and drawn.too_long == 0
    assert open_samples(EMBEDDED, str(records), samples=9)[2].count == 3
    only_text = json.loads(records.read_text())[:12]
    records.write_text(json.dumps(only_text))
    with pytest.raises(ValueError, match="none of 12 records can be searched on: 0 may have an image"):
        open_samples(EMBEDDED, str(records), samples=9)


def test_turns_that_do_not_fit_are_counted(records: Path) -> None:
    (row,) = json.loads(records.read_text())[-1:]
    answers = [{"from": "human", "value": "what is red ?"}, {"from": "gpt", "value": "sun " * 60}] * 20
    row["conversations"] = [row["conversations"][0], *answers[1:]]
    records.write_text(json.dumps([row]))
    drawn = open_samples(EMBEDDED, str(records), samples=1, each_turn=True)[2]
    assert drawn.too_long > 0 and drawn.count + drawn.too_long == 20


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("ablate", ("--checkpoint", "misspelt", *ONE)),
        ("search_schedule", ("--checkpoint", "misspelt", "--budget", 0.4)),
        ("search_schedule", ("--data", SCENES, "--budget", 0.01)),
        ("information_flow", ("--checkpoint", "misspelt")),
        ("evaluate", ("--checkpoint", "misspelt")),
    ],
)
def test_a_failed_run_takes_no_old_results_away(recipe: str, options: tuple[Any, ...], tmp_path: Path) -> None:
    names = ("rows.json", "search.json", "schedule-0.40.yaml", "schedule-0.01.yaml", "flow.json", "metrics.json")
    for name in names:
        (tmp_path / name).write_text("old")
    assert run_recipe(recipe, *options, "--overwrite", "--output", tmp_path) == 2
    assert all((tmp_path / name).read_text() == "old" for name in names)


def test_rows_of_data_that_has_changed_are_measured_anew(records: Path, tmp_path: Path) -> None:
    rows = json.loads(records.read_text())[12:]
    records.write_text(json.dumps(rows))
    folder = tmp_path / "rows"
    assert _ablate(folder, "--data", records) == 0
    first = _times(folder)
    assert _ablate(folder, "--data", records) == 0
    assert _times(folder) == first and len(first) == 2
    rows[0]["conversations"][1]["value"] = "moon"
    records.write_text(json.dumps(rows))
    os.utime(records, (0, 0))
    assert _ablate(folder, "--data", records) == 0
    assert _times(folder)[:2] == first and len(_times(folder)) == 4
    assert _ablate(folder, "--data", records, "--overwrite") == 0
    assert len(_times(folder)) == 2


def test_an_ablation_tolerates_what_it_is_told_and_needs_an_image(records: Path, tmp_path: Path, capsys: Any) -> None:
    assert _ablate(tmp_path / "a", "--data", records) == 2
    assert "no usable record that is evaluated has an image" in capsys.readouterr().err
    rows = json.loads(records.read_text())[12:]
    rows[1]["image"] = "gone.png"
    records.write_text(json.dumps(rows))
    assert _ablate(tmp_path / "b", "--data", records, "--max-skipped", 0) == 2
    assert "max_skipped" in capsys.readouterr().err
    assert _ablate(tmp_path / "b", "--data", records, "--max-skipped", 1) == 0
    for name in ("--rounds", "--timed-prompts"):
        assert _ablate(tmp_path / "c", name, 0) == 2
        assert "both must be at least 1" in capsys.readouterr().err


def test_saliency_is_kept_where_a_budget_or_a_knock_out_ends(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(knockout, "knock_out", _interrupted)
    with pytest.raises(SystemExit) as end:
        run_recipe("information_flow", "--data", SCENES, "--samples", 6, "--output", tmp_path, "--budget", 0.01)
    assert end.value.code == 130
    told = capsys.readouterr().err
    assert "no schedule is suggested for --budget 0.01" in told and "has all but the knock-outs" in told
    assert {path.name for path in tmp_path.iterdir()} == {"flow.csv", "flow.json", "flow.png", "map.png"}


def _interrupted(*given: Any, **named: Any) -> Any:
    raise KeyboardInterrupt


def test_a_learned_ranking_is_searched_where_it_is(tmp_path: Path) -> None:
    config = load_config(embedded_model_path())
    with pytest.raises(ValueError, match="no learned ranking; leave the criterion learned out"):
        Space(config, 0.4, 144, 20, criteria=["learned", "image"], free_criteria=True)
    space = Space(config, 0.4, 144, 20, criteria=["learned", "image"], free_criteria=True, ranked={0})
    assert space.point([5, 0], [0.5]).criteria == ("learned", "image")
    assert space.point([2, 5], [0.5]).criteria == ("image", "image")
    found = space.schedule(space.point([0, 5], [0.5]))
    assert found is not None and [stage.criterion for stage in found.stages] == ["learned", "image"]
    assert space.schedule(space.point([2, 5], [0.5], ["learned", "image"])) is None
    folder = _ranked_checkpoint(tmp_path)
    options = ("--criteria", "[learned,image]", "--free-criteria", "true", "--budget", 0.4, "--trials", 12)
    out = tmp_path / "found"
    assert run_recipe("search_schedule", "--checkpoint", folder, "--data", SCENES, *options, "--output", out) == 0
    facts = json.loads((out / "search.json").read_text())
    assert (facts["criteria"], facts["free_criteria"], facts["stages"]) == (["learned", "image"], True, 2)
    assert any("learned" in line for line in (out / "trials.csv").read_text().splitlines())


def _ranked_checkpoint(folder: Path) -> Path:
    """An adapter of the embedded model that was trained for one step under a learned ranking at layer 0."""
    schedule = "{stages: [{layer: 0, criterion: learned, keep_ratio: 0.3}]}"
    options = {
        "model.path": EMBEDDED, "model.schedule": schedule, "trainer.max_steps": 1, "trainer.accelerator": "cpu",
        "data.train": "embedded:train?scenes=8", "data.validation": "null", "evaluation.before": "false",
        "evaluation.after": "false", "output": folder / "run", "loggers": "[]", "model.lora_r": 2,
    }  # fmt: skip
    argv = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert recipe_module("finetune").main(argv) == 0
    return folder / "run"
