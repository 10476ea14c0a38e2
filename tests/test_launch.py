"""Processes that Lightning, torchrun or SLURM start; signals to one of them; what only the first does."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import NEEDS_DEEPSPEED, finish, free_port, kill_group, start, start_two, tails, wait_for
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from processes import in_processes
from recipes_cli import RECIPES
from training_toys import finetune, quiet_trainer, save_tiny, small_run

from himap_train.training.run.finetune_cli import FinetuneCLI
from himap_train.training.run.launch import AroundTraining, FineTuneTrainer, is_first_process, report_error
from himap_train.training.zero import strategy as deepspeed

ROOT = RECIPES.parent
ZERO_3 = {"class_path": "himap_train.training.zero.strategy.ZeroStrategy", "init_args": {"stage": 3, "offload": True}}
FINETUNE = RECIPES / "finetune.py"


def written(folder: Path, steps: int, **trainer: Any) -> str:
    trainer = {"max_steps": steps, "max_epochs": 1000, "log_every_n_steps": 1, **trainer}
    return small_run(folder, save_tiny(folder / "tiny"), trainer=trainer)


def test_sigterm_to_one_process_saves_and_the_run_goes_on_in_one(tmp_path: Path) -> None:
    """The second process gets the signal; then one process with twice the accumulation takes over."""
    config, log = written(tmp_path, 4000), tmp_path / "log"
    process = start([sys.executable, FINETUNE, "--config", config, "--trainer.devices", "2"], log)
    try:
        wait_for("step 3 of", process, log)
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
@NEEDS_DEEPSPEED
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_torchrun(tmp_path: Path, stage: str) -> None:
    config, log = written(tmp_path, 3), tmp_path / "log"
    overlay = ROOT / "configs" / "deepspeed" / f"{stage}.yaml"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port()]
    command = [*torchrun, FINETUNE, "--config", config, "--config", overlay, "--trainer.devices", 2]
    process = start(command, log)
    assert finish([process], [log], 240) == [0], tails([log])
    assert log.read_text().count("saved ") == 1 and (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3 and saved["LlavaDataModule"]["processes"] == 2


@pytest.mark.slow
@NEEDS_DEEPSPEED
def test_rehearsal_under_zero_3(tmp_path: Path) -> None:
    """To its end: the processes answer two questions each at the end, in different numbers of tokens."""
    log, overlay = tmp_path / "log", ROOT / "configs" / "deepspeed" / "zero3.yaml"
    settings = {"evaluation.before": "false", "evaluation.limit": 4, "trainer.max_steps": 2, "trainer.devices": 2}
    options = [part for name, value in settings.items() for part in (f"--{name}", value)]
    configs = ["--config", ROOT / "configs" / "quickstart.yaml", "--config", overlay]
    command = [sys.executable, FINETUNE, *configs, *options, "--rehearse", "--output", tmp_path / "run"]
    assert finish([start([*command, "--trainer.accelerator", "cpu"], log)], [log], 240) == [0], tails([log])
    assert "rehearsed: trained, saved, evaluated, exported" in log.read_text()


@pytest.mark.slow
def test_torchrun_prints_an_error_of_the_config_once(tmp_path: Path) -> None:
    log, torchrun = tmp_path / "log", [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2]
    options = ["--config", written(tmp_path, 3), "--trainer.strategy", "dpp"]
    (status,) = finish([start([*torchrun, "--master-port", free_port(), FINETUNE, *options], log)], [log], 120)
    assert status != 0 and log.read_text().count("trainer.strategy='dpp' is unknown") == 1, tails([log])


def test_first_process_cannot_save(tmp_path: Path) -> None:
    """The place of the checkpoint is taken by a folder. Neither process waits for the other; one tells why."""
    config, logs = written(tmp_path, 3), [tmp_path / "rank0.log", tmp_path / "rank1.log"]
    (tmp_path / "run" / "checkpoints" / "last.ckpt" / "in the way").mkdir(parents=True)
    options = ["--config", config, "--save_every", 1, "--trainer.devices", 2, "--trainer.strategy", "ddp"]
    statuses = finish(start_two([sys.executable, FINETUNE, *options], logs), logs, 150)
    assert statuses == [2, 2], tails(logs)
    first, second = (log.read_text() for log in logs)
    assert first.count("error: could not save") == 1 and "error:" not in second, tails(logs)


class Fails(Callback):
    """Training that does not end well."""

    def on_train_batch_end(self, *_: Any) -> None:
        raise ValueError("no more")


@pytest.mark.parametrize(
    ("steps", "callbacks", "expected"),
    [
        pytest.param(1, [], ["before", "after", "given back"], id="trained"),
        pytest.param(0, [], ["before", "after", "given back"], id="nothing left to train"),
        pytest.param(1, [Fails()], ["before", "given back"], id="error"),
    ],
)
def test_what_comes_after_training_finds_the_model_as_it_was_trained(
    tmp_path: Path, steps: int, callbacks: list[Any], expected: list[str]
) -> None:
    """Not on the CPU, where Lightning's strategies put it back, and SIGTERM means what it meant before training."""
    order, meanings = [], [signal.getsignal(signal.SIGTERM)]

    class GivesBack(SingleDeviceStrategy):
        def teardown(self) -> None:
            order.append("given back")
            super().teardown()

    def after() -> None:
        order.append("after")
        meanings.append(signal.getsignal(signal.SIGTERM))

    around = AroundTraining(lambda: order.append("before"), after)
    options = {"strategy": GivesBack("cpu"), "max_steps": steps, "callbacks": [around, *callbacks]}
    trainer = quiet_trainer(tmp_path, kind=FineTuneTrainer, **options)
    with pytest.raises(ValueError, match="no more") if callbacks else contextlib.nullcontext():
        trainer.fit(BoringModel())
    assert order == expected and len(set(meanings)) == 1


