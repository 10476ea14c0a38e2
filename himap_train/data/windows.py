"""Accumulation windows: how many supervised tokens the batches of one optimizer step have together.

The loss of an optimizer step is the mean over the tokens of all its micro-batches. The weight of the first micro-batch
depends on the last one, so the loader reads a whole window before it hands out the first batch of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from himap_train.data.encode import IGNORED

WINDOW_TOKENS = "window_tokens"
"""Key in a training batch: supervised tokens in its whole window on this process, an int."""
WAITED = "waited_seconds"
"""Key in a training batch: how long this process waited for it, a float."""


@dataclass(frozen=True)
class Windows:
    """How Lightning joins batches to optimizer steps.

    Attributes:
        accumulate: batches of a full window.
        batches: training batches of an epoch, asked when it starts; the last of them ends its window. May be infinite.
    """

    accumulate: int
    batches: Callable[[], float]

    def count(self, batches: Iterable[Any], done: int = 0) -> Iterator[Any]:
        """The same batches, each with `window_tokens` and `waited_seconds`.

        Args:
            batches: those of one epoch; with `labels` (B, S), -100 where nothing is supervised.
            done: batches of this epoch that were trained on before; they are not among `batches`.
        """
        last, window = self.batches(), []
        for number, batch in enumerate(_timed(batches), start=done + 1):
            window.append(batch)
            if number % self.accumulate == 0 or number == last:
                yield from _with_tokens(window)
                window = []
        yield from _with_tokens(window)


def _timed(batches: Iterable[Any]) -> Iterator[Any]:
    """Batches with the time that each was waited for."""
    start = time.perf_counter()
    for batch in batches:
        yield {**batch, WAITED: time.perf_counter() - start}
        start = time.perf_counter()


def _with_tokens(window: list[Any]) -> Iterator[Any]:
    # The first column is never a target: no row predicts it.
    tokens = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in window)
    return ({**batch, WINDOW_TOKENS: tokens} for batch in window)
