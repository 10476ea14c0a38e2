"""A function on several processes joined by gloo; the number of a process that is gone."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch


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
