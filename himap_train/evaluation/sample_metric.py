"""The base of every metric here: it keeps one row of numbers a sample, and all figures are computed from the rows of
all processes.

Keeping rows instead of running sums costs some 100 bytes a sample and makes every figure exact under DDP: a sample that
a distributed sampler repeats to fill its last batch is recognised by its key and counted once, figures that join
samples (MME's acc+, circular choice, errors clustered by image) see all partners even when these were answered on
different processes.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from himap_train.evaluation.statistics import mean_and_standard_error

GROUP_BYTES = 64


@dataclass(frozen=True)
class GroupScore:
    """Mean score of a group of samples, its standard error and the number of samples."""

    score: float
    standard_error: float
    count: int


@dataclass(frozen=True)
class Rows:
    """N samples, each once: `values` (N, columns) float64, `clusters` (N,) int64, `groups` N names of types."""

    values: torch.Tensor
    clusters: torch.Tensor
    groups: list[str]

    def where(self, group: str) -> torch.Tensor:
        """(N,) bool: the samples of one group."""
        return torch.tensor([name == group for name in self.groups], dtype=torch.bool)

    def group_names(self) -> list[str]:
        """The groups that occur, sorted; samples without a type are in none."""
        return sorted(set(self.groups) - {""})


class SampleMetric(Metric):
    """Scores each answer by `measure`; the first number that `measure` returns is the sample's score in [0, 1]."""

    name: ClassVar[str]
    columns: ClassVar[int] = 1
    full_state_update = False
    higher_is_better = True

    values: list[torch.Tensor]
    keys: list[torch.Tensor]
    group_names: list[torch.Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for state in ("values", "keys", "group_names"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    @abstractmethod
    def measure(self, prediction: str, answers: Sequence[str], meta: Mapping[str, str]) -> tuple[float, ...]:
        """`columns` numbers for one answer, given its reference answers and the facts of its record. Pure."""

    def cluster_of(self, key: str, cluster: str, meta: Mapping[str, str]) -> str:
        """What a sample belongs to (by default the image, as the caller says).

        Metrics that join samples override this.
        """
        return cluster

    def update(
        self,
        predictions: Sequence[str],
        answers: Sequence[Sequence[str]],
        meta: Sequence[Mapping[str, str]],
        keys: Sequence[str],
        clusters: Sequence[str] | None = None,
    ) -> None:
        """Take a batch of answers.

        Args:
            predictions: what the model said.
            answers: for each sample its accepted answers.
            meta: for each sample the facts of its record; `type` (or `category`) names its group.
            keys: for each sample a name that no other sample has; a key seen before is not counted again.
            clusters: for each sample the image or scene that it is about; by default each is its own.
        """
        for i, (prediction, accepted, facts, key) in enumerate(zip(predictions, answers, meta, keys, strict=True)):
            cluster = self.cluster_of(key, clusters[i] if clusters is not None else key, facts)
            row = torch.tensor([self.measure(prediction, accepted, facts)], dtype=torch.float32, device=self.device)
            ids = torch.tensor([[_hash(key), _hash(cluster)]], dtype=torch.int64, device=self.device)
            self.values.append(row)
            self.keys.append(ids)
            self.group_names.append(_encode(facts.get("type", facts.get("category", ""))).to(self.device))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the rows of all processes; a process without any takes part with zero rows of the right shape."""
        if not self.values:
            self.values = [torch.zeros(0, self.columns, device=self.device)]
            self.keys = [torch.zeros(0, 2, dtype=torch.int64, device=self.device)]
            self.group_names = [torch.zeros(0, GROUP_BYTES, dtype=torch.uint8, device=self.device)]
        super().sync(*args, **kwargs)

    def rows(self) -> Rows:
        """The rows held now, each key once (its first row).

        Raises:
            ValueError: there are none.
        """
        if len(self.values) == 0:
            raise ValueError(f"{self.name}: no sample was scored; check the data source and the limit")
        keys = dim_zero_cat(self.keys).cpu()
        _, first = np.unique(keys[:, 0].numpy(), return_index=True)
        index = torch.from_numpy(np.sort(first))
        values = dim_zero_cat(self.values).cpu().double()[index]
        names = dim_zero_cat(self.group_names).cpu()[index]
        return Rows(values, keys[index, 1], [_decode(name) for name in names])

    def figures(self, rows: Rows) -> dict[str, float]:
        """The published figures of this metric, the main one first: here the mean score, overall and per type."""
        figures = {self.name: rows.values[:, 0].mean().item()}
        for group in rows.group_names():
            figures[f"{self.name}/{group}"] = rows.values[rows.where(group), 0].mean().item()
        return figures

    def compute(self) -> dict[str, torch.Tensor]:
        """`figures` as tensors, over all processes."""
        return {name: torch.tensor(value) for name, value in self.figures(self.rows()).items()}

    def summary(self) -> tuple[GroupScore, dict[str, GroupScore]]:
        """Mean score with its standard error, overall and per type, over all processes."""
        with self.sync_context():
            rows = self.rows()
        everything = torch.ones(len(rows.groups), dtype=torch.bool)
        return _score(rows, everything), {group: _score(rows, rows.where(group)) for group in rows.group_names()}


def _score(rows: Rows, chosen: torch.Tensor) -> GroupScore:
    scores = rows.values[chosen, 0]
    return GroupScore(*mean_and_standard_error(scores, rows.clusters[chosen]), count=len(scores))


def _hash(text: str) -> int:
    """63 bits that are the same in every process, which Python's own `hash` is not."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _encode(group: str) -> torch.Tensor:
    """(1, 64) uint8: the name itself, because the process that gathers may never have met it."""
    data = group.encode()
    if len(data) > GROUP_BYTES:
        raise ValueError(
            f"type {group!r} has {len(data)} bytes; names of question types may have {GROUP_BYTES} at most"
        )
    return torch.tensor([list(data.ljust(GROUP_BYTES, b"\0"))], dtype=torch.uint8)


def _decode(name: torch.Tensor) -> str:
    return bytes(name.tolist()).rstrip(b"\0").decode()
