"""Times of two things in alternation, and the ratio of each pair: what slows a machine down slows both.

The order within a pair alternates too. A GPU is timed by events and is waited for outside of the timed stretch only.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

Clock = Literal["wall", "cpu"]
"""What reads the time on a CPU: the wall clock, or the processor time of this process, which leaves out the share of
other users of the machine and adds up threads: it is for one thread.
"""


@dataclass(frozen=True)
class Task:
    """Something to time.

    Attributes:
        run: What is timed.
        within: Is open around each run and its preparation; opening and closing are not timed.
        prepare: Runs before each, untimed.
        parts: Equal parts of a run (tokens decoded, say); times are those of one.
    """

    run: Callable[[], Any]
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    prepare: Callable[[], Any] = lambda: None
    parts: int = 1


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        low, median, high = map(float, np.percentile(values, (25, 50, 75)))
        return cls(median, low, high)

    def share(self) -> Spread:
        """Of ratios with / without something, which share of the whole it takes."""
        return Spread(*(1 - 1 / ratio for ratio in (self.median, self.low, self.high)))


@dataclass(frozen=True)
class Pairs:
    """Seconds of each round, and from them the ratio `second / first` pair by pair."""

    first: list[float]
    second: list[float]

    @property
    def ratio(self) -> Spread:
        """The second over the first, pair by pair."""
        return Spread.of([b / a for a, b in zip(self.first, self.second, strict=True)])


def time_once(task: Task, device: torch.device, clock: Clock = "wall") -> float:
    """Seconds of one part of a run."""
    now = time.perf_counter if clock == "wall" else time.process_time
    with task.within():
        task.prepare()
        if device.type == "cuda":
            with torch.cuda.device(device):  # events are of the current one's stream
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize(device)
                start.record()
                task.run()
                end.record()
                torch.cuda.synchronize(device)
            return start.elapsed_time(end) / 1000 / task.parts
        began = now()
        task.run()
        return (now() - began) / task.parts


def time_pairs(
    first: Task,
    second: Task,
    rounds: int,
    device: torch.device,
    *,
    clock: Clock = "wall",
    each: Callable[[], Any] = lambda: None,
) -> Pairs:
    """Time two tasks in alternation, after an untimed run of each; `each` is called after each of `rounds` pairs."""
    for task in (first, second):
        time_once(task, device)
    times: tuple[list[float], list[float]] = ([], [])
    collects = gc.isenabled()
    gc.disable()  # a collection would fall on one of the two
    try:
        for number in range(rounds):
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                times[which].append(time_once((first, second)[which], device, clock))
            each()
    finally:
        if collects:
            gc.enable()
        gc.collect()
    return Pairs(*times)


def free_memory() -> None:
    """Give back what nobody holds any more: a second model may not fit, nor another process beside this one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
