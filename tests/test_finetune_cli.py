"""`recipes/finetune.py` and `recipes/export.py` through their command lines: config, errors, run folder, signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from distributed import wait_for
from processes import Fork
from pruning_runs import error_of
from recipes_cli import recipe_module, run_recipe
from training_toys import SCHEDULE, finetune
from transformers import AutoProcessor

from himap_train.checkpoints import agreement
from himap_train.checkpoints.export import export_merged
from himap_train.checkpoints.load import load_checkpoint
from himap_train.data.encode import Encoder
from himap_train.data.module import LlavaDataModule
from himap_train.evaluation.compare import Row, compare
from himap_train.models.families.image_form import FORM_FILE, ImageForm, image_form
from himap_train.models.install import pruning_of
from himap_train.training.init_adapter import processor_of
from himap_train.training.run import measured_rows
from himap_train.training.run.finetune_cli import FinetuneCLI
from himap_train.training.run.folder import claim_folder

SCHEDULER = "lightning.pytorch.callbacks.GradientAccumulationScheduler"


def config(tiny: str, folder: Path, **model: Any) -> dict[str, Any]:
    """A run of seconds on the embedded scenes."""
    return {
        "output": str(folder / "run"),
        "model": {
            "path": tiny,
            "schedule": SCHEDULE,
            "lora_r": 4,
            "lora_alpha": 8,
            "gradient_checkpointing": False,
            **model,
        },
        "data": {
            "batch_size": 2,
            "train_limit": 8,
            "validation_limit": 4,
            "max_length": 400,
            "image_aspect_ratio": "pad",
            "image_background": "black",
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "val_check_interval": 2,
            "limit_val_batches": 1,
            "log_every_n_steps": 1,
        },
        "evaluation": {"limit": 4, "during": 2, "max_new_tokens": 2},
    }


def written(folder: Path, content: dict[str, Any], name: str = "config.yaml") -> str:
    (folder / name).write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(folder / name)


@pytest.fixture(scope="module")
def finished(tiny_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went through."""
    folder = tmp_path_factory.mktemp("finished")
    assert finetune("--config", written(folder, config(tiny_path, folder))) == 0
    return folder / "run"


