"""Every YAML in configs/, run by the command in its first line, with --rehearse: the real command line, end to end."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from distributed import NEEDS_DEEPSPEED, finish, start, tails
from recipes_cli import RECIPES
from training_toys import finetune

from himap_train.checkpoints.load import load_checkpoint
from himap_train.models.install import pruning_of
from himap_train.training.run.finetune_cli import FinetuneCLI
from himap_train.training.zero.strategy import ZeroStrategy

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
COUNT = 16
OVERLAYS = sorted((ROOT / "configs" / "deepspeed").glob("*.yaml"))
OVERLAY_COUNT = 4
RUN = "zero3"
SMALL = ("--evaluation.limit", "2", "--evaluation.during", "2", "--trainer.max_steps", "2")


def command(config: Path) -> list[str]:
    """The options in the first line: `# python recipes/finetune.py --config ...`."""
    line = config.read_text(encoding="utf-8").splitlines()[0]
    prefix = "# python recipes/finetune.py "
    assert line.startswith(prefix), f"{config.name} does not start with the command that runs it"
    return shlex.split(line.removeprefix(prefix))


def test_all_configs_are_found() -> None:
    """A config in another folder, or one that nobody counted, would not be run below."""
    assert (len(CONFIGS), len(OVERLAYS)) == (COUNT, OVERLAY_COUNT)
    assert sorted([*CONFIGS, *OVERLAYS]) == sorted((ROOT / "configs").rglob("*.y*ml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_rehearses(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = command(config)
    assert f"configs/{config.name}" in options
    output = tmp_path / "run"
    assert finetune(*options, "--rehearse", "--output", str(output), *SMALL) == 0
    folder = tmp_path / "run-rehearsal"
    written = yaml.safe_load((folder / "config.yaml").read_text())
    asked = yaml.safe_load(config.read_text())
    for group in ("model", "evaluation"):
        for key, value in (asked.get(group) or {}).items():
            if key == "quantize" and not torch.cuda.is_available():
                assert written[group][key] is None  # with a note
            elif key not in ("path", "schedule", "limit", "during", "budgets"):
                assert written[group][key] == value, f"the rehearsal changed {group}.{key}"
    schedule = pruning_of(load_checkpoint(folder)[0]).schedule
    assert schedule.to_dict() == yaml.safe_load((folder / "pruning.yaml").read_text())
    learned = (asked.get("pruning") or {}).get("learnable") is not None
    assert bool(schedule.stages) == (learned or asked.get("model", {}).get("schedule", "himap") is not None)
    assert {"checkpoints", "adapter", "merged", "logs", "versions.json"} <= {entry.name for entry in folder.iterdir()}
    if (folder / "metrics.json").exists():
        names = [row["name"] for row in json.loads((folder / "metrics.json").read_text())["rows"]]
        assert len(names) >= 1 + bool(schedule.stages)


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_overlay_sets_the_strategy_of_its_name(overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    strategy = FinetuneCLI([*command(overlay), "--rehearse", "--output", str(tmp_path / "run")]).trainer.strategy
    assert isinstance(strategy, ZeroStrategy)
    zero = strategy.config["zero_optimization"]
    assert f"zero{zero['stage']}{'_offload' if 'offload_param' in zero else ''}" == overlay.stem


@NEEDS_DEEPSPEED
@pytest.mark.parametrize(
    "overlay",
    [pytest.param(path, id=path.stem, marks=[] if path.stem == RUN else [pytest.mark.slow]) for path in OVERLAYS],
)
def test_overlay_rehearses_in_two_processes(overlay: Path, tmp_path: Path) -> None:
    """Lightning starts the second process with the command line of the first, so this one is run as it is."""
    options, log = command(overlay), tmp_path / "log"
    assert f"configs/deepspeed/{overlay.name}" in options and "--trainer.devices 8" in " ".join(options)
    made = ["--rehearse", "--output", tmp_path / "run", *SMALL]
    process = start([sys.executable, RECIPES / "finetune.py", *options, *made], log, cwd=ROOT)
    assert finish([process], [log], 400) == [0], tails([log])
    lines, folder = log.read_text().splitlines(), tmp_path / "run-rehearsal"
    done = [line for line in lines if line.startswith("rehearsed: trained, saved, evaluated, exported; logits differ")]
    assert len(done) == 1 and "step 2 of 2" in log.read_text(), tails([log])
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["trainer"]["strategy"] == yaml.safe_load(overlay.read_text())["trainer"]["strategy"]
    assert written["trainer"]["devices"] == 2
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2 and saved["LlavaDataModule"]["processes"] == 2
