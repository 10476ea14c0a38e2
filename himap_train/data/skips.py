"""Broken records among thousands: counted across worker processes, reported one by one, and refused above a limit."""

from __future__ import annotations

import logging
import math

import torch

from himap_train.data.records import RecordError

logger = logging.getLogger(__name__)


class TooManySkippedError(RuntimeError):
    """More records had to be skipped than max_skipped allows."""


class SkipLog:
    """Remembers which records were skipped, in memory that all workers of one data loader share.

    Args:
        size: number of records.
        max_skipped: most records that may be skipped: a number, or below 1 a fraction of all records (rounded up).
        used: how many of the records are used, if not all.

    Raises:
        ValueError: max_skipped is negative.
    """

    def __init__(self, size: int, max_skipped: int | float = 0.01, used: int | None = None) -> None:
        self.limit = skip_limit(size if used is None else min(used, size), max_skipped)
        self.reasons: list[str] = []
        """What this process was told, one line a record."""
        self._skipped = torch.zeros(size, dtype=torch.int32).share_memory_()

    @property
    def count(self) -> int:
        """Different records skipped so far."""
        return int(self._skipped.sum())

    def add(self, index: int, error: RecordError) -> None:
        """Reports one skipped record.

        Raises:
            TooManySkippedError: one too many.
        """
        self.reasons.append(str(error))
        if self._skipped[index]:
            return
        self._skipped[index] = 1
        count = self.count
        if count > self.limit:
            raise TooManySkippedError(
                f"{count} records cannot be used, max_skipped allows {self.limit}; the last: {error}. Repair the data "
                "(himap_train.data.check.check_source lists what is wrong), or set a larger max_skipped"
            ) from error
        logger.warning("skipped record %d (%d of at most %d): %s", index, count, self.limit, error)


def skip_limit(size: int, max_skipped: int | float) -> int:
    """Most records that may be skipped; see SkipLog.

    Raises:
        ValueError: max_skipped is negative.
    """
    if max_skipped < 0:
        raise ValueError(f"max_skipped is {max_skipped}; expected a number of records, or a fraction below 1")
    if max_skipped >= 1 or max_skipped == 0:
        return int(max_skipped)
    return math.ceil(size * max_skipped)
