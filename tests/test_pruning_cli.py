"""`pruning:` in a config, and budgets in `finetune.py`, `evaluate.py` and `generate.py`: their command lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace
from pruning_runs import STAGES, config, error_of, logged
from recipes_cli import run_recipe
from training_toys import finetune

from himap_train.checkpoints.load import load_checkpoint
from himap_train.models.install import pruning_of
from himap_train.training.run.finetune_cli import FinetuneCLI
from himap_train.training.run.rehearsal import _scale_learnable, _short_training

ELASTIC = {"budgets": [0.9, 0.95], "self_distillation": {"share": 0.5}}


@pytest.fixture(scope="module")
def elastic(tiny_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An elastic run that went through."""
    folder = tmp_path_factory.mktemp("elastic")
    evaluation = {"budgets": [0.92, 1.0], "before": True}
    assert finetune("--config", config(tiny_path, folder, {"elastic": ELASTIC}, evaluation=evaluation)) == 0
    return folder / "run"


def test_elastic_run_saves_its_schedule_and_measures_budgets(elastic: Path) -> None:
    assert pruning_of(load_checkpoint(elastic)[0]).schedule.to_dict()["stages"] == STAGES
    assert yaml.safe_load((elastic / "pruning.yaml").read_text())["stages"] == STAGES
    written = yaml.safe_load((elastic / "config.yaml").read_text())["pruning"]
    assert written["elastic"]["budgets"] == [0.9, 0.95] and written["curriculum"] is None
    assert written["elastic"]["self_distillation"] == {"share": 0.5, "weight": 1.0, "teacher": 1.0}
    ratios = logged(elastic, "train/flops_ratio")
    assert len(ratios) == 6 and all(0.89 < ratio < 0.96 or ratio == 1.0 for ratio in ratios) and len(set(ratios)) > 2
    assert logged(elastic, "train/divergence")
    rows = {row["name"]: row for row in json.loads((elastic / "metrics.json").read_text())["rows"]}
    assert list(rows) == [
        "dense, not fine-tuned",
        "training-free pruned",
        "training-free pruned at 0.92",
        "adapted pruned",
        "adapted, evaluated dense",
        "adapted pruned at 0.92",  # at 1 it is the dense row
    ]
    assert rows["adapted pruned at 0.92"]["cost"]["flops_ratio"] == pytest.approx(0.92, abs=0.01)
    card = (elastic / "adapter" / "README.md").read_text()
    assert "Trained at every budget (`flops_ratio`) from 0.9 to 0.95 and dense" in card


def test_tokens_that_enter_later_are_measured_so(tiny_path: str, tmp_path: Path) -> None:
    model = {"schedule": {"stages": [], "enter": 2}}
    file = config(tiny_path, tmp_path, {}, model=model, evaluation={"before": True})
    assert finetune("--config", file, "--trainer.max_steps", "1") == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "run/metrics.json").read_text())["rows"]}
    assert list(rows) == [
        "dense, not fine-tuned",
        "training-free pruned",
        "adapted pruned",
        "adapted, evaluated dense",
    ]
    assert rows["adapted pruned"]["cost"]["flops_ratio"] < 1.0
    assert rows["adapted, evaluated dense"]["cost"]["flops_ratio"] == 1.0


def test_curriculum_run_ends_with_its_schedule(tiny_path: str, tmp_path: Path) -> None:
    pruning = {"curriculum": {"shape": "staged", "share": 0.7, "steps": 2}}
    assert finetune("--config", config(tiny_path, tmp_path, pruning, evaluation={"after": False})) == 0
    run = tmp_path / "run"
    assert logged(run, "train/strength") == [0.0, 0.0, 0.0, 0.5, 0.5, 1.0]
    assert logged(run, "image tokens kept") == [1.0, 1.0, 1.0, 0.75, 0.75, 0.5]
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["himap_config"]["pruning"]["curriculum"]["shape"] == "staged"
    assert pruning_of(load_checkpoint(run)[0]).schedule.to_dict()["stages"] == STAGES


