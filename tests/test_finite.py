"""A run whose loss or gradient is not finite ends before its optimizer steps; nan is neither saved nor scored."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import NEEDS_DEEPSPEED, finish, start_two, tails
from export_toys import PRUNED, trained
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from recipes_cli import run_recipe
from safetensors.torch import load_file, save_file
from tiny import tiny_processor
from training_toys import ToyData, finetune, quiet_trainer, small_run, tuner
from transformers import LlavaForConditionalGeneration

from himap_train.checkpoints.adapter import CHECKPOINT_KEY
from himap_train.checkpoints.export import export_adapter, export_merged
from himap_train.checkpoints.finite import NonFiniteError
from himap_train.checkpoints.load import load_checkpoint, save_adapter
from himap_train.training.callbacks.best import last_and_best
from himap_train.training.callbacks.checkpoints import AtomicCheckpointIO
from himap_train.training.callbacks.finite import PATIENCE, GradientNorm
from himap_train.training.run.launch import FineTuneTrainer


class Breaks(Callback):
    """From a step on the loss is multiplied by a number."""

    def __init__(self, step: int, factor: float) -> None:
        self.step, self.factor = step, factor

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            plain = type(module).batch_loss
            module.batch_loss = lambda given: (plain(module, given)[0] * self.factor, plain(module, given)[1])


class BreaksGradient(Callback):
    """At a step a gradient is inf, and the loss a number."""

    def __init__(self, step: int, until: int | None = None) -> None:
        self.step, self.until = step, until or 10**9

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        if self.step <= trainer.global_step < self.until:
            next(p for p in module.parameters() if p.grad is not None).grad[0] = float("inf")


def fit(base: str, folder: Path, *callbacks: Callback, **options: Any) -> Any:
    module = tuner(base)
    saving = last_and_best(folder / "checkpoints", 1, "val/loss", "min")
    trainer = quiet_trainer(
        folder,
        kind=FineTuneTrainer,
        enable_checkpointing=True,
        callbacks=[*callbacks, GradientNorm(folder / "checkpoints"), *saving],
        plugins=[AtomicCheckpointIO(), *options.pop("plugins", [])],
        **{"max_steps": 4, "gradient_clip_val": 1.0, **options},
    )
    trainer.fit(module, datamodule=ToyData(count=16))
    return module


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (Breaks(2, float("nan")), "step 3: the loss is nan"),
        (Breaks(2, float("inf")), "step 3: the loss is inf"),
        (
            BreaksGradient(2),
            r"step 3: the loss is \d.*norm is (inf|nan).*first such gradient is that of llava",
        ),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_ends_at_the_first_step_and_keeps_the_checkpoint_before(
    base: str, tmp_path: Path, callback: Callback, message: str, accumulate: int
) -> None:
    with pytest.raises(NonFiniteError, match=message + r".*last good checkpoint is .*last.ckpt"):
        fit(base, tmp_path, callback, accumulate_grad_batches=accumulate)
    kept = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 2
    assert all(torch.isfinite(value).all() for value in kept["state_dict"].values())


class Scaled(MixedPrecision):
    """fp16's loss scaling without fp16, which this CPU has not."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        self.precision = "32-true"  # type: ignore[assignment]

    def forward_context(self) -> Any:
        return contextlib.nullcontext()


def test_skipped_steps_of_loss_scaling_are_waited_for(base: str, tmp_path: Path) -> None:
    fit(base, tmp_path, BreaksGradient(0, 3), plugins=[Scaled()], max_steps=6)
    with pytest.raises(NonFiniteError, match=rf"step {PATIENCE + 2}: .* as in the {PATIENCE} steps before"):
        fit(base, tmp_path / "b", BreaksGradient(1), plugins=[Scaled()], max_steps=40, max_epochs=9)
    with pytest.raises(NonFiniteError, match="all 3 steps had a gradient that is not finite"):
        fit(base, tmp_path / "c", BreaksGradient(0), plugins=[Scaled()], max_steps=3)


