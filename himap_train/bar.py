"""The progress of what takes long beside training: a bar, or lines where there is no terminal to draw one on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY = 30.0
"""Seconds between two lines."""


@contextmanager
def progress_bar(what: str, total: int | None, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar, or a line now and then, on standard error while the block runs; yields a function that advances it."""
    if shown and not sys.stderr.isatty():
        yield _lines(what, total)
        return
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def _lines(what: str, total: int | None) -> Callable[[int], None]:
    """Counts, and says every `EVERY` seconds how far it is."""
    done, start = 0, time.monotonic()
    last = start

    def advance(count: int) -> None:
        nonlocal done, last
        done, now = done + count, time.monotonic()
        if now - last < EVERY:
            return
        last, rate = now, done / (now - start)
        left = f" of {total}, {(total - done) / rate / 60:.1f} min left" if total and rate else ""
        print(f"{what}: {done}{left}, {rate:.3g}/s", file=sys.stderr, flush=True)

    return advance