def test_resume_refuses_other_budgets(elastic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", str(elastic / "config.yaml"), "--resume", "--pruning.elastic.budgets", "[0.8, 0.95]"]
    assert "pruning.elastic.budgets: [0.9, 0.95] then, [0.8, 0.95] now" in error_of(capsys, *options)


def test_print_config_shows_every_key(tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        FinetuneCLI(["--config", config(tiny_path, tmp_path, {"curriculum": {"share": 0.5}}), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["pruning"]
    assert printed == {
        "learnable": None,
        "elastic": None,
        "curriculum": {"shape": "linear", "share": 0.5, "steps": 4, "phases": None},
        "dense_steps": None,
        "learn_ranking": None,
        "image_tokens": None,
        "text_tokens": None,
    }


def test_dense_steps_behind_phases_keep_all(tiny_path: str, tmp_path: Path) -> None:
    """Of a run whose model is dense in the end: the log says so, and not what the last pruned step kept."""
    phase = {"stages": [{"layer": 1, "criterion": "uniform", "keep_ratio": 0.5}]}
    groups = {"curriculum": {"share": 0.5, "phases": [phase]}}
    file = config(tiny_path, tmp_path, groups, model={"schedule": None}, evaluation={"after": False})
    assert finetune("--config", file) == 0
    assert logged(tmp_path / "run", "image tokens kept") == [0.5] * 3 + [1.0] * 3


@pytest.mark.parametrize("mode", ["elastic", "curriculum"])
def test_rehearsal_keeps_the_mode(
    tiny_path: str, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Budgets of a model with 6 layers and tokens of its own become ones that the embedded model can meet."""
    pruning = {"elastic": {"budgets": [0.05, 0.8]}, "curriculum": {"share": 0.5}}[mode]
    tokens = {"image_tokens": 5760, "text_tokens": 10} if mode == "elastic" else {}
    file = config(tiny_path, tmp_path, {mode: pruning, **tokens}, evaluation={"after": False, "budgets": [0.05]})
    assert finetune("--config", file, "--rehearse", "--trainer.max_steps", "2") == 0
    written = yaml.safe_load((tmp_path / "run-rehearsal" / "config.yaml").read_text())
    assert written["evaluation"]["budgets"][0] > 0.05 and "cannot go below a budget" in capsys.readouterr().out
    if mode == "elastic":
        assert written["pruning"]["elastic"]["budgets"][0] > 0.05
        assert written["pruning"]["elastic"]["budgets"][1] == 0.8
        assert written["pruning"]["image_tokens"] is None


def test_rehearsal_of_what_only_a_deep_decoder_has(tiny_path: str, tmp_path: Path) -> None:
    """Stages near its end, in phases of a curriculum too, and beyond the 32 layers that presets are written for."""
    deep = {"stages": [{"layer": 36, "criterion": "uniform", "keep_ratio": 0.5}]}
    late = {"stages": [{"layer": 31, "criterion": "uniform", "keep_ratio": 0.5}]}
    groups = {"curriculum": {"share": 0.5, "phases": [late]}}
    file = config(tiny_path, tmp_path, groups, model={"schedule": deep}, evaluation={"after": False})
    assert finetune("--config", file, "--rehearse", "--trainer.max_steps", "2") == 0
    written = yaml.safe_load((tmp_path / "run-rehearsal" / "config.yaml").read_text())
    assert written["pruning"]["curriculum"]["phases"][0]["stages"][0]["layer"] == 7
    assert written["model"]["schedule"]["stages"][0]["layer"] == 7


@pytest.mark.parametrize(("first", "layers"), [(2, [1]), (3, [2]), (12, [12, 38]), (2, [0, 1, 20])])
def test_what_is_given_stays_before_what_learns(first: int, layers: list[int]) -> None:
    """In a rehearsal, whatever rounding does to their layers."""
    stages = [{"layer": at, "criterion": "uniform", "keep_ratio": 0.9 - n / 10} for n, at in enumerate(layers)]
    learnable = Namespace(first_layer=first, switch_layer=None, start={"stages": stages})
    _scale_learnable(learnable, 8)
    found = [stage["layer"] for stage in learnable.start["stages"]]
    assert [at < learnable.first_layer for at in found] == [at < first for at in layers]
    assert found == sorted(set(found)) and found[-1] < 8


def test_rehearsal_under_torchrun_keeps_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("WORLD_SIZE", "6")
    trainer = Namespace(
        max_steps=-1, accumulate_grad_batches=1, strategy="ddp", devices=8, num_nodes=2, accelerator="auto"
    )
    _short_training(trainer)
    assert (trainer.devices, trainer.num_nodes) == (3, 2)


@pytest.mark.parametrize(
    ("pruning", "model", "message"),
    [
        ({"elastic": {"budgets": [0.9, 0.3]}}, {}, "pruning.elastic.budgets is [0.9, 0.3], which is upside down"),
        ({"elastic": {"budgets": [0.1, 0.9]}}, {}, "pruning.elastic.budgets: the budget 0.1 is below"),
        ({"elastic": {"budgets": [0.9, 1.0]}}, {"schedule": None}, "such as himap, or leave pruning.elastic out"),
        ({"elastic": {"budgets": [0.9, 1.0]}, "curriculum": {}}, {}, "pruning.elastic and pruning.curriculum both"),
        ({"curriculum": {"share": 3}}, {}, "pruning.curriculum.share is 3.0; expected a share"),
        ({"curriculum": {"shape": "lin"}}, {}, "linear"),
        ({"elastic": {"budgts": [0.9, 1.0]}}, {}, "Did you mean 'pruning.elastic.budgets'?"),
        ({"elastic": {"budgets": [0.9, 1], "self_distillation": {"shar": 1}}}, {}, "elastic.self_distillation.share'?"),
        ({"elastik": {"budgets": [0.9, 1.0]}}, {}, "Did you mean 'pruning.elastic.budgets'?"),
    ],
)
def test_wrong_settings_end_with_a_message(
    tiny_path: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    pruning: dict[str, Any],
    model: dict[str, Any],
    message: str,
) -> None:
    """Before weights are loaded."""
    monkeypatch.setattr("himap_train.training.module.load_llava", None)
    assert message in error_of(capsys, "--config", config(tiny_path, tmp_path, pruning, model=model))


def test_option_of_a_mode_names_the_nearest(tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = config(tiny_path, tmp_path, {})
    message = error_of(capsys, "--config", file, "--pruning.curriculum.shar", "0.5")
    assert "Did you mean 'pruning.curriculum.share'?" in message


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"budgets": [0.1]}, "evaluation.budgets: the budget 0.1 is below"),
        ({"budgets": [40]}, "evaluation.budgets is 40"),
    ],
)
def test_wrong_evaluation_budgets(
    tiny_path: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    evaluation: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr("himap_train.training.module.load_llava", None)
    assert message in error_of(capsys, "--config", config(tiny_path, tmp_path, {}, evaluation=evaluation))


# ---- one checkpoint, any budget ----


def test_evaluate_at_a_budget(elastic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--checkpoint", elastic, "--limit", 4, "--max-new-tokens", 2]
    ratios = {}
    for budget in ("0.85", "0.95", "1"):
        folder = tmp_path / budget
        assert run_recipe("evaluate", *given, "--budget", budget, "--output", folder) == 0
        (row,) = json.loads((folder / "metrics.json").read_text())["rows"]
        ratios[budget] = row["cost"]["flops_ratio"]
        assert f"as-saved at {float(budget)}" in row["name"]
        assert [stage["layer"] for stage in row["schedule"]["stages"]] == ([1] if budget != "1" else [])
    assert ratios == {"0.85": pytest.approx(0.85, abs=0.01), "0.95": pytest.approx(0.95, abs=0.01), "1": 1.0}


def test_generate_at_a_budget_of_its_own_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--schedule", "himap", "--max-new-tokens", 2, "--show-kept", tmp_path / "kept.png"]
    assert run_recipe("generate", *given, "--budget", "0.5") == 0
    assert (tmp_path / "kept.png").exists()


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("evaluate", ["--budget", "0.4", "--schedule", "none"], "--budget 0.4 with --schedule none"),
        ("evaluate", ["--budget", "40"], "--budget is 40.0; expected a flops_ratio above 0 and at most 1"),
        ("evaluate", ["--budget", "0.4"], "was saved without a schedule"),
        ("evaluate", ["--budget", "0.05", "--schedule", "himap"], "Give at least 0."),
        ("generate", ["--budget", "0.4", "--schedule", "none"], "--budget 0.4 with --schedule none"),
        ("generate", ["--budget", "0.05", "--schedule", "himap"], "Give at least 0."),
    ],
)
def test_budgets_that_cannot_be(
    recipe: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_recipe(recipe, *options) == 2
    assert message in capsys.readouterr().err
