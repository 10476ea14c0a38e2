"""Captions: CIDEr-D (Vedantam et al. 2015) as the COCO evaluation computes it, without its Java."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from himap_train.evaluation.sample_metric import Rows, SampleMetric

_LONGEST, _SIGMA, _SCALE = 4, 6.0, 10.0
_SIGNS = str.maketrans(
    {"’": "'", "(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- ", "{": " -lcb- ", "}": " -rcb- "}
)
_WORD = re.compile(
    r"-[lr][rsc]b-|can(?=not\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|o'clock\b|\b(?:[a-z]\.){2,}|\b(?:mr|mrs|ms|dr|st|jr|sr)\."
    r"|\d+(?:[.,:/]\d+)+|(?:(?!n't\b)[\w&/-])+|[$%#@]"
)
_Counts = Counter[tuple[str, ...]]


def words(text: str) -> list[str]:
    """Small letters, no punctuation, "n't" and "'s" apart, brackets by name: Penn Treebank's words, as COCO's code has
    them, but for rarities.
    """
    found = _WORD.findall(text.lower().translate(_SIGNS))
    return [word for word in (one if re.fullmatch("-..b-", one) else one.strip("-") for one in found) if word]


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, 10 at most; their mean is what is published.

    Args:
        captions: One an image.
        references: Those of each image; how rare a phrase is, is counted over all of these images.
    """
    counts = [[_grams(text) for text in texts] for texts in references]
    images = Counter(gram for texts in counts for gram in {gram for one in texts for gram in one})
    total = math.log(len(references))

    def weighed(grams: _Counts) -> tuple[list[dict[tuple[str, ...], float]], int]:
        levels: list[dict[tuple[str, ...], float]] = [{} for _ in range(_LONGEST)]
        for gram, count in grams.items():
            levels[len(gram) - 1][gram] = count * (total - math.log(max(1, images[gram])))
        return levels, sum(count for gram, count in grams.items() if len(gram) == 2)  # COCO's code counts bigrams

    scores = []
    for caption, texts in zip(captions, counts, strict=True):
        (said, length), similarity = weighed(_grams(caption)), 0.0
        for reference in texts:
            true, true_length = weighed(reference)
            penalty = math.exp(-((length - true_length) ** 2) / (2 * _SIGMA**2))
            for own, other in zip(said, true, strict=True):
                overlap = sum(min(value, other[gram]) * other[gram] for gram, value in own.items() if gram in other)
                norms = math.hypot(*own.values()) * math.hypot(*other.values())
                similarity += penalty * overlap / (norms or 1.0)
        scores.append(_SCALE * similarity / _LONGEST / len(texts))
    return scores


def _grams(text: str) -> _Counts:
    said = words(text)
    return Counter(tuple(said[i : i + n]) for n in range(1, _LONGEST + 1) for i in range(len(said) - n + 1))


class CIDEr(SampleMetric):
    """CIDEr-D of captions. One of them alone has no score: that depends on the references of all images."""

    name = "cider"

    def measure(self, prediction: str, answers: Sequence[str], meta: Mapping[str, str]) -> tuple[float, ...]:
        """No number yet."""
        return (math.nan,)

    def rows(self) -> Rows:
        """One row an image, with its score among all."""
        rows = super().rows()
        scores = cider(*zip(*rows.texts, strict=True))
        return Rows(torch.tensor(scores, dtype=torch.float64)[:, None], rows.clusters, rows.groups)
