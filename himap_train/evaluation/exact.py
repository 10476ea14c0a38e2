"""Exact match: the answer is one of the accepted answers."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from unicodedata import normalize

from himap_train.evaluation.sample_metric import SampleMetric

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def plain(text: str) -> str:
    """Lower case, single spaces, without a final full stop, each letter with its accents as one character."""
    return " ".join(normalize("NFC", text).lower().split()).rstrip(".").strip()


def without_punctuation(text: str) -> str:
    """Lower case, single spaces, ASCII punctuation removed, each letter with its accents as one character."""
    return " ".join(normalize("NFC", text).lower().translate(_PUNCTUATION).split())


class ExactMatch(SampleMetric):
    """Share of answers that equal an accepted answer, ignoring case, spaces at the ends and a final full stop."""

    name = "exact"
    read = staticmethod(plain)

    def measure(self, prediction: str, answers: Sequence[str], meta: Mapping[str, str]) -> tuple[float, ...]:
        """1.0 for a match, else 0.0."""
        return (float(self.read(prediction) in map(self.read, answers)),)


class GQA(ExactMatch):
    """GQA (Hudson and Manning 2019): exact match that ignores case and punctuation."""

    name = "gqa"
    read = staticmethod(without_punctuation)
