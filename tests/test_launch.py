"""Processes that Lightning, torchrun or SLURM start; signals to one of them; what only the first does."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from distributed import finish, free_port, kill_group, start, tails
from lightning.pytorch.plugins.environments import SLURMEnvironment
from training_toys import RECIPES, SCHEDULE, finetune, save_tiny

from himap_train.training.cli import FinetuneCLI
from himap_train.training.launch import is_first_process

ROOT = RECIPES.parent
FINETUNE = RECIPES / "finetune.py"


def written(folder: Path, steps: int, **trainer: Any) -> str:
    content = {
        "output": str(folder / "run"),
        "model": {"path": save_tiny(folder / "tiny"), "schedule": SCHEDULE, "lora_r": 4, "lora_alpha": 8},
        "data": {"batch_size": 2, "train_limit": 16, "validation": None, "max_length": 400},
        "trainer": {"accelerator": "cpu", "max_steps": steps, "max_epochs": 1000, "log_every_n_steps": 1, **trainer},
        "evaluation": {"before": False, "after": False, "during": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(folder / "config.yaml")


def test_sigterm_to_one_process_saves_and_the_run_goes_on_in_one(tmp_path: Path) -> None:
    """The second process gets the signal; then one process with twice the accumulation takes over."""
    config, log = written(tmp_path, 4000), tmp_path / "log"
    process = start([sys.executable, FINETUNE, "--config", config, "--trainer.devices", "2"], log)
    try:
        limit = time.monotonic() + 120
        while "step 3 of" not in log.read_text() and time.monotonic() < limit and process.poll() is None:
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        second = next(int(pid) for pid in children if b"finetune" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(second, signal.SIGTERM)
        (status,) = finish([process], [log], 60)
    finally:
        kill_group(process)
    assert status == 128 + signal.SIGTERM, tails([log])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    stopped = torch.load(last, weights_only=True)["global_step"]
    assert f"saved {last} at step {stopped}" in log.read_text() and log.read_text().count("go on with:") == 1
    options = ["--config", config, "--resume", "auto", "--trainer.max_steps", str(stopped + 2)]
    assert finetune(*options) == 2  # half the records a step
    assert finetune(*options, "--trainer.accumulate_grad_batches", "2") == 0
    assert torch.load(last, weights_only=True)["global_step"] == stopped + 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_torchrun(tmp_path: Path, stage: str) -> None:
    config, log = written(tmp_path, 3), tmp_path / "log"
    overlay = ROOT / "configs" / "deepspeed" / f"{stage}.yaml"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port()]
    command = [*torchrun, FINETUNE, "--config", config, "--config", overlay, "--trainer.devices", 2]
    process = start(command, log)
    assert finish([process], [log], 180) == [0], tails([log])
    assert log.read_text().count("saved ") == 1 and (tmp_path / "run" / "adapter" / "adapter_config.json").exists()


@pytest.mark.slow
def test_rehearsal_runs_the_strategy_in_two_processes(tmp_path: Path) -> None:
    config, log = written(tmp_path, 3, devices=8), tmp_path / "log"
    overlay = ROOT / "configs" / "deepspeed" / "zero3.yaml"
    process = start([sys.executable, FINETUNE, "--config", config, "--config", overlay, "--rehearse"], log)
    assert finish([process], [log], 240) == [0], tails([log])
    assert "MEMBER: 2/2" in log.read_text() or "rehearsed: trained, saved, evaluated, exported" in log.read_text()


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, True),
        ({"SLURM_PROCID": "3"}, False),
        ({"SLURM_PROCID": "0"}, True),
    ],
)
def test_first_process_is_known_before_anything_is_set_up(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], first: bool
) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() == first


def test_slurm_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"NTASKS": "2", "NTASKS_PER_NODE": "2", "PROCID": "1", "LOCALID": "1", "NODEID": "0", "JOB_NAME": "long"}
    for name, value in {**facts, "JOB_ID": "7", "NNODES": "1", "NODELIST": "node0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    cli = FinetuneCLI(["--config", written(tmp_path, 2), "--trainer.devices", "2", "--trainer.strategy", "ddp"])
    assert isinstance(cli.trainer.strategy.cluster_environment, SLURMEnvironment)
    assert (cli.trainer.world_size, cli.trainer.global_rank) == (2, 1)
    assert not (tmp_path / "run").exists()  # the first process makes it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.strategy", "deepspeed_stage2"], "did you mean 'deepspeed_stage_2'?"),
        (["--trainer.strategy", "deepspeed_stage_2", "--trainer.precision", "16-mixed"], "expected 32-true or bf16"),
    ],
)
def test_wrong_strategies(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        FinetuneCLI(["--config", written(tmp_path, 2), *options])
