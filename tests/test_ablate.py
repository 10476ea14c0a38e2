"""`recipes/ablate.py`: which schedules a grid holds, rows that are measured once, the table and its heat maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from recipes_cli import run_recipe
from tiny import tiny_llava, tiny_processor

from himap_train import PruningSchedule, PruningStage
from himap_train.benchmark import ablation_rows
from himap_train.benchmark.ablation import CONTROLS, PRESETS, Grid, read_grids, schedules_of
from himap_train.benchmark.ablation_results import ablation_table, draw_heat_maps, lines_of, panels_of
from himap_train.benchmark.ablation_rows import run_all, runs_of, timed_batch
from himap_train.benchmark.contenders import scheduled
from himap_train.benchmark.tasks import inference_task
from himap_train.data.sources import open_source
from himap_train.evaluation.compare import evaluate_row
from himap_train.models.install import install_pruning
from himap_train.models.loading import EMBEDDED, load_llava

QUICK = ("--limit", 4, "--rounds", 1, "--timed_prompts", 2, "--controls", "[random]", "--seeds", "[0,1]")
GRID = ("--layers", "[[1],[3,4]]", "--ratios", "[[0.5],[0.25]]", "--criteria", "[[instruction],[image]]")


def schedules(preset: str, depth: int, controls: tuple[str, ...] = CONTROLS) -> list[PruningSchedule]:
    return schedules_of(read_grids(preset), controls, depth, True, False)


def described(schedule: PruningSchedule) -> list[tuple[str, int, float | None]]:
    return [(stage.criterion, stage.layer, stage.keep_ratio) for stage in schedule.stages]


def test_table4_is_the_papers_with_its_controls() -> None:
    found = [described(schedule) for schedule in schedules("table4", 32)]
    alone = [[(name, 2, 0.5)] for name in ("instruction", "image", *CONTROLS)]
    pairs = [("instruction", "instruction"), ("instruction", "image"), *((name, name) for name in CONTROLS)]
    assert found[0] == []
    for expected in (*alone, *([(a, 2, 0.5), (b, 8, 0.125)] for a, b in pairs)):
        assert expected in found
    assert len(found) == 1 + 2 + 4 + 2 * len(CONTROLS)


@pytest.mark.parametrize("depth", [8, 32])
def test_kr_varies_layers_and_then_ratios(depth: int) -> None:
    found = [schedule for schedule in schedules("kr", depth, ()) if schedule.stages]
    layers = {tuple(stage.layer for stage in schedule.stages) for schedule in found}
    ratios = {tuple(stage.keep_ratio for stage in schedule.stages) for schedule in found}
    assert len(layers) == (13 if depth == 32 else 9) and len(ratios) == 9
    assert len(found) == len(set(found)) == len(layers) + len(ratios) - 1
    assert max(max(pair) for pair in layers) < depth


def test_every_preset_fits_decoders_of_any_depth() -> None:
    for preset in PRESETS:
        for depth in (6, 8, 24, 32, 40):
            assert len(schedules(preset, depth)) > 10


def test_impossible_schedules_are_named_and_can_be_left_out() -> None:
    grids = [Grid(layers=[(2, 4), (4, 2), (2, 9)], ratios=[(0.5, 0.25), (0.25, 0.5)])]
    with pytest.raises(ValueError) as refused:
        schedules_of(grids, (), 8, False, False)
    message = str(refused.value)
    assert message.startswith("5 schedules of the grid are impossible (1 are not)")
    assert "instruction at 4 keeps 0.5, image at 2 keeps 0.25: stage at layer 2 follows the one at layer 4" in message
    assert "image at 9 keeps 0.25: stage at layer 9, but the decoder has layers 0 to 7" in message
    assert "instruction at 2 keeps 0.25, image at 4 keeps 0.5: the stage at layer 4 keeps 0.5" in message
    left = schedules_of(grids, (), 8, False, True)
    assert [described(one) for one in left] == [[], [("instruction", 2, 0.5), ("image", 4, 0.25)]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "tabel4"], "did you mean 'table4'"),
        (["--criteria", "[[instruction],[imgae]]"], "did you mean 'image'"),
        (["--controls", "[unifrom]"], "did you mean 'uniform'"),
        (["--layers", "[[1,2]]"], "--layers for 1, --ratios for 2, --criteria for 2 stages"),
        (["--layers", "[[1,3],[2]]"], "instruction at 3 keeps 0.5, image at 2 keeps 0.125"),
        (["--layers", "[]"], "--layers for 0"),
        (["--metrics", "[exat]"], "choose from exact"),
    ],
)
def test_what_it_refuses_before_the_model_is_read(
    options: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("himap_train.checkpoints.load.load_with_schedule", pytest.fail)
    assert run_recipe("ablate", "--output", tmp_path / "new", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_ranking_that_nobody_trained_is_refused(capsys: Any, tmp_path: Path) -> None:
    options = ["--layers", "[[1]]", "--ratios", "[[0.5]]", "--criteria", "[[learned]]", "--output", tmp_path]
    assert run_recipe("ablate", "--data", "embedded:validation?scenes=3", *options) == 2
    assert "criterion learned: this checkpoint has no ranking at layer 1, but at []" in capsys.readouterr().err
    assert run_recipe("ablate", "--metrics", "[none]", *options) == 2
    assert "an ablation compares scores" in capsys.readouterr().err


def test_depth_sets_one_layer_for_all_against_one_for_each() -> None:
    found = schedules("depth", 8, ("uniform",))
    fixed = {one.stages[0].layer for one in found if len(one.stages) == 1}
    waiting = [[(stage.layer, stage.attention_below) for stage in one.stages] for one in found if one.by_sample]
    assert fixed == {1, 2, 3, 4} and len(waiting) == 2 * 4
    assert waiting[0] == [(1, 0.1), (2, 0.1), (3, 0.1), (4, None)]
    lines = lines_of(fake_rows(runs_of(found, [0]), lambda one, seed: len(one.stages) / 10))
    assert "| instruction | 1..4 <0.75 | 0.125 | 40.0 ± 1.2 | 16 -> 8 |" in ablation_table(lines)
    cells = panels_of(lines)["keep 0.125", "criterion", "layer"]
    assert cells["uniform", "1..4 <0.1"] == pytest.approx(40) and len(cells) == 2 * 8


def test_chance_gets_every_seed_and_all_else_one() -> None:
    by_chance = PruningSchedule((PruningStage(1, "random", 0.5),))
    assert runs_of([PruningSchedule(), by_chance], [3, 4]) == [(PruningSchedule(), 3), (by_chance, 3), (by_chance, 4)]


def test_a_stopped_ablation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    runs = runs_of(schedules("table4", 8), [0])
    done: list[Any] = []

    def measure(run: Any) -> dict[str, Any]:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(run)
        return {"score": len(done), "nan": float("nan")}

    with pytest.raises(KeyboardInterrupt):
        run_all(runs, measure, tmp_path, {"data": "one"})
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["score"] for row in rows] == [1, 2, 3] and rows[0]["nan"] is None
    again: list[Any] = []
    found = run_all(runs, lambda run: {"score": again.append(run) or 0}, tmp_path, {"data": "one"})
    assert again == runs[3:]
    assert [row["score"] for row in found] == [1, 2, 3, *[0] * (len(runs) - 3)]
    assert [row["run"]["schedule"] for row in found] == [schedule.to_dict() for schedule, _ in runs]
    # Other data is measured anew, and what there was stays.
    assert run_all(runs[:1], lambda run: {"score": 7}, tmp_path, {"data": "two"})[0]["score"] == 7
    assert run_all(runs[:1], lambda run: pytest.fail(), tmp_path, {"data": "one"})[0]["score"] == 1
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(ValueError, match="rows.json"):
        run_all(runs, lambda run: pytest.fail(), tmp_path, {})


def fake_rows(runs: Any, score: Any) -> list[dict[str, Any]]:
    spread = {"median": 0.5, "low": 0.4, "high": 0.6}
    return [
        {
            "schedule": one.to_dict(),
            "overall": {"score": score(one, seed), "standard_error": 0.012, "count": 50},
            "metric": "exact",
            "image_tokens": 16.0,
            "kept": [8.0] * len(one.stages),
            **{name: {"mean": 0.25, "sd": 0.0} for name in ("flops_ratio", "image_only_flops_ratio")},
            **{name: {"seconds": spread, "of_dense": spread} for name in ("prefill", "decode")},
            "peak_bytes": 2**20 * (1 + len(one.stages)),
            "kv_bytes": 2**20,
        }
        for one, seed in runs
    ]


def test_the_table_has_a_line_a_schedule_and_the_spread_of_chance() -> None:
    runs = runs_of(schedules("table4", 32), [0, 1, 2])
    rows = fake_rows(runs, lambda one, seed: 0.5 + 0.1 * seed)
    table = ablation_table(lines_of(rows)).splitlines()
    assert len([line for line in table if line.startswith("| ")]) == 2 + len(schedules("table4", 32))
    assert table[2].startswith("| dense |  |  | 50.0 ± 1.2 | 16 | 0.250 |")
    assert "| instruction, image | 2, 8 | 0.5, 0.125 | 50.0 ± 1.2 | 16 -> 8 -> 8 |" in "\n".join(table)
    assert "| random, random | 2, 8 | 0.5, 0.125 | 60.0 ± 10.0 |" in "\n".join(table)
    assert "| 500.00 | 0.500 | 500.00 | 0.500 | 3.0 | 3.000 | 1.0 | 1.000 |" in "\n".join(table)


def test_heat_maps_show_what_varies_in_two_directions() -> None:
    def score(one: PruningSchedule, seed: int) -> float:
        return sum(stage.layer * (stage.keep_ratio or 0) for stage in one.stages) / 100

    def panels(preset: str) -> Any:
        return panels_of(lines_of(fake_rows(runs_of(schedules(preset, 32, ("uniform",)), [0]), score)))

    kr = panels("kr")
    title = "criterion instruction, image\nkeep 0.5, 0.125"
    assert len(kr) == 4 and len(kr[title, "layer of stage 1", "layer of stage 2"]) == 13
    assert kr[title, "layer of stage 1", "layer of stage 2"]["4", "15"] == pytest.approx(4 * 0.5 + 15 * 0.125)
    table4 = panels("table4")
    assert list(table4) == [("layer 2, 8\nkeep 0.5, 0.125", "criterion of stage 1", "criterion of stage 2")]
    assert set(next(iter(table4.values()))) >= {("image", "instruction"), ("image", "image"), ("uniform", "uniform")}
    same = panels("same-criterion")
    assert list(same) == [("layer 2, 8", "criterion", "keep")] and len(next(iter(same.values()))) == 6 * 3
    figure = draw_heat_maps(kr, "score")
    axes = next(axes for axes in figure.axes if axes.get_title() == title)
    labels = [[text.get_text() for text in texts] for texts in (axes.get_yticklabels(), axes.get_xticklabels())]
    assert labels == [["2", "4", "8", "12"], ["8", "12", "15", "20"]]
    kept = next(axes for axes in figure.axes if axes.get_xlabel() == "keep of stage 2")
    assert [text.get_text() for text in kept.get_xticklabels()] == ["0.0625", "0.125", "0.25"]  # by size
    assert axes.images[0].get_array()[1, 2] == pytest.approx(4 * 0.5 + 15 * 0.125)
    assert "3.9" in [text.get_text() for text in axes.texts]


def test_end_to_end_and_again(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_recipe("ablate", "--output", tmp_path, *QUICK, *GRID) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) == 1 + 2 + 2 * 2
    assert [row["run"]["seed"] for row in rows] == [0, 0, 0, 1, 0, 0, 1]
    dense, himap = rows[:2]
    assert (dense["flops_ratio"]["mean"], himap["kept"]) == (1.0, [72.0, 36.0])
    assert himap["flops_ratio"]["mean"] < 0.6 and himap["kv_bytes"] < 0.6 * dense["kv_bytes"]
    assert himap["peak_bytes"] < dense["peak_bytes"]
    assert min(himap[measure]["seconds"]["median"] for measure in ("prefill", "decode")) > 0
    model, processor = load_llava(EMBEDDED)
    install_pruning(model, PruningSchedule.from_dict(himap["schedule"]))
    expected = evaluate_row("", model, processor, open_source("embedded:test"), limit=4, progress=False)
    assert himap["overall"] == pytest.approx(expected.to_dict()["overall"])
    assert (tmp_path / "ablation.md").read_text() in printed and "| random, random | 1, 3 |" in printed
    with Image.open(tmp_path / "heat_maps.png") as picture:
        assert min(picture.size) > 300
    monkeypatch.setattr(ablation_rows, "measured", pytest.fail)
    assert run_recipe("ablate", "--output", tmp_path, *QUICK, *GRID) == 0
    assert capsys.readouterr().out == printed


def test_a_padded_batch_is_decoded_behind_its_padding() -> None:
    model, processor = tiny_llava(), tiny_processor()
    batch = timed_batch(model, processor, open_source("embedded:test"), 3)
    mask = batch.given["attention_mask"]
    assert len(mask) == 3 and "pixel_values" in batch.given
    masks: list[torch.Tensor] = []
    stock = type(model).forward
    task = inference_task(
        "decode", model, scheduled("", PruningSchedule((PruningStage(2, "instruction", 0.5),))), batch
    )
    with pytest.MonkeyPatch.context() as patch, task.within():
        task.prepare()
        patch.setattr(type(model), "forward", lambda *a, **k: (masks.append(k["attention_mask"]), stock(*a, **k))[1])
        task.run()
    assert [one.shape[1] for one in masks] == [mask.shape[1] + 1 + number for number in range(16)]
    assert torch.equal(masks[-1][:, : mask.shape[1]], mask) and bool(masks[-1][:, mask.shape[1] :].all())
