"""Words beyond the scenes: the fine model learns to say each of them, so that others can teach it new answers."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path

from numpy.random import Generator

EXTRA_WORDS = tuple((Path(__file__).parents[1] / "assets/words.txt").read_text("utf-8").split())
"""Everyday words of other people's questions and answers; a token each in the fine model's tokenizer."""


def copying(words: Sequence[str], rng: Generator) -> tuple[str, str]:
    """A request to say one to four words, and the words. Every third is the beginning of one with letters behind it.

    Every beginning of a word is a token of the tokenizer, and unknown words are made of these: so each gets its turn.
    """

    def word() -> str:
        chosen = words[int(rng.integers(len(words)))]
        if rng.random() < 2 / 3:
            return chosen
        letters = rng.choice(list(string.ascii_letters + string.digits), size=int(rng.integers(0, 4)))
        return chosen[: 1 + int(rng.integers(len(chosen)))] + "".join(letters)

    said = " ".join(word() for _ in range(int(rng.integers(1, 5))))
    return f"Say {said}.", said
