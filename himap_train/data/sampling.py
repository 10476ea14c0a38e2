"""Which records make up which batch: shuffled, grouped by length, shared between processes, the same at every start.

Records are put in order in pieces of one *global batch*: what all processes take for one optimizer step. Each piece is
then cut into micro-batches, and each of those among the processes. So the order, and what each optimizer step learns
from, is the same however a global batch is divided into batch size, accumulation and processes.

Grouping follows LLaVA's trainer: shuffle, cut into megabatches, sort each by length, cut into batches. So a batch holds
samples of similar length, hardly any padding, and still other samples in every epoch. Records with as many image tokens
stay together, as in its `group_by_modality_length`: pruning shortens those alike, whereas a long text beside a short
question about an image is padding as soon as the image tokens are gone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

IndexArray = np.ndarray
logger = logging.getLogger(__name__)
_MEGABATCH = 50
"""Global batches that are sorted together (at most a quarter of all): more, less padding, less chance."""


class BatchOrder:
    """Batch sampler whose order depends on (seed, epoch) alone.

    Yields lists of (epoch, index): the epoch travels with the index because worker processes may outlive an epoch.
    All processes get the same number of batches, for which up to num_replicas - 1 records are repeated at the end;
    a repeated record has ~index in the place of its index.

    Args:
        size: number of records.
        batch_size: records in a batch of one process.
        lengths: estimated length of each record, to group by; None for no grouping.
        shuffle: another order in every epoch; otherwise the order of the source, and always epoch 0.
        seed: another seed, other orders.
        num_replicas: number of processes.
        rank: rank of this process.
        accumulate: micro-batches of an optimizer step.
        image_tokens: image tokens of each record, where grouping must not mix records with more and fewer.
        draw: epoch -> indices (size,) of the records that it takes, where these are not all of them once.
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
        accumulate: int = 1,
        image_tokens: IndexArray | None = None,
        draw: Callable[[int], IndexArray] | None = None,
    ) -> None:
        if min(size, batch_size, num_replicas, accumulate) < 1 or not 0 <= rank < num_replicas:
            raise ValueError(
                f"size={size}, batch_size={batch_size}, num_replicas={num_replicas}, accumulate={accumulate} "
                f"must be at least 1 and rank={rank} below num_replicas"
            )
        if lengths is not None and len(lengths) != size:
            raise ValueError(f"{len(lengths)} lengths for {size} records")
        self._size, self._shuffle, self._seed, self._draw = size, shuffle, seed, draw
        self._micro = num_replicas * batch_size  # records that all processes take together, each for one batch
        self._global = self._micro * accumulate
        self._lengths = None if lengths is None else np.asarray(lengths)
        self._image_tokens = np.zeros(size, dtype=np.int64) if image_tokens is None else image_tokens
        self._num_replicas, self._rank = num_replicas, rank
        self.epoch = 0
        self.start_batch = 0
        """How many batches an iteration leaves out, to go on in the middle of an epoch."""

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order comes next. Lightning calls this, for validation too, which stays as it is."""
        self.epoch = epoch if self._shuffle else 0

    def __len__(self) -> int:
        """Batches of this process in a whole epoch."""
        return self.batches_for(self._size)

    def records_in(self, batches: int) -> int:
        """Records that all processes together have taken after so many batches of each."""
        return min(batches * self._micro, self._size)

    def batches_for(self, records: int) -> int:
        """Batches of each process after which all together have taken so many records."""
        return -(-records // self._micro)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, start = self.epoch, self.start_batch
        return ([(epoch, int(index)) for index in batch] for batch in self.batches(epoch)[start:])

    def batches(self, epoch: int) -> list[IndexArray]:
        """Record indices of each batch of this process; ~index where the record is repeated."""
        order = self._order(epoch)
        missing = -len(order) % self._num_replicas
        order = np.concatenate([order, ~np.resize(order, missing)])
        shared = [order[start : start + self._micro] for start in range(0, len(order), self._micro)]
        return [batch[self._rank :: self._num_replicas] for batch in shared]

    def _order(self, epoch: int) -> IndexArray:
        order = np.arange(self._size) if self._draw is None else self._draw(epoch)
        order = self._generator(epoch, 0).permutation(order) if self._shuffle else order
        if self._lengths is None:
            return order
        span = self._global * max(1, min(_MEGABATCH, self._size // (4 * self._global)))
        chunks = [order[start : start + span] for start in range(0, len(order), span)]
        order = np.concatenate(
            [chunk[np.lexsort((-self._lengths[chunk], -self._image_tokens[chunk]))] for chunk in chunks]
        )
        return self._mixed(order, epoch) if self._shuffle else order

    def _mixed(self, order: IndexArray, epoch: int) -> IndexArray:
        """Global batches in random order, so that lengths do not fall within every megabatch.

        The longest comes first, to run out of memory at once or never. An incomplete one stays the last.
        """
        assert self._lengths is not None
        full = len(order) // self._global
        if not full:
            return order
        pieces = order[: full * self._global].reshape(full, self._global)
        longest = int(np.argmax(self._lengths[pieces].max(axis=1)))
        others = [i for i in self._generator(epoch, 1).permutation(full) if i != longest]
        return np.concatenate([pieces[[longest, *others]].reshape(-1), order[full * self._global :]])

    def _generator(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, epoch, stream])


def check_same_order(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compares what the order of the training data depends on in a run and in the one that it resumes.

    Raises:
        ValueError: the global batch is another one; says what to set. Another number of records is a warning.
    """
    if then["global_batch"] != now["global_batch"]:
        processes = max(now["processes"], 1)
        wanted = then["global_batch"] / (now["batch_size"] * processes)
        way = (
            f"set trainer.accumulate_grad_batches to {wanted:g}"
            if wanted.is_integer() and wanted >= 1
            else f"choose data.batch_size and trainer.accumulate_grad_batches with a product of "
            f"{then['global_batch'] / processes:g}, or another number of processes"
        )
        raise ValueError(
            f"the checkpoint was trained with {then['global_batch']} records an optimizer step ({_split(then)}), this "
            f"run has {now['global_batch']} ({_split(now)}); {way}"
        )
    if then["records"] != now["records"]:
        logger.warning(
            "the training data had %s records then and has %s now: within the running epoch some samples come twice "
            "and some not at all",
            then["records"],
            now["records"],
        )


def _split(state: Mapping[str, Any]) -> str:
    return " x ".join(f"{state[name]} {name}" for name in ("batch_size", "accumulate", "processes"))
