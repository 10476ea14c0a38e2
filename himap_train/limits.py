"""Bounds on the time and memory of what somebody else wrote and Python runs: regular expressions, chat templates."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UnboundedError(ValueError):
    """What somebody else wrote takes more time or memory than it may."""


@contextmanager
def bounded(what: str, seconds: float = 3.0, memory: int | None = None) -> Iterator[None]:
    """Interrupt what takes too long; in the main thread of a process, since Python interrupts no other.

    Args:
        what: Names it in the message.
        seconds: Of computing, not of waiting.
        memory: Bytes that the whole process may come to take beyond what it has; only while nothing else runs.

    Raises:
        UnboundedError: It took longer, or more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise UnboundedError(f"{what} did not end within {seconds:g} s of computing")

    handler, limits = signal.signal(signal.SIGVTALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    try:
        if memory is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            wanted = pages * resource.getpagesize() + memory
            lower = wanted if limits[0] == resource.RLIM_INFINITY else min(wanted, limits[0])
            resource.setrlimit(resource.RLIMIT_AS, (lower, limits[1]))
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    except MemoryError as error:
        raise UnboundedError(f"{what} takes too much memory") from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
