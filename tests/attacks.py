"""What every malformed input has to meet: bounds of time and memory, nothing run, one line of error."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def harmless(folder: Path, seconds: float, megabytes: float) -> Iterator[None]:
    """Inside, an input is tried that would leave a file `executed` below the folder if something of it were run."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - start < seconds
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < megabytes
    assert not list(folder.rglob("executed"))


def the_error(status: int, text: str) -> str:
    """The one line that a refused input ends in."""
    (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert status == 2 and "Traceback" not in text and len(error) < 1500
    return error
