"""What every malformed input has to meet: bounds of time and memory, nothing run, one line of error."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
