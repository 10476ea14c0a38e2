"""Every YAML in configs/, run by the command in its first line, with --rehearse: the real command line, end to end."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from training_toys import finetune

from himap_train.checkpoint import load_checkpoint
from himap_train.models.llava import pruning_of

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
COUNT = 8


def command(config: Path) -> list[str]:
    """The options in the first line: `# python recipes/finetune.py --config ...`."""
    line = config.read_text(encoding="utf-8").splitlines()[0]
    prefix = "# python recipes/finetune.py "
    assert line.startswith(prefix), f"{config.name} does not start with the command that runs it"
    return shlex.split(line.removeprefix(prefix))


def test_all_configs_are_found() -> None:
    """A config in a subfolder, or one that nobody counted, would not be run below."""
    assert len(CONFIGS) == COUNT == len(list((ROOT / "configs").rglob("*.y*ml")))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_rehearses(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = command(config)
    assert f"configs/{config.name}" in options
    output = tmp_path / "run"
    small = ["--rehearse", "--output", str(output), "--evaluation.limit", "4", "--trainer.max_steps", "2"]
    assert finetune(*options, *small) == 0
    folder = tmp_path / "run-rehearsal"
    written = yaml.safe_load((folder / "config.yaml").read_text())
    asked = yaml.safe_load(config.read_text())
    for group in ("model", "evaluation"):
        for key, value in (asked.get(group) or {}).items():
            if key == "quantize" and not torch.cuda.is_available():
                assert written[group][key] is None  # with a note
            elif key not in ("path", "schedule", "limit", "during"):
                assert written[group][key] == value, f"the rehearsal changed {group}.{key}"
    schedule = pruning_of(load_checkpoint(folder)[0]).schedule
    assert schedule.to_dict() == yaml.safe_load((folder / "pruning.yaml").read_text())
    assert bool(schedule.stages) == (asked.get("model", {}).get("schedule", "himap") is not None)
    assert {"checkpoints", "adapter", "merged", "logs", "versions.json"} <= {entry.name for entry in folder.iterdir()}
    if (folder / "metrics.json").exists():
        names = [row["name"] for row in json.loads((folder / "metrics.json").read_text())["rows"]]
        assert len(names) >= 2