@pytest.mark.core
def test_run_folder_holds_what_repeats_the_run(finished: Path) -> None:
    names = {entry.name for entry in finished.iterdir()}
    assert names == {
        "config.yaml",
        "versions.json",
        "pruning.yaml",
        "checkpoints",
        "logs",
        "adapter",
        "metrics.json",
        "table.md",
        "accuracy.png",
        "samples",
        "report.html",
    }
    report = (finished / "report.html").read_text(encoding="utf-8")
    assert "adapted, evaluated dense" in report  # the table
    assert report.count("data:image/png") == 2 + 4  # chart and curves, and the four samples of this run
    assert {file.name for file in (finished / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    assert json.loads((finished / "versions.json").read_text())["torch"] == torch.__version__
    rows = json.loads((finished / "metrics.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "dense, not fine-tuned",
        "training-free pruned",
        "adapted pruned",
        "adapted, evaluated dense",
    ]
    assert [bool(row["schedule"]["stages"]) for row in rows] == [False, True, True, False]
    assert "| adapted, evaluated dense |" in (finished / "adapter/README.md").read_text()


def test_rows_are_written_as_they_come(
    tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(model: Any, processor: Any, source: Any, schedules: dict[str, Any], **settings: Any) -> list[Row]:
        if "training-free pruned" in schedules:
            raise ValueError("the power went out")
        return compare(model, processor, source, schedules, **settings)

    monkeypatch.setattr(measured_rows, "compare", breaking)
    assert "power went out" in error_of(capsys, "--config", written(tmp_path, config(tiny_path, tmp_path)))
    rows = json.loads((tmp_path / "run/metrics.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense, not fine-tuned"]


def test_a_dense_run_that_measures_nothing_has_a_report_of_its_training_data(tiny_path: str, tmp_path: Path) -> None:
    run = config(tiny_path, tmp_path, schedule=None)
    run["data"] |= {"validation": None, "test": None}
    run["evaluation"] |= {"before": False, "after": False}
    run["trainer"] = {"accelerator": "cpu", "max_steps": 1}
    assert finetune("--config", written(tmp_path, run)) == 0
    report = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "Scores" not in report and report.count("<td>this run</td>") == 8
    assert report.count("data:image/png") == 8 + ("Curves" in report)


def test_logs_hold_loss_rates_speed_and_both_accuracies(finished: Path) -> None:
    header = (finished / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    wanted = {"train/loss", "val/loss", "val/accuracy", "val/accuracy_dense", "image tokens kept", "tokens/s"}
    wanted |= {"s/step", "min left", "memory GiB"}
    assert wanted | {"lr-AdamW/lora", "lr-AdamW/projector", "train/grad_norm"} <= set(header)
    assert list((finished / "logs" / "tensorboard").glob("events.*"))


def test_resolved_config_repeats_the_run_exactly(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    options = ["--config", str(finished / "config.yaml"), "--output", str(again)]
    assert finetune(*options, "--evaluation.before", "false", "--evaluation.after", "false") == 0
    assert capsys.readouterr().out.count("(expected '") == 2  # answers of the validation
    before, after = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (finished, again)
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.core
def test_trained_checkpoint_loads_with_its_schedule(finished: Path) -> None:
    model, _ = load_checkpoint(finished)
    assert pruning_of(model).schedule.to_dict()["stages"] == SCHEDULE["stages"]


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_export(
    finished: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "_in_fresh_process", agreement.outputs)  # test_export.py starts one
    options = ["--checkpoint", str(finished), "--output", str(tmp_path / form), "--format", form]
    assert run_recipe("export", *options) == 0
    assert "the same image tokens kept" in capsys.readouterr().out
    assert run_recipe("export", *options) == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.core
def test_what_is_trained_is_asked_about_pictures_made_ready_alike(
    finished: Path, tiny_path: str, tmp_path: Path
) -> None:
    checkpoint, trained = finished / "checkpoints/last.ckpt", ImageForm("pad", "black")
    merged = export_merged(finished, tmp_path / "merged")
    (tmp_path / "without").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "himap"):
        (tmp_path / "without" / name).symlink_to(finished / "adapter" / name)
    for folder in (finished, checkpoint, merged, export_merged(checkpoint, tmp_path / "of_file"), tmp_path / "without"):
        encoder = Encoder(load_checkpoint(folder)[1])
        assert ImageForm(encoder.image_aspect_ratio, encoder.image_background) == trained, folder
        assert Encoder(encoder.processor, None, "as_processor").image_aspect_ratio == "as_processor"
    assert image_form(load_checkpoint(tiny_path)[1]) == ImageForm("as_processor", "white")
    for start, adapter in ((str(merged), None), (tiny_path, str(finished)), (tiny_path, str(checkpoint))):
        data = LlavaDataModule(processor=processor_of(start, adapter))  # what goes on training goes on so, too
        assert ImageForm(data.image_aspect_ratio, data.image_background) == trained
    again = AutoProcessor.from_pretrained(merged)  # stock classes read the folder as before
    assert again.image_processor.to_dict() == load_checkpoint(tiny_path)[1].image_processor.to_dict()
    (merged / FORM_FILE).write_text('{"image_aspect_ratio": "square", "image_background": "white"}')
    with pytest.raises(ValueError, match=r"images.json: `image_aspect_ratio` is str 'square'; expected one of as_proc"):
        load_checkpoint(merged)


# ---- the config ----


def build(*options: str) -> FinetuneCLI:
    return FinetuneCLI(list(options))


def test_files_merge_left_to_right_and_options_win(tiny_path: str, tmp_path: Path) -> None:
    first = written(tmp_path, config(tiny_path, tmp_path, lora_lr=0.1, projector_lr=0.1), "a.yaml")
    second = written(tmp_path, {"model": {"lora_lr": 0.2, "projector_lr": 0.2}}, "b.yaml")
    cli = build("--config", first, "--config", second, "--model.lora_lr", "0.3")
    assert (cli.config.model.lora_lr, cli.config.model.projector_lr, cli.config.model.lora_r) == (0.3, 0.2, 4)


def test_print_config_prints_everything_and_reads_back(
    tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, config(tiny_path, tmp_path))
    with pytest.raises(SystemExit) as stop:
        build("--config", file, "--print_config")
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["lora_lr"] == 2e-4 and printed["model"]["schedule"] == SCHEDULE
    again = build("--config", written(tmp_path, printed, "printed.yaml"))
    assert again.config.model.lora_r == 4


def test_checkpoint_path_never_changes_the_config(finished: Path, tmp_path: Path) -> None:
    """Lightning's own CLI would take the stored values over what the command line says."""
    last = str(finished / "checkpoints" / "last.ckpt")
    options = ["--config", str(finished / "config.yaml"), "--output", str(tmp_path / "b"), "--resume", last]
    assert build(*options, "--data.num_workers", "3").config.data.num_workers == 3
    with pytest.raises(ValueError, match=r"model.lora_lr: 0.0002 then, 0.5 now"):
        build(*options, "--model.lora_lr", "0.5")


def test_more_steps_after_the_end(finished: Path, tmp_path: Path) -> None:
    options = ["--config", str(finished / "config.yaml"), "--output", str(tmp_path / "more")]
    last = str(finished / "checkpoints" / "last.ckpt")
    assert finetune(*options, "--resume", last, "--trainer.max_steps", "3", "--evaluation.before", "false") == 0
    assert torch.load(tmp_path / "more" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


def test_scores_of_weights_that_are_no_more_are_shown_nowhere(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    table, card = (run / "metrics.json").read_bytes(), run / "adapter/README.md"
    assert "| adapted pruned |" in card.read_text()
    unmeasured = ["--evaluation.before", "false", "--evaluation.after", "false"]
    options = ["--config", str(run / "config.yaml"), "--output", str(run), "--trainer.max_steps", "3", *unmeasured]
    assert finetune(*options, "--resume") == 0
    assert "| adapted pruned |" not in card.read_text()
    assert "adapted pruned" not in (run / "report.html").read_text()
    assert not (run / "metrics.json").exists() and (run / "earlier-metrics.json").read_bytes() == table


def test_steps_alone_take_as_many_epochs_as_they_need(tiny_path: str, tmp_path: Path) -> None:
    content = config(tiny_path, tmp_path)
    content["trainer"]["val_check_interval"] = None
    file = written(tmp_path, content)
    assert build("--config", file).config.trainer.max_epochs == -1
    assert build("--config", file, "--trainer.max_steps", "-1").config.trainer.max_epochs == 1
    assert build("--config", file, "--trainer.max_epochs", "2").config.trainer.max_epochs == 2
    options = ["--data.train_limit", "2", "--data.validation", "null", "--evaluation.after", "false"]
    assert finetune("--config", file, *options, "--evaluation.before", "false", "--loggers", "[]") == 0
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 2 and saved["epoch"] == 1


def test_without_any_validation_the_last_weights_are_the_best(
    tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = config(tiny_path, tmp_path)
    content["trainer"] |= {"val_check_interval": None, "check_val_every_n_epoch": 2, "max_epochs": 1}
    unmeasured = ["--evaluation.before", "false", "--evaluation.after", "false"]
    assert finetune("--config", written(tmp_path, content), "--keep", "best", *unmeasured) == 0
    assert "nothing was validated" in capsys.readouterr().out
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.lora_rank", "3"], "model.lora_r"),
        (["--model.learning_rate", "3"], "--model.learning_rate"),
        (["--trainer.max_step", "3"], "Did you mean 'trainer.max_steps'?"),
        (["--data.batchsize", "3"], "Did you mean 'data.batch_size'?"),
        (["--outptu", "x"], "Did you mean 'output'?"),
        (["--model.lora_r", "many"], "many"),
        (["--model.projector", "frozen"], "frozen"),
    ],
)
def test_wrong_options(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert message in error_of(capsys, *options)


def test_unknown_key_in_a_file_names_the_nearest(
    tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, config(tiny_path, tmp_path, lora_alfa=3))
    assert "Did you mean 'model.lora_alpha'?" in error_of(capsys, "--config", file)
    file = written(tmp_path, {"trainr": {"max_steps": 2}})
    assert "Did you mean 'trainer.max_steps'?" in error_of(capsys, "--config", file)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"lora_targets": ["query"]}, "['query'] match nothing; the decoder has the linear layers down_proj"),
        ({"schedule": "himpa"}, "did you mean 'himap'?"),
        ({"schedule": {"stages": [{"layer": 9, "criterion": "image", "keep_ratio": 0.5}]}}, "9"),
        ({"schedule": {"stages": [{"layer": 2, "criterion": "imag", "keep_ratio": 0.5}]}}, "did you mean 'image'?"),
        ({"path": "llava-hf/llava-1.5-7b-hf"}, "--config configs/quickstart.yaml"),
        ({"path": "./not-there"}, "give a local folder with the weights"),
    ],
)
def test_wrong_values_end_with_a_message(
    tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: dict[str, Any], message: str
) -> None:
    start = time.monotonic()
    assert message in error_of(capsys, "--config", written(tmp_path, config(tiny_path, tmp_path, **model)))
    assert time.monotonic() - start < 30
    assert not (tmp_path / "run" / "config.yaml").exists()  # the folder is still free


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"precision": "bf16-true"}, "trainer.precision=bf16-true would train in half precision"),
        (
            {"callbacks": [{"class_path": SCHEDULER, "init_args": {"scheduling": {0: 1, 1: 2}}}]},
            "changes the global batch within a run",
        ),
        ({"limit_val_batches": 0}, "keep is best, but trainer.limit_val_batches is 0"),
    ],
)
def test_what_would_go_wrong_in_silence_is_refused(
    tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], trainer: dict[str, Any], message: str
) -> None:
    content = config(tiny_path, tmp_path) | {"keep": "best"}
    content["trainer"] |= trainer
    assert message in error_of(capsys, "--config", written(tmp_path, content))


