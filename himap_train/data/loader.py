"""The data loader of a run: knows where in which epoch it is, so that a resumed run goes on with the very next batch,
and how many supervised tokens the batches of one optimizer step have together.

The loss of an optimizer step is the mean over the tokens of all its micro-batches. The weight of the first micro-batch
depends on the last one, so the loader reads a whole window before it hands out the first batch of it.

It wraps torch's DataLoader rather than being one: Lightning would give a DataLoader a sampler of its own on several
devices, while the order here (`BatchOrder`) already is shared between processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from himap_train.data.batches import Batch, collate
from himap_train.data.datasets import REPEATED, SUBSTITUTE, EncodedRecords
from himap_train.data.encode import IGNORED, Sample
from himap_train.data.sampling import BatchOrder
from himap_train.data.skips import TooManySkippedError

WINDOW_TOKENS = "window_tokens"
"""Key in a training batch: supervised tokens in its whole window on this process, an int."""
WINDOW_BATCHES = "window_batches"
"""Key in a training batch: micro-batches of its window that supervise something on this process, an int."""
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
        """The same batches, each with `window_tokens`, `window_batches` and `waited_seconds`.

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
    tokens = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in window]
    counts = {WINDOW_TOKENS: sum(tokens), WINDOW_BATCHES: sum(map(bool, tokens))}
    return ({**batch, **counts} for batch in window)


@dataclass(frozen=True)
class Collate:
    """`collate` with its settings, for worker processes.

    Attributes:
        keep_substitutes: training takes a good record for a broken one; an evaluation must not count a record twice.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    keep_substitutes: bool = True

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Pads what counts. Where nothing does, one sample stays without supervision: every process needs a batch."""
        own = [sample for sample in samples if self._counts(sample)] or [_unsupervised(samples[0])]
        return collate(own, self.pad_token_id, pad_to_multiple_of=self.pad_to_multiple_of)

    def _counts(self, sample: Sample) -> bool:
        return REPEATED not in sample and (self.keep_substitutes or SUBSTITUTE not in sample)


def _unsupervised(sample: Sample) -> Sample:
    return {**sample, "labels": torch.full_like(sample["labels"], IGNORED)} if "labels" in sample else sample


def worker_options(num_workers: int) -> dict[str, Any]:
    """DataLoader arguments for this number of worker processes."""
    return {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }


@dataclass(frozen=True)
class _Plainly:
    """A loader whose workers' errors say what they would say here, without the worker's traceback before it."""

    loader: DataLoader[Any]

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from self.loader
        except (OSError, ValueError, TooManySkippedError) as error:
            kind = type(error)
            _, found, message = str(error).partition(
                f"\n{kind.__module__}.{kind.__qualname__}: ".replace("builtins.", "")
            )
            if not (found and str(error).startswith("Caught ")):
                raise
            raise kind(message.strip()) from error

    def __len__(self) -> int:
        return len(self.loader)


class BatchLoader:
    """Iterates over the batches of one epoch; stateful as Lightning's loops understand it.

    Args:
        dataset: encoded records.
        order: which records make up which batch.
        collate_fn: samples -> batch.
        num_workers: processes that read and encode; 0 does it in this one.
        windows: for training, how batches make up optimizer steps.
        trained: how many batches of the running epoch have been trained on; by default, what was handed out, which is
            one more when a run is interrupted within a step.
    """

    def __init__(
        self,
        dataset: EncodedRecords,
        order: BatchOrder,
        collate_fn: Collate,
        num_workers: int = 0,
        windows: Windows | None = None,
        trained: Callable[[], int] | None = None,
    ) -> None:
        self.sampler = order  # the names that Lightning looks at, here to call set_epoch
        self.batch_sampler = None
        options = worker_options(num_workers)
        self._loader = _Plainly(DataLoader(dataset, batch_sampler=order, collate_fn=collate_fn, **options))
        self._windows, self._trained = windows, trained
        self._handed_out = 0
        self._resume: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch after a resume, otherwise all of it.

        A generator on purpose: Lightning asks for the iterator before it sets the epoch.
        """
        epoch, records = self._resume or (0, 0)
        self._resume = None
        done = self.sampler.batches_for(records) if epoch == self.sampler.epoch else 0
        self._handed_out = self.sampler.start_batch = done
        for batch in self._windows.count(self._loader, done) if self._windows else self._loader:
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, and how many of its records all processes have taken: this does not depend on their number."""
        batches = self._trained() if self._trained else self._handed_out
        return {"epoch": self.sampler.epoch, "records": self.sampler.records_in(batches)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes the next iteration go on from there, if it is of the same epoch."""
        self._resume = (state["epoch"], state["records"])
