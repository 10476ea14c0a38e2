"""Processes joined by gloo that a test starts, with a time limit after which all of them are killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Fork

WORKER = Path(__file__).with_name("distributed_worker.py")
HAS_DEEPSPEED = find_spec("deepspeed") is not None
NEEDS_DEEPSPEED = pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed")


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(
    command: Sequence[object], log: Path, cwd: Path | None = None, **environment: object
) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own, its output in `log`."""
    env = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    env.pop("PL_GLOBAL_SEED", None)  # Lightning leaves that of the last config here, and joined processes seed by it
    with log.open("ab") as output:
        return subprocess.Popen(
            [str(part) for part in command], stdout=output, stderr=output, env=env, cwd=cwd, start_new_session=True
        )


def finish(processes: Sequence[subprocess.Popen[bytes] | Fork], logs: Sequence[Path], seconds: float) -> list[int]:
    """Wait for all; exit statuses. At the time limit all are killed and the test fails with their output."""
    try:
        return [process.wait(timeout=seconds) for process in processes]
    except subprocess.TimeoutExpired:
        raise AssertionError(f"not done in {seconds} s:\n{tails(logs)}") from None
    finally:
        for process in processes:
            kill_group(process)


def wait_for(text: str, process: subprocess.Popen[bytes] | Fork, log: Path, seconds: float = 120) -> None:
    """Return when a text stands in a running process's log; the test fails where it ends or takes longer."""
    limit = time.monotonic() + seconds
    while text not in log.read_text():
        assert process.poll() is None and time.monotonic() < limit, f"no {text!r} in\n{tails([log])}"
        time.sleep(0.01)


def kill_group(process: subprocess.Popen[bytes] | Fork) -> None:
    """SIGKILL for a process and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def tails(logs: Sequence[Path]) -> str:
    """The end of each log."""
    return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)


def start_two(command: Sequence[object], logs: Sequence[Path], **environment: object) -> list[subprocess.Popen[bytes]]:
    """Start a command twice, as a launcher would: two ranks on this machine."""
    shared = {"WORLD_SIZE": 2, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **environment}
    return [start(command, logs[rank], RANK=rank, LOCAL_RANK=rank, **shared) for rank in (0, 1)]


def run_scenarios(
    work: Path, scenarios: list[dict[str, Any]], seconds: float, **environment: object
) -> dict[str, list[dict[str, Any]]]:
    """What two workers return for each scenario (see `distributed_worker.train`), by name, one a rank."""
    file = work / f"{scenarios[0]['name']}.json"
    file.write_text(json.dumps(scenarios), encoding="utf-8")
    logs = [file.with_suffix(f".rank{rank}.log") for rank in (0, 1)]
    processes = start_two([sys.executable, WORKER, work, file, seconds - 20], logs, **environment)
    statuses = finish(processes, logs, seconds)
    assert statuses == [0, 0], tails(logs)
    return {
        name: [torch.load(work / f"{name}.rank{rank}.pt", weights_only=True) for rank in (0, 1)]
        for name in (scenario["name"] for scenario in scenarios)
    }
