"""Short runs of `finetune.py` with `pruning:` in their config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from training_toys import finetune

STAGES = [{"layer": 1, "criterion": "instruction", "keep_ratio": 0.5}]


def config(path: str, folder: Path, pruning: dict[str, Any], **groups: Any) -> str:
    """A run of seconds on the embedded scenes, whose questions are long for the tiny model: text costs most."""
    model = {"path": path, "schedule": {"stages": STAGES}, "lora_r": 4, "lora_alpha": 8}
    content = {
        "output": str(folder / "run"),
        "model": {**model, "gradient_checkpointing": False, **groups.pop("model", {})},
        "data": {"batch_size": 2, "train_limit": 12, "validation_limit": 4, "max_length": 400},
        "trainer": {"accelerator": "cpu", "max_steps": 6, "limit_val_batches": 1, "log_every_n_steps": 1},
        "evaluation": {"limit": 4, "during": 0, "max_new_tokens": 2, "before": False, **groups.pop("evaluation", {})},
        "pruning": pruning,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(folder / "config.yaml")


def error_of(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Run something that must fail with status 2; the message."""
    try:
        status = finetune(*options)
    except SystemExit as stop:  # jsonargparse ends the process itself
        status = int(stop.code or 0)
    assert status == 2
    return capsys.readouterr().err


def logged(run: Path, name: str) -> list[float]:
    header, *lines = ((run / "logs" / "version_0" / "metrics.csv").read_text()).splitlines()
    place = header.split(",").index(name)
    return [float(line.split(",")[place]) for line in lines if line.split(",")[place]]
