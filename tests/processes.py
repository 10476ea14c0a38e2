"""A function in a fork of this process, or on several joined by gloo; the number of a process that is gone."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Fork:
    """What `function` prints, in `log`, and the status that it returns, as `Popen` has it.

    Importing torch in a new process would take longer than what most tests run there.
    """

    def __init__(self, function: Callable[[], int], log: Path) -> None:
        self.returncode: int | None = None
        log.touch()
        self.pid = os.fork()
        if self.pid:
            return
        status = 70
        try:
            os.setsid()
            with log.open("ab") as output:
                os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
            status = function()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if found else None
        return self.returncode

    def wait(self, timeout: float = 120) -> int:
        limit = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > limit:
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(0.002)
        return status


def dead_process() -> int:
    """Number of a process that has ended."""
    return int(subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout)


def in_processes(world: int, function: Callable[[], Any]) -> list[Any]:
    """What `function` returns on each rank of a process group; forked, so it may use everything in scope."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def run(rank: int) -> None:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
        results.put((rank, function()))
        torch.distributed.barrier()  # the store lives in rank 0: it must not leave first
        torch.distributed.destroy_process_group()

    processes = [context.Process(target=run, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    return [found[rank] for rank in range(world)]
