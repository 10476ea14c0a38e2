"""Which records make up which batch: shuffled, grouped by length, shared between processes, the same at every start.

Grouping follows LLaVA's trainer: shuffle, cut into megabatches, sort each by length, cut into batches. So a batch holds
samples of similar length, hardly any padding, and still other samples in every epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

IndexArray = np.ndarray
logger = logging.getLogger(__name__)


class BatchOrder:
    """Batch sampler whose order depends on (seed, epoch) alone.

    Yields lists of (epoch, index): the epoch travels with the index because worker processes may outlive an epoch.

    Args:
        size: number of records.
        batch_size: records in a batch of one process.
        lengths: estimated length of each record, to group by; None for no grouping.
        shuffle: another order in every epoch; otherwise the order of the source, and always epoch 0.
        seed: another seed, other orders.
        num_replicas: number of processes. All get the same number of batches; for it up to num_replicas - 1 records are
            repeated.
        rank: of this process.
        megabatch: batches that are sorted together (at most a quarter of all): more, less padding, less chance.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        lengths: Sequence[int] | IndexArray | None = None,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        megabatch: int = 50,
    ) -> None:
        if min(size, batch_size, num_replicas, megabatch) < 1 or not 0 <= rank < num_replicas:
            raise ValueError(
                f"size={size}, batch_size={batch_size}, num_replicas={num_replicas}, megabatch={megabatch} must be "
                f"at least 1 and rank={rank} below num_replicas"
            )
        if lengths is not None and len(lengths) != size:
            raise ValueError(f"{len(lengths)} lengths for {size} records")
        self._size, self._batch_size, self._shuffle, self._seed = size, batch_size, shuffle, seed
        self._lengths = None if lengths is None else np.asarray(lengths)
        self._num_replicas, self._rank, self._megabatch = num_replicas, rank, megabatch
        self.epoch = 0
        self.start_batch = 0
        """How many batches an iteration leaves out, to go on in the middle of an epoch."""

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order comes next. Lightning calls this, for validation too, which stays as it is."""
        self.epoch = epoch if self._shuffle else 0

    def __len__(self) -> int:
        """Batches of this process in a whole epoch."""
        return -(-self._size // (self._num_replicas * self._batch_size))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, start = self.epoch, self.start_batch
        return ([(epoch, int(index)) for index in batch] for batch in self.batches(epoch)[start:])

    def batches(self, epoch: int) -> list[IndexArray]:
        """Record indices of each batch of this process."""
        step = self._num_replicas * self._batch_size
        order = self._order(epoch, step)
        missing = -len(order) % self._num_replicas
        order = np.concatenate([order, np.resize(order, missing)])
        shared = [order[start : start + step] for start in range(0, len(order), step)]
        if self._lengths is not None and self._shuffle:
            shared = self._mixed(shared, epoch)
        return [batch[self._rank :: self._num_replicas] for batch in shared]

    def _order(self, epoch: int, step: int) -> IndexArray:
        order = self._generator(epoch, 0).permutation(self._size) if self._shuffle else np.arange(self._size)
        if self._lengths is None:
            return order
        span = step * max(1, min(self._megabatch, self._size // (4 * step)))
        chunks = [order[start : start + span] for start in range(0, len(order), span)]
        return np.concatenate([chunk[np.argsort(-self._lengths[chunk], kind="stable")] for chunk in chunks])

    def _mixed(self, batches: list[IndexArray], epoch: int) -> list[IndexArray]:
        """Batches in random order, so that lengths do not fall within every megabatch.

        The longest comes first, to run out of memory at once or never. An incomplete batch stays the last.
        """
        assert self._lengths is not None
        full = [batch for batch in batches if len(batch) == len(batches[0])]
        longest = int(np.argmax([self._lengths[batch].max() for batch in full]))
        others = [full[i] for i in self._generator(epoch, 1).permutation(len(full)) if i != longest]
        return [full[longest], *others, *batches[len(full) :]]

    def _generator(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, epoch, stream])


def check_at_least_one(**settings: int | None) -> None:
    """Raises ValueError naming a setting of the data that is zero or negative; None means not set."""
    for name, value in settings.items():
        if value is not None and value < 1:
            raise ValueError(f"data.{name} is {value}; expected at least 1")


def warn_of_another_order(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warns when what the order of the data depends on differs between a run and the one that it resumes."""
    changed = [f"{key}: {old!r} then, {now.get(key)!r} now" for key, old in then.items() if old != now.get(key)]
    if changed:
        logger.warning(
            "resumed with other data settings (%s): the order of the training data is another one, so within the "
            "running epoch some samples come twice and some not at all",
            "; ".join(changed),
        )


def padding_waste(lengths: Sequence[int] | IndexArray, batches: Sequence[Sequence[int] | IndexArray]) -> float:
    """Fraction of the positions of these batches (lists of record indices) that would be padding."""
    lengths = np.asarray(lengths)
    used = sum(int(lengths[np.asarray(batch)].sum()) for batch in batches)
    total = sum(len(batch) * int(lengths[np.asarray(batch)].max()) for batch in batches)
    return 1 - used / total if total else 0.0
