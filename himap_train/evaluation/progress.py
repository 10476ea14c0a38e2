"""A progress bar on standard error, so that a table on standard output stays clean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(label: str, total: int | None, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Yield a function that moves the bar on by so many; the bar goes away at the end.

    Args:
        label: What is going on.
        total: Steps in all, None if it is not known.
        shown: False makes the function do nothing.
    """
    columns = TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
