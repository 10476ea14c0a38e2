"""`kill -9` at any time, saving included: the run that goes on ends as an uninterrupted one, losses and weights.

Each attempt is a fork of this process, so that many fit into one test: starting Python anew takes longer than the run.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import NEEDS_DEEPSPEED, finish, kill_group, start, tails, wait_for
from processes import Fork
from recipes_cli import RECIPES
from training_toys import finetune, save_tiny, small_run

from himap_train import storage
from himap_train.checkpoints.adapter import read_adapter
from himap_train.training.callbacks import checkpoints as saving

STEPS = 20
_RUNS = ("straight", "run")


def config(folder: Path) -> str:
    """Twenty steps with dropout and accumulation over two and a half epochs."""
    trainer = {"max_steps": STEPS, "max_epochs": 9, "accumulate_grad_batches": 2}
    return small_run(folder, save_tiny(folder / "tiny"), data={"train_limit": 31}, trainer=trainer)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kind: str, number: int, losses: Path) -> None:
    """In the child: write each step's loss down, and let the process die at the `number`-th event of a kind."""
    seen = dict.fromkeys(("step", "write", "move"), 0)

    def event(name: str) -> bool:
        seen[name] += 1
        return kind == name and seen[name] == number

    after_step, save, replace = saving.SaveLast.on_train_batch_end, torch.save, os.replace

    def on_train_batch_end(self: Any, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        with losses.open("a") as file:
            file.write(f"{trainer.global_step} {batch_idx} {float(outputs['loss'])!r}\n")
        if event("step"):
            die()
        after_step(self, trainer, module, outputs, batch, batch_idx)

    def torch_save(content: Any, path: Any) -> None:
        save(content, path)
        if event("write"):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    def os_replace(source: Any, target: Any) -> None:
        if str(target).endswith(".ckpt") and event("move"):
            die()
        replace(source, target)

    saving.SaveLast.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign]
    saving.torch.save, storage.os.replace = torch_save, os_replace


def attempt(
    options: list[str],
    losses: Path,
    kind: str = "",
    number: int = 0,
    seconds: float | None = None,
    from_start: bool = False,
) -> int:
    """Run in a fork; its exit status, or minus the signal that ended it. Killed after `seconds` of training, or of all
    that a run does.
    """

    def armed() -> int:
        arm(kind, number, losses)
        return finetune(*options)

    child = Fork(armed, losses.with_suffix(".log"))
    lines = losses.read_text().count("\n") if losses.exists() else 0
    limit, started = time.monotonic() + 300, time.monotonic() if from_start else None
    while (status := child.poll()) is None:
        training = losses.exists() and losses.read_text().count("\n") > lines
        started = started or (time.monotonic() if training else None)
        late = seconds is not None and started is not None and time.monotonic() - started > seconds
        if late or time.monotonic() > limit:
            os.kill(child.pid, signal.SIGKILL)
        time.sleep(0.002)
    return status


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob(".*") if path.suffix in (".tmp", ".old")]


def test_killed_many_times_equals_uninterrupted_to_the_last_bit(tmp_path: Path) -> None:
    options = ["--config", config(tmp_path), "--save_every", "3", "--resume", "auto"]
    straight = tmp_path / "straight.txt"
    assert attempt([*options, "--output", str(tmp_path / "straight")], straight) == 0, straight.with_suffix(
        ".log"
    ).read_text()
    losses, chance, killed = tmp_path / "losses.txt", random.Random(0), 0
    kinds = ["write", "move", "step", "time", "write", "move", "step", "time", "time"]
    for kind in kinds:
        # a run from step 0 dies at its first save too: then there is nothing to resume from
        number = chance.choice((1, 2)) if kind in ("write", "move") else chance.randint(2, 12)
        status = attempt(options, losses, kind, number, chance.uniform(0.0, 0.4) if kind == "time" else None)
        assert status in (0, -signal.SIGKILL), losses.with_suffix(".log").read_text()[-3000:]
        killed += status == -signal.SIGKILL
        for file in (tmp_path / "run" / "checkpoints").glob("*.ckpt"):
            saving.read_checkpoint(file)  # what is there is whole
    assert killed >= 6
    assert attempt(options, losses) == 0
    assert leftovers(tmp_path / "run") == []
    expected = dict(line.rsplit(" ", 1) for line in straight.read_text().splitlines())
    for line in losses.read_text().splitlines():
        place, loss = line.rsplit(" ", 1)
        assert expected[place] == loss, f"step and batch {place}"
    assert {line.rsplit(" ", 1)[0] for line in losses.read_text().splitlines()} == set(expected)
    one, two = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("straight", "run")
    )
    assert one["global_step"] == two["global_step"] == STEPS
    assert all(torch.equal(value, two["state_dict"][name]) for name, value in one["state_dict"].items())
    for index, moments in one["optimizer_states"][0]["state"].items():
        assert all(
            torch.equal(value, two["optimizer_states"][0]["state"][index][key]) for key, value in moments.items()
        )


