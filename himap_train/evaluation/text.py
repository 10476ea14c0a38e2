"""Answers of a word or a few that are compared as texts: exactly, as GQA does, and read off documents and charts: ANLS
for DocVQA (Biten et al. 2019), relaxed accuracy for ChartQA (Methani et al. 2020).
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from unicodedata import normalize

from himap_train.evaluation.sample_metric import SampleMetric

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def anls_score(prediction: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer: the best over the references, 0 below a similarity of
    0.5 (0.5 itself counts).

    The distance is taken between lower-case texts with single spaces, and divided by the length of the longer *raw*
    text, as DocVQA's evaluation does.
    """
    best, said = 0.0, _collapse(prediction)
    for answer in answers:
        length, wanted = max(len(prediction), len(answer)) or 1, _collapse(answer)
        if abs(len(said) - len(wanted)) <= (1 - ANLS_THRESHOLD) * length:  # else nothing counts
            best = max(best, 1 - _levenshtein(said, wanted) / length)
    return best if best >= ANLS_THRESHOLD else 0.0


def _levenshtein(one: str, other: str) -> int:
    """Characters that must be put in, taken out or changed; torchmetrics' `edit_distance` looks along a beam alone."""
    above = list(range(len(other) + 1))
    for row, character in enumerate(one, 1):
        here = [row]
        for column, target in enumerate(other, 1):
            here.append(min(above[column] + 1, here[-1] + 1, above[column - 1] + (character != target)))
        above = here
    return above[-1]


def _collapse(text: str) -> str:
    return " ".join(text.lower().split())


def _number(text: str) -> float | None:
    try:
        number = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None  # "Infinity" and "nan" are words


def relaxed_match(prediction: str, answer: str) -> bool:
    """Numbers may be off by 5 % of the target; everything else, and a target of 0, must be equal but for case."""
    prediction, answer = prediction.strip(), answer.strip()
    said, target = _number(prediction), _number(answer)
    if said is not None and target:
        return abs(said - target) / abs(target) <= RELAXED_TOLERANCE
    return prediction.lower() == answer.lower()


class ANLS(SampleMetric):
    """DocVQA's score."""

    name = "anls"

    def measure(self, prediction: str, answers: Sequence[str], meta: Mapping[str, str]) -> tuple[float, ...]:
        """The similarity in [0.5, 1], or 0."""
        return (anls_score(prediction, answers),)


class RelaxedAccuracy(SampleMetric):
    """ChartQA's accuracy. Types are its human and augmented halves."""

    name = "relaxed"

    def measure(self, prediction: str, answers: Sequence[str], meta: Mapping[str, str]) -> tuple[float, ...]:
        """1.0 for a match with one of the answers."""
        return (float(any(relaxed_match(prediction, answer) for answer in answers)),)


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