def test_a_checkpoint_of_another_run_goes_on_in_a_folder_of_its_own(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    before = (other / "config.yaml").read_bytes()
    options = ["--config", str(finished / "config.yaml"), "--output", str(other), "--trainer.max_steps", "3"]
    message = error_of(capsys, *options, "--resume", str(finished / "checkpoints/last.ckpt"))
    assert "already holds a run" in message and "from a checkpoint of its own" in message
    assert (other / "config.yaml").read_bytes() == before


def test_folder_of_another_run_is_refused_untouched(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*")}
    assert "already holds a run. Go on with it by adding --resume" in error_of(
        capsys, "--config", str(finished / "config.yaml")
    )
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*")} == before


def test_interrupted_where_no_step_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning then ends the process itself, without a word."""
    recipe = recipe_module("finetune")

    def stopped(cli: Any) -> None:
        raise SystemExit(1)

    monkeypatch.setattr(recipe, "run", stopped)
    monkeypatch.setattr(recipe, "end_children", lambda trainer: None)
    monkeypatch.setattr(recipe, "FinetuneCLI", lambda *_: SimpleNamespace(trainer=SimpleNamespace(interrupted=True)))
    assert recipe.main([]) == 130
    assert "the same command with --resume auto goes on" in capsys.readouterr().err
    monkeypatch.setattr(recipe, "FinetuneCLI", lambda *_: SimpleNamespace(trainer=SimpleNamespace(interrupted=False)))
    with pytest.raises(SystemExit):
        recipe.main([])


def test_what_only_validation_would_find_out(
    tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, config(tiny_path, tmp_path))
    error = error_of(capsys, "--config", file, "--keep", "best", "--data.validation", "null")
    assert "keep is best, but data.validation is null" in error
    error = error_of(capsys, "--config", file, "--evaluation.before", "false", "--evaluation.metrics", "[foo]")
    assert "unknown metric" in error


@pytest.mark.parametrize("held", ["adapter/notes.txt", "checkpoints/last.ckpt"])
def test_folder_with_something_like_a_run_is_refused_too(tmp_path: Path, held: str) -> None:
    file = tmp_path / held
    file.parent.mkdir()
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="already holds a run"):
        claim_folder(tmp_path, resuming=False)
    claim_folder(tmp_path, resuming=True)
    assert file.read_text() == "mine"


def test_resume_needs_something_to_resume(tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, config(tiny_path, tmp_path))
    assert "to resume from" in error_of(capsys, "--config", file, "--resume")


def test_rehearsal_replaces_rehearsals_only(tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run-rehearsal").mkdir()
    (tmp_path / "run-rehearsal" / "thesis.tex").touch()
    file = written(tmp_path, config(tiny_path, tmp_path))
    assert "was not made by one" in error_of(capsys, "--config", file, "--rehearse")
    assert (tmp_path / "run-rehearsal" / "thesis.tex").exists()


# ---- signals ----


def test_ctrl_c_saves_and_the_printed_command_resumes(finished: Path, tiny_path: str, tmp_path: Path) -> None:
    content = config(tiny_path, tmp_path)
    content["trainer"] |= {"max_steps": 400, "max_epochs": 1000, "limit_val_batches": 0}
    content["evaluation"] = {"before": False, "after": False, "during": 0}
    log, options = tmp_path / "log", ["--config", written(tmp_path, content)]
    process = Fork(lambda: finetune(*options), log)
    wait_for("step 3 of 400", process, log)
    os.kill(process.pid, signal.SIGINT)
    status, rest = process.wait(60), log.read_text()
    assert status == 130, rest
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    stopped = torch.load(last, weights_only=True)["global_step"]
    assert 3 <= stopped < 400 and f"saved {last} at step {stopped}" in rest
    printed = rest.strip().splitlines()[-1].split()
    assert printed[0] == "python" and printed[-1] == "--resume"
    assert finetune(*printed[2:], "--trainer.max_steps", str(stopped + 2)) == 0
    assert torch.load(last, weights_only=True)["global_step"] >= stopped
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_a_start_that_lightning_refuses_leaves_the_folder_free_but_not_that_of_another(
    tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = config(tiny_path, tmp_path)
    content["trainer"]["val_check_interval"] = 75  # of 4 batches
    file = written(tmp_path, content)
    assert "must be less than or equal to the number of the training batches" in error_of(capsys, "--config", file)
    held = tmp_path / "run" / "config.yaml"
    assert not held.exists()
    held.write_text("a run that goes on\n")
    error_of(capsys, "--config", file, "--resume", "auto")
    assert held.is_file()
