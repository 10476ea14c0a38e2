"""Numbers that cannot be are refused before anything is loaded, with key, value and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_toys import finetune

from himap_train.data.module import LlavaDataModule
from himap_train.ranges import RANGES
from himap_train.structured import plain_yaml
from himap_train.training.callbacks.accuracy import EvaluationSettings
from himap_train.training.callbacks.checkpoints import SaveLast
from himap_train.training.module import LlavaFineTuner
from himap_train.training.run import finetune_cli

WRONG = {
    "seed_everything": ["-1"],
    "save_every": ["-3", "0"],
    "model.lora_r": ["0", "-4"],
    "model.lora_alpha": ["0", ".nan", "-8"],
    "model.lora_dropout": ["1.0", "-0.1", ".nan"],
    "model.lora_lr": [".nan", "-1e-4", ".inf", "0"],
    "model.projector_lr": [".nan", "-1e-4"],
    "model.vision_lr": ["0"],
    "model.decoder_lr": ["-1"],
    "model.weight_decay": ["-0.1", ".inf"],
    "model.warmup_ratio": ["7", "-0.1", ".nan"],
    "model.betas": ["[0.9, 1.0]", "[-0.1, 0.9]"],
    "model.loss_chunk": ["-1"],
    "data.batch_size": ["0", "-2"],
    "data.eval_batch_size": ["0"],
    "data.max_length": ["0"],
    "data.max_image_tokens": ["0", "-1"],
    "data.num_workers": ["-1"],
    "data.max_skipped": ["-1", ".nan"],
    "data.train_limit": ["0"],
    "data.validation_limit": ["-1"],
    "data.validation": ["0.0", "1.0", "1.5", "-0.1", ".nan"],
    "data.test_limit": ["0"],
    "data.seed": ["-1"],
    "data.pad_to_multiple_of": ["0"],
    "evaluation.limit": ["0"],
    "evaluation.during": ["-1"],
    "evaluation.batch_size": ["0"],
    "evaluation.max_new_tokens": ["0"],
    "trainer.max_steps": ["-2", "0"],
    "trainer.min_steps": ["-1"],
    "trainer.max_epochs": ["0", "-2"],
    "trainer.min_epochs": ["-1"],
    "trainer.num_nodes": ["0"],
    "trainer.accumulate_grad_batches": ["0", "-1"],
    "trainer.gradient_clip_val": ["-1", ".nan"],
    "trainer.log_every_n_steps": ["0", "-5"],
    "trainer.check_val_every_n_epoch": ["0"],
    "trainer.num_sanity_val_steps": ["-2"],
    "trainer.val_check_interval": ["0", "-1", "1.5"],
    "trainer.limit_train_batches": ["-1", "1.5"],
    "trainer.limit_val_batches": ["-0.5"],
    "trainer.limit_test_batches": ["-1"],
    "trainer.overfit_batches": ["-1"],
}


def test_every_range_is_tried() -> None:
    assert WRONG.keys() == RANGES.keys()


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_refused(
    key: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finetune_cli, "resolve_model", None)  # nothing is looked for
    *groups, last = key.split(".")
    content: object = {last: yaml.safe_load(value)}
    for group in reversed(groups):
        content = {group: content}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"output": str(tmp_path / "run"), **content}))  # type: ignore[dict-item]
    assert finetune("--config", str(tmp_path / "config.yaml")) == 2
    found = capsys.readouterr().err
    shown = {".nan": "nan", ".inf": "inf", "-1e-4": "-0.0001"}.get(value, value.strip("[]").split(",")[0])
    assert f"error: {key} is " in found and "; expected " in found and "Traceback" not in found
    assert shown in found or key == "model.betas"
    assert not (tmp_path / "run").exists()


IN_PYTHON: dict[str, Callable[..., Any]] = {
    "model": LlavaFineTuner,
    "data": LlavaDataModule,
    "evaluation": EvaluationSettings,
    "save_every": lambda save_every: SaveLast(Path("last.ckpt"), save_every),
}


@pytest.mark.parametrize("key", [key for key in WRONG if key.split(".")[0] in IN_PYTHON])
def test_refused_in_python(key: str) -> None:
    """As soon as an object is made, with the same words."""
    group, name = key.split(".")[0], key.split(".")[-1]
    for value in WRONG[key]:
        with pytest.raises(ValueError, match=rf"^{key} is .*; expected "):
            IN_PYTHON[group](**{name: plain_yaml(value)})
