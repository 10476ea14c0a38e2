"""What every malformed input has to meet: bounds of time and memory, nothing run, one line of error."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from processes import Fork

SECONDS, WAITED = 5, 120
"""Of computing, which neighbours on the machine don't make longer: the slowest input, an expression that is given up
after 3 s, takes 3.1. And of waiting, for what never comes.
"""


@contextmanager
def harmless(folder: Path, megabytes: float) -> Iterator[None]:
    """Inside, an input is tried that would leave a file `executed` below the folder if something of it were run."""
    start, computed = time.monotonic(), time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - computed < SECONDS
    assert time.monotonic() - start < WAITED
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < megabytes
    assert not list(folder.rglob("executed"))


def the_error(status: int, text: str) -> str:
    """The one line that a refused input ends in."""
    (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert status == 2 and "Traceback" not in text and len(error) < 1500
    return error


def in_little_memory(run: Callable[[], int], gigabytes: int, log: Path) -> tuple[int, str]:
    """Status and output of a function in a fork that may take so much address space more, and a minute of computing."""

    def limited() -> int:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, 2 * (taken + gigabytes * 2**30,))
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        return run()

    return Fork(limited, log).wait(), log.read_text()
