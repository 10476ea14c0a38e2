"""Sources as torch data sets: records are read, decoded and encoded in the loader's workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from torch.utils.data import Dataset

from himap_train.data.encode import Sample
from himap_train.data.records import Conversation, RecordError, Source, changes_with_epoch
from himap_train.data.skips import SkipLog

Encode = Callable[[Conversation], Sample]
SUBSTITUTE: Final = "substitute_for"
REPEATED: Final = "repeated"
"""Keys that mark a sample which stands for another, or must not count; no record of a user has a say in them."""


class EncodedRecords(Dataset[Sample]):
    """Samples by number. A record that cannot be used is replaced by the next one that can, marked as such.

    Args:
        source: the records. If it changes with the epoch, its `epoch` is set from the key.
        encode: `Encoder.encode` or `Encoder.encode_prompt`.
        skips: counts what is replaced.
        limit: use only the first records.
    """

    def __init__(self, source: Source, encode: Encode, skips: SkipLog, limit: int | None = None) -> None:
        self._source, self._encode, self._skips = source, encode, skips
        self._length = len(source) if limit is None else min(limit, len(source))

    def __len__(self) -> int:
        """Number of records."""
        return self._length

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample of (epoch, index); of (epoch, ~index) the same, marked as repeated (see `BatchOrder`)."""
        epoch, wanted = key
        if wanted < 0:
            sample = self[epoch, ~wanted]
            return {**sample, REPEATED: ~wanted}
        if changes_with_epoch(self._source):
            self._source.epoch = epoch  # type: ignore[attr-defined]
        for step in range(self._length):
            index = (wanted + step) % self._length
            try:
                sample = self._encode(self._source[index])
            except RecordError as error:
                self._skips.add(index, error)
                continue
            return {**sample, SUBSTITUTE: wanted} if step else sample
        raise RuntimeError(f"none of the {self._length} records can be used")