def test_weights_that_a_step_has_broken_are_not_saved(base: str, tmp_path: Path) -> None:
    """The gradient was fine, the step was not."""

    class BadStep(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                next(p for n, p in module.named_parameters() if "lora_B" in n).data[0, 0] = float("inf")

    with pytest.raises(NonFiniteError, match=r"last.ckpt was not saved: .*lora_B.*1 of its"):
        fit(base, tmp_path, BadStep())
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


def test_a_ranking_that_a_step_has_broken_is_not_saved(tmp_path: Path) -> None:
    broken = {"state_dict": {}, CHECKPOINT_KEY: {"ranking": {"0.head.weight": torch.tensor([1.0, float("nan")])}}}
    with pytest.raises(NonFiniteError, match=r"last.ckpt was not saved: .*0.head.weight.*1 of its"):
        AtomicCheckpointIO().save_checkpoint(broken, tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").exists()


def test_validation_loss_that_is_none_ends_training(base: str, tmp_path: Path) -> None:
    class Broken(Callback):
        def on_validation_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            module.batch_loss = lambda batch: (torch.tensor(float("nan")), torch.tensor(1))

    with pytest.raises(NonFiniteError, match="the validation loss at step 2 is nan"):
        fit(base, tmp_path, Broken(), val_check_interval=2, limit_val_batches=1)


def config(base: str, folder: Path, **model: Any) -> str:
    trainer = {"max_steps": 4, "gradient_clip_val": None}
    return small_run(folder, base, model={"schedule": None, **model}, trainer=trainer)


def test_diverged_run_ends_with_status_2_and_no_adapter(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate at which the weights overflow."""
    assert finetune("--config", config(base, tmp_path, lora_lr=1e30, projector_lr=1e30, warmup_ratio=0.0)) == 2
    error = capsys.readouterr().err
    assert "error: step " in error and "model.lora_lr" in error and "Traceback" not in error
    assert not (tmp_path / "run" / "adapter").exists()


def test_base_with_a_weight_that_is_no_number_is_named(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(base)
    model.model.language_model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tiny_processor().save_pretrained(tmp_path / "broken")
    assert finetune("--config", config(str(tmp_path / "broken"), tmp_path)) == 2
    assert "The model itself is broken" in (error := capsys.readouterr().err) and "layers.1.mlp.up_proj" in error
    assert run_recipe("evaluate", "--checkpoint", tmp_path / "broken", "--limit", 2, "--schedule", "none") == 2
    found = capsys.readouterr()
    assert "layers.1.mlp.up_proj.weight (1 of its" in found.err and "accuracy" not in found.out
    with pytest.raises(NonFiniteError, match=r"model.safetensors holds .*layers.1.mlp.up_proj"):
        export_merged(tmp_path / "broken", tmp_path / "never")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_adapter_with_such_a_weight_is_neither_saved_nor_loaded_nor_exported(
    base: str, tmp_path: Path, value: str
) -> None:
    model = trained(base)
    good = save_adapter(model, tmp_path / "adapter", PRUNED, tiny_processor())
    name = next(name for name in load_file(good / "adapter_model.safetensors") if "lora_B" in name)
    weights = load_file(good / "adapter_model.safetensors")
    weights[name][0, 0] = float(value)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n)[0, 0] = float(value)
    with pytest.raises(NonFiniteError, match=r"adapter was not saved: .*lora_B.*1 of its"):
        save_adapter(model, tmp_path / "adapter", PRUNED, tiny_processor())
    load_checkpoint(good)
    save_file(weights, good / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=name):
        load_checkpoint(good)
    with pytest.raises(NonFiniteError, match=name):
        export_adapter(good, tmp_path / "never")
    with pytest.raises(ValueError, match=r"layers\.\d"):
        export_merged(good, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_fp16_export_of_larger_weights_is_refused(base: str, tmp_path: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(base)
    model.model.language_model.layers[0].mlp.down_proj.weight.data[0, 0] = 70000.0
    model.save_pretrained(tmp_path / "large")
    tiny_processor().save_pretrained(tmp_path / "large")
    message = r"layers.0.mlp.down_proj.weight holds values up to 7e\+04, which torch.float16 cannot.*65504|6.55e\+04"
    with pytest.raises(NonFiniteError, match=message):
        export_merged(tmp_path / "large", tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()
    export_merged(tmp_path / "large", tmp_path / "bf16", dtype="bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("deepspeed_stage_2", marks=NEEDS_DEEPSPEED)])
def test_nan_in_one_process_ends_all(base: str, tmp_path: Path, strategy: str) -> None:
    """The second process alone gets a loss of nan."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "from training_toys import finetune\n"
        "from himap_train.training.module import LlavaFineTuner\n"
        "plain = LlavaFineTuner.batch_loss\n"
        "def loss(self, batch):\n"
        "    total, count = plain(self, batch)\n"
        "    broken = os.environ['RANK'] == '1' and self.trainer.global_step == 2\n"
        "    return (total * float('nan') if broken else total), count\n"
        "LlavaFineTuner.batch_loss = loss\n"
        "sys.exit(finetune(*sys.argv[1:]))\n"
    )
    options = ["--config", config(base, tmp_path), "--save_every", 1]
    options += ["--trainer.devices", 2, "--trainer.strategy", strategy]
    logs = [tmp_path / "rank0.log", tmp_path / "rank1.log"]
    statuses = finish(start_two([sys.executable, script, *options], logs), logs, 150)
    assert statuses == [2, 2], tails(logs)
    assert "error: step 3: the loss is nan" in logs[0].read_text(), tails(logs)
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert not (tmp_path / "run" / "adapter").exists()