@pytest.mark.slow
def test_a_hundred_kills_at_random_points(tmp_path: Path) -> None:
    """Anywhere from the first line of the config to the end of the adapter's writing; HIMAP_KILLS sets how many."""
    options = ["--config", config(tmp_path), "--save_every", "3", "--resume", "auto"]
    run, losses = tmp_path / "run", tmp_path / "losses.txt"
    began = time.monotonic()
    straight = tmp_path / "straight.txt"
    assert attempt([*options, "--output", str(tmp_path / "straight")], straight) == 0
    whole = time.monotonic() - began
    expected = saving.read_checkpoint(tmp_path / "straight" / "checkpoints" / "last.ckpt")
    chance, wanted, killed, ended, left = random.Random(1), int(os.environ.get("HIMAP_KILLS", "100")), 0, 0, 0
    while killed < wanted or not ended:
        before = saving.newest_good(run / "checkpoints")
        step = saving.read_checkpoint(before)["global_step"] if before else 0
        seconds = None if killed >= wanted else chance.uniform(0.0, 1.1 * whole)
        lines = losses.read_text().count("\n") if losses.exists() else 0
        status = attempt(options, losses, seconds=seconds, from_start=True)
        assert status in (0, -signal.SIGKILL), losses.with_suffix(".log").read_text()[-3000:]
        steps = [int(line.split()[0]) for line in losses.read_text().splitlines()[lines:]] if losses.exists() else []
        assert not steps or steps[0] >= step, "it went back behind the last checkpoint"
        for file in run.glob("checkpoints/*.ckpt"):
            saving.read_checkpoint(file)
        left = max(left, len(leftovers(run)))
        if status:
            killed += 1
            continue
        ended += 1
        found = saving.read_checkpoint(run / "checkpoints" / "last.ckpt")
        assert all(torch.equal(value, found["state_dict"][name]) for name, value in expected["state_dict"].items())
        assert read_adapter(run / "adapter").weights.keys()
        assert leftovers(run) == []
        shutil.rmtree(run)
    print(f"{killed} kills, {ended} runs ended, at most {left} temporaries at a time, {time.monotonic() - began:.0f} s")


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(f"deepspeed_stage_{n}", marks=NEEDS_DEEPSPEED) for n in (2, 3))]
)
def test_two_processes_killed_equal_uninterrupted_ones(tmp_path: Path, strategy: str) -> None:
    """Both die at once, somewhere in or between steps, twice; with dropout and accumulation over several epochs."""
    options = ["--config", config(tmp_path), "--save_every", 1, "--resume", "auto", "--trainer.log_every_n_steps", 1]
    command = [
        sys.executable,
        RECIPES / "finetune.py",
        *options,
        "--trainer.devices",
        2,
        "--trainer.strategy",
        strategy,
    ]

    def run(name: str, log: Path, kill_at: int | None = None) -> int:
        process = start([*command, "--output", tmp_path / name], log)
        if kill_at is not None:
            wait_for(f"step {kill_at} of", process, log)
            time.sleep(random.Random(kill_at).uniform(0.0, 0.2))
            kill_group(process)
        (status,) = finish([process], [log], 120)
        return status

    assert run("straight", tmp_path / "straight.log") == 0, tails([tmp_path / "straight.log"])
    for kill_at in (3, 9):
        log = tmp_path / f"killed{kill_at}.log"
        assert run("run", log, kill_at) == -signal.SIGKILL, tails([log])
    assert run("run", tmp_path / "rest.log") == 0, tails([tmp_path / "rest.log"])
    assert "step 1 of" not in (tmp_path / "rest.log").read_text()  # it did go on
    straight, continued = (saving.read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in _RUNS)
    assert straight["global_step"] == continued["global_step"] == STEPS
    for name, value in straight["state_dict"].items():
        torch.testing.assert_close(continued["state_dict"][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("damage", ["cut", "empty", "folder", "gone"])
def test_damaged_checkpoint_names_the_good_one(tmp_path: Path, damage: str) -> None:
    content = {"state_dict": {"a": torch.zeros(9)}, "optimizer_states": [], "loops": {}}
    last, best = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    torch.save(content, best)
    if damage in ("cut", "empty"):
        torch.save(content, last)
        os.truncate(last, os.path.getsize(last) // 2 if damage == "cut" else 0)
    elif damage == "folder":
        last.mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=r"last.ckpt.*best.ckpt is good: --resume .*best.ckpt"):
        saving.read_checkpoint(last)
    assert saving.newest_good(tmp_path) == best
    best.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="last.ckpt"):
        saving.read_checkpoint(last)
    assert saving.newest_good(tmp_path) is None


def checkpoint(file: Path, step: Any, age: float = 0.0) -> Path:
    torch.save({"state_dict": {}, "optimizer_states": [], "loops": {}, "global_step": step}, file)
    os.utime(file, (time.time() - age, time.time() - age))
    return file


def test_resume_auto_takes_the_highest_step_whatever_the_times_of_the_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a copy or a restored backup, which gives the files other times."""
    last, best = checkpoint(tmp_path / "last.ckpt", 30, age=99), checkpoint(tmp_path / "best.ckpt", 20)
    far = checkpoint(tmp_path / "step-100.ckpt", 100, age=999)
    assert saving.newest_good(tmp_path) == far
    checkpoint(far, "many")  # no number
    assert saving.newest_good(tmp_path) == last and "its global_step is 'many'; expected a number" in caplog.text
    checkpoint(best, 30)
    assert saving.newest_good(tmp_path) == last  # of the same step the one that remembers the best
    os.truncate(last, os.path.getsize(last) // 2)
    assert saving.newest_good(tmp_path) == best and f"{last} is damaged" in caplog.text
    best.unlink()
    assert saving.newest_good(tmp_path) is None
