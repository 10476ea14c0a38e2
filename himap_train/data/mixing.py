"""Several data sets as one, taken from by weight, and a share of the records split off for validation.

Sets, weights, seed and epoch alone decide what an epoch takes: it is the same in every process and after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from himap_train.data.lengths import hint
from himap_train.data.records import Conversation, Source, changes_with_epoch, outline
from himap_train.data.sources import open_source
from himap_train.pruning.names import check_keys, field_names
from himap_train.structured import Rule, check_shape

_WEIGHT = Rule("a number from 0 on", float, lambda weight: 0 <= weight < math.inf)
_SHAPE = {"path": str, "weight?": _WEIGHT, "image_folder?": str}


@dataclass(frozen=True)
class Part:
    """One of the data sets that `data.train` names.

    Attributes:
        path: as `open_source` takes it.
        weight: its share of an epoch's samples, relative to the others'; None: each record comes once.
        image_folder: where its image paths start, in place of `data.image_folder`.
    """

    path: str
    weight: float | None = None
    image_folder: str | None = None


@dataclass(frozen=True)
class Chosen:
    """Some records of a source: those of `indices` (n,) int64."""

    name: str
    source: Source
    indices: np.ndarray


def read_parts(train: str | Sequence[str | Mapping[str, Any]], share: float | None = None) -> tuple[Part, ...]:
    """What `data.train` names, without what has weight 0; nothing where it is one data set and all of it is trained on.

    Raises:
        ValueError: an unknown key (the nearest is named), a value that cannot be, or weights that decide nothing.
    """
    if isinstance(train, str) and share is None:
        return ()
    parts: list[Part] = []
    for number, entry in enumerate([train] if isinstance(train, str) else train):
        given = {"path": entry} if isinstance(entry, str) else entry
        check_shape(given, dict, "data", where := f"train[{number}]")
        check_keys(f"data.{where}", given, field_names(Part))
        check_shape(given, _SHAPE, "data", where)
        parts.append(Part(**given))
    weights = [part.weight for part in parts if part.weight is not None]
    if 0 < len(weights) < len(parts):
        missing = next(part.path for part in parts if part.weight is None)
        raise ValueError(f"data.train: {missing} has no weight and others have; give each one, or none of them")
    if not parts or (weights and not 0 < sum(weights) < math.inf):
        found = f"weights that sum to {sum(weights):g}" if parts else "an empty list"
        raise ValueError(f"data.train has {found}, so there is nothing to train on")
    return tuple(part for part in parts if part.weight != 0)


class MixedRecords:
    """Map-style source of the records of several, set after set. An epoch has as many samples as there are records.

    Args:
        sets: their records.
        weights: how an epoch's samples are divided among the sets; None: each record comes once.
    """

    def __init__(self, sets: Sequence[Chosen], weights: Sequence[float] | None = None) -> None:
        self._sets = sets
        self.sizes = [len(chosen.indices) for chosen in sets]
        self._ends = np.cumsum(self.sizes)
        used = [float(size and weight) for size, weight in zip(self.sizes, weights or self.sizes, strict=True)]
        self.samples = _divided(len(self), used) if weights else self.sizes
        """Of each set in an epoch."""
        self.epoch = 0
        self.fixed = not any(changes_with_epoch(chosen.source) for chosen in sets)
        """Whether the records are the same in every epoch."""

    def __len__(self) -> int:
        """Number of records, and of samples in an epoch."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Conversation:
        """The record at `index`; RecordError if it cannot be used."""
        source, place = self._place(index)
        return source[place]

    def length_hint(self, index: int) -> tuple[int, int]:
        """(characters, images) of a record; see `estimate_lengths`."""
        return hint(*self._place(index))

    def outline(self, index: int) -> Conversation:
        """The record at `index`, without its images where its source can."""
        return outline(*self._place(index))

    def stored(self, index: int) -> bool:
        """Whether a record lies somewhere; others are made when they are asked for."""
        return hasattr(self._place(index)[0], "length_hint")

    def _place(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        chosen = self._sets[number]
        if changes_with_epoch(chosen.source):
            chosen.source.epoch = self.epoch  # type: ignore[attr-defined]
        return chosen.source, int(chosen.indices[index - self._ends[number]])  # counted from the set's end

    def draw(self, epoch: int, seed: int) -> np.ndarray:
        """Indices (n,) int64 of the records that an epoch takes, set after set.

        Of each set pass after pass, every pass in an order of its own, from where the epoch before stopped: no record
        comes again before all of its set have come.
        """
        if self.samples == self.sizes:
            return np.arange(len(self))
        drawn = [np.arange(0)]
        for number, (size, samples, end) in enumerate(zip(self.sizes, self.samples, self._ends, strict=True)):
            if samples:
                start = epoch * samples
                passes = range(start // size, (start + samples - 1) // size + 1)
                orders = [np.random.default_rng([seed, number, turn, 2]).permutation(size) for turn in passes]
                drawn.append(end - size + np.concatenate(orders)[start % size :][:samples])
        return np.concatenate(drawn)

    def __str__(self) -> str:
        rows = zip(self._sets, self.sizes, self.samples, strict=True)
        return "\n".join(
            f"  {'epoch' if chosen is self._sets[0] else '':12s} {samples} of {len(self)} samples from {chosen.name}, "
            f"{size} records" + (f", each {samples / size:.2g} times" if size not in (0, samples) else "")
            for chosen, size, samples in rows
        )


def mix(
    parts: Sequence[Part],
    image_folder: str | None = None,
    follow_links: bool = False,
    share: float | None = None,
    limits: Mapping[str, int | None] | None = None,
) -> dict[str, MixedRecords]:
    """What to train on ("train") and, where a share of it is for that, to validate on ("validation").

    Args:
        parts: of `data.train`.
        image_folder: of the parts that name none.
        follow_links: see `open_source`.
        share: for validation, of each set, rounded up: by chance, the same for every seed. Records that name the same
            first image stay together, through all files in which it is called so.
        limits: at most so many records of "train" and "validation": the first of each set, as the weights divide them.

    Raises:
        ValueError: a set is empty, its share leaves nothing, or it cannot be split as it changes with the epoch.
    """
    made: dict[str, list[Chosen]] = {"train": [], "validation": []}
    sides: dict[str, bool] = {}
    for part in parts:
        name, source = part.path, open_source(part.path, part.image_folder or image_folder, follow_links=follow_links)
        if share is not None and changes_with_epoch(source):
            raise ValueError(f"data.validation: {share} of {name}, which is made anew in every epoch; name other data")
        kept = np.zeros(len(source), dtype=bool) if share is None else _share(source, share, sides)
        if kept.all():
            raise ValueError(
                f"data.train: {name} has {len(kept)} record(s), which leaves none to train on, as its images "
                "or those of sets before it went to validation; take it out"
            )
        made["train"].append(Chosen(name, source, np.flatnonzero(~kept)))
        made["validation"].append(Chosen(name, source, np.flatnonzero(kept)))
    limits = limits or {}
    weights = [part.weight for part in parts if part.weight is not None] or None
    mixed = {"train": MixedRecords(_first(made["train"], limits.get("train"), weights), weights)}
    if share is not None:
        mixed["validation"] = MixedRecords(_first(made["validation"], limits.get("validation"), None))
    return mixed


def _first(sets: list[Chosen], limit: int | None, weights: Sequence[float] | None) -> list[Chosen]:
    sizes = [len(chosen.indices) for chosen in sets]
    if limit is None or limit >= sum(sizes):
        return sets
    counts = _divided(limit, weights or sizes)
    return [Chosen(c.name, c.source, c.indices[:count]) for c, count in zip(sets, counts, strict=True)]


def _divided(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `total`, as near to the weights as can be."""
    exact = np.asarray(weights) / sum(weights) * total
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return [int(count) for count in counts]


def _share(source: Source, share: float, sides: dict[str, bool]) -> np.ndarray:
    """Whether each record (n,) is for validation.

    Args:
        source: the records.
        share: of them; more where earlier sets have put many of its images there.
        sides: of images that other sets have, whether they are for validation; those of this one are added.
    """
    first_image = getattr(source, "first_image", lambda _: None)
    numbers: dict[Any, int] = {}
    groups = np.array([numbers.setdefault(first_image(i) or i, len(numbers)) for i in range(len(source))])
    decided = np.array([(1 if sides[name] else -1) if name in sides else 0 for name in numbers])
    # First what is for validation in any case, then others until there is enough; last what must not be.
    order = np.random.default_rng(0).permutation(len(numbers))
    order = order[np.argsort(-decided[order], kind="stable")]
    sizes = np.bincount(groups)[order]
    taken = (np.cumsum(sizes) - sizes < share * len(groups)) & (decided[order] == 0) | (decided[order] == 1)
    chosen = set(order[taken].tolist())
    sides |= {name: number in chosen for name, number in numbers.items() if isinstance(name, str)}
    return np.isin(groups, order[taken])