def test_another_trainer_would_leave_out_what_comes_after_training(tmp_path: Path) -> None:
    around = AroundTraining(lambda: None, lambda: None)
    with pytest.raises(TypeError, match="needs a FineTuneTrainer, not a Trainer"):
        quiet_trainer(tmp_path, kind=Trainer, max_steps=1, callbacks=[around]).fit(BoringModel())


def reported(errors: tuple[str | None, str | None]) -> list[str]:
    """What each of two joined processes prints when it ends with its error; None ends without one."""

    def end() -> str:
        rank = torch.distributed.get_rank()
        os.environ["RANK"] = str(rank)
        output = io.StringIO()
        with contextlib.redirect_stderr(output):
            message = errors[rank]
            if message is not None:
                report_error(ValueError(message), patience=3.0)
        return output.getvalue()

    return in_processes(2, end)


@pytest.mark.parametrize(
    ("errors", "printed"),
    [
        (("a", "a"), ["error: a\n", ""]),
        (("a", "b"), ["error: a\n", "rank 1: error: b\n"]),
        ((None, "b"), ["", "rank 1: error: b\n"]),
        (("a", None), ["error: a\n", ""]),
    ],
)
def test_no_error_is_printed_twice_and_none_is_lost(errors: tuple[str | None, str | None], printed: list[str]) -> None:
    assert reported(errors) == printed


def test_error_before_the_processes_are_joined_has_its_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "3")
    report_error(ValueError("no such folder"))
    assert capsys.readouterr().err == "rank 3: error: no such folder\n"


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
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # Lightning notes the rank for the whole process
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
        pytest.param(
            ["--trainer.strategy", "deepspeed_stage_2", "--trainer.precision", "16-mixed"],
            "expected 32-true or bf16",
            marks=NEEDS_DEEPSPEED,
        ),
        (
            ["--trainer.strategy", "deepspeed_stage_3", "--model.quantize", "4bit", "--rehearse"],
            "model.quantize=4bit does not go with ZeRO-3 .*--trainer.strategy deepspeed_stage_2 or ddp",
        ),
        (
            ["--trainer.strategy", json.dumps(ZERO_3), "--model.quantize", "4bit"],
            "4bit does not go with ZeRO-3 .*deepspeed_stage_3_offload",
        ),
    ],
)
def test_wrong_strategies(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        FinetuneCLI(["--config", written(tmp_path, 2), *options])


def test_without_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs DeepSpeed; install it with `pip install -e .\[deepspeed\]`"):
        FinetuneCLI(["--config", written(tmp_path, 2), "--trainer.strategy", "deepspeed_stage_2"])
