"""The base of every metric here: it keeps one row of numbers a sample, and all figures are computed from the rows.

Keeping rows instead of running sums makes every figure exact with several processes: a sample that two of them were
given to stay in step is recognised by its key and counted once, figures that join samples (MME's acc+, circular choice,
errors clustered by image) see all partners even when these were answered in different processes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from himap_train.data.records import Conversation, RecordError


@dataclass(frozen=True)
class GroupScore:
    """Mean score of a group of samples, its standard error and the number of samples."""

    score: float
    standard_error: float
    count: int


@dataclass(frozen=True)
class Rows:
    """N samples, each once: `values` (N, columns) float64, `clusters` (N,) int64, `groups` N names of types, `texts` N
    answers with their references.
    """

    values: torch.Tensor
    clusters: torch.Tensor
    groups: list[str]
    texts: Sequence[tuple[str, Sequence[str]]] = ()

    def where(self, group: str) -> torch.Tensor:
        """(N,) bool: the samples of one group."""
        return torch.tensor([name == group for name in self.groups], dtype=torch.bool)

    def group_names(self) -> list[str]:
        """The groups that occur, sorted; samples without a type are in none."""
        return sorted(set(self.groups) - {""})


_Row = tuple[tuple[float, ...], str, str, tuple[str, Sequence[str]]]
"""Numbers, cluster, group, and the answer with its references."""


class SampleMetric(ABC):
    """Scores each answer by `measure`; the first number that `measure` returns is the sample's score in [0, 1].

    Rows of several processes are joined by `join`, once, together with all else that an evaluation gathers.
    """

    name: ClassVar[str]
    reads_answers: ClassVar[bool] = True

    def __init__(self) -> None:
        self._rows: dict[str, _Row] = {}  # by key

    @abstractmethod
    def measure(self, prediction: str, answers: Sequence[str], meta: Mapping[str, str]) -> tuple[float, ...]:
        """Numbers for one answer, as many for each, given its reference answers and the facts of its record. Pure."""

    def cluster_of(self, key: str, cluster: str, meta: Mapping[str, str]) -> str:
        """What a sample belongs to (by default the image, as the caller says).

        Metrics that join samples override this.
        """
        return cluster

    def check(self, answers: Sequence[str], conversation: Conversation) -> None:
        """Raise RecordError, naming the record, where no answer to it could be scored."""
        try:
            self.measure("", answers, conversation.meta)
            self.cluster_of("", "", conversation.meta)
        except ValueError as error:
            raise RecordError(f"{conversation.where}, metric {self.name}: {error}") from error

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
            numbers = self.measure(prediction, accepted, facts)
            group = facts.get("type", facts.get("category", ""))
            self._rows.setdefault(key, (numbers, cluster, group, (prediction, accepted)))

    def join(self, parts: Iterable[SampleMetric]) -> None:
        """Hold what all processes have scored, this one among them; of a key that several have, the first's row."""
        rows: dict[str, _Row] = {}
        for part in parts:
            rows = part._rows | rows
        self._rows = rows

    def rows(self) -> Rows:
        """The rows held now, each key once (its first row).

        Raises:
            ValueError: there are none.
        """
        if not self._rows:
            raise ValueError(f"{self.name}: no sample was scored; check the data source and the limit")
        values, clusters, groups, texts = zip(*(self._rows[key] for key in sorted(self._rows)), strict=True)
        numbers = {cluster: number for number, cluster in enumerate(sorted(set(clusters)))}
        ids = torch.tensor([numbers[cluster] for cluster in clusters])
        return Rows(torch.tensor(values, dtype=torch.float64), ids, list(groups), texts)

    def figures(self, rows: Rows) -> dict[str, float]:
        """The published figures of this metric, the main one first: here the mean score, overall and per type."""
        figures = {self.name: rows.values[:, 0].mean().item()}
        for group in rows.group_names():
            figures[f"{self.name}/{group}"] = rows.values[rows.where(group), 0].mean().item()
        return figures

    def summary(self) -> tuple[GroupScore, dict[str, GroupScore]]:
        """Mean score with its standard error, overall and per type."""
        rows = self.rows()
        everything = torch.ones(len(rows.groups), dtype=torch.bool)
        return _score(rows, everything), {group: _score(rows, rows.where(group)) for group in rows.group_names()}


def _score(rows: Rows, chosen: torch.Tensor) -> GroupScore:
    scores = rows.values[chosen, 0]
    return GroupScore(*mean_and_standard_error(scores, rows.clusters[chosen]), count=len(scores))


def mean_and_standard_error(scores: torch.Tensor, clusters: torch.Tensor) -> tuple[float, float]:
    """Mean of the scores and its cluster-robust standard error: questions about one image are not independent.

    With one sample a cluster this is the ordinary standard error of a mean, which for right/wrong scores is the
    binomial one (up to the factor N / (N - 1)).

    Args:
        scores: (N,) floating point, one score a sample.
        clusters: (N,) integers; samples with the same number belong together.

    Returns:
        Mean, and for C clusters sqrt(C / (C - 1) * sum_c (sum_{i in c} (score_i - mean))^2) / N; NaN where fewer than
        two clusters tell nothing of the spread.

    Raises:
        ValueError: there are no scores.
    """
    if scores.numel() == 0:
        raise ValueError("no sample was scored; check the data source and the limit")
    scores = scores.double()
    mean = scores.mean()
    _, index = torch.unique(clusters, return_inverse=True)
    count = int(index.max()) + 1
    if count < 2:
        return mean.item(), math.nan
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, index, scores - mean)
    variance = count / (count - 1) * sums.square().sum() / scores.numel() ** 2
    return mean.item(), math.sqrt(variance.item())
