"""Multiple choice: reading the letter out of an answer by rules alone, and circular evaluation (MMBench, Liu et al.
2023).

An answer that names no single option is wrong. Some evaluators draw a random letter or ask a language model then; this
one never does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from himap_train.evaluation.sample_metric import Rows, SampleMetric

CIRCULAR_OFFSET = 1_000_000
"""MMBench numbers the rotations of question i as i, i + 10^6, i + 2 * 10^6, ..."""

_LEADING_LETTER = re.compile(r"\(?([A-Z])(?:[).:](?:\s|$)|\)?$)")


def options_of(meta: Mapping[str, str]) -> dict[str, str]:
    """The texts of the options: facts of the record whose name is a capital letter and that are not empty."""
    return {name: text for name, text in meta.items() if len(name) == 1 and "A" <= name <= "Z" and text}


def extract_letter(prediction: str, options: Mapping[str, str]) -> str:
    """The letter that an answer names, or '' if it names none or several.

    In this order: the answer is a letter or starts with one ("B", "(B)", "B. a cat"); exactly one option's letter
    stands in it as a word, where "A" and "I" among more than three words are taken for words; it is the text of one
    option; it contains the text of exactly one. Texts ignore case.

    Args:
        prediction: what the model said.
        options: letter to text; may be empty if unknown, then any capital letter counts and texts can't.
    """
    text = prediction.strip()
    known = set(options) or {chr(code) for code in range(ord("A"), ord("Z") + 1)}
    start = _LEADING_LETTER.match(text)
    if start and start[1] in known:
        return start[1]
    words = re.findall(r"\w+", text)
    letters = {word for word in words if word in known}
    if len(words) > 3:
        letters -= {"A", "I"}
    texts = {letter: option.strip().lower() for letter, option in options.items()}
    said = text.lower()
    letters = letters or {letter for letter, option in texts.items() if option == said}
    letters = letters or {letter for letter, option in texts.items() if option in said}
    return letters.pop() if len(letters) == 1 else ""


class MultipleChoice(SampleMetric):
    """Letter accuracy (ScienceQA, AI2D, SEED-Bench, MMBench without rotations).

    The reference is the letter, or the text of an option.
    """

    name = "choice"

    def measure(self, prediction: str, answers: Sequence[str], meta: Mapping[str, str]) -> tuple[float, ...]:
        """1.0 if the letter is right."""
        options = options_of(meta)
        truth = extract_letter(answers[0], options)
        if not truth:
            raise ValueError(f"the reference answer {answers[0]!r} names no option of {options or 'A to Z'}")
        return (float(extract_letter(prediction, options) == truth),)


class CircularChoice(MultipleChoice):
    """Circular evaluation: a question is right only if it is answered rightly under every rotation of its options.

    Rotations belong together that have the same `question_id` in their facts, or the same `index` modulo 10^6
    (MMBench). The score of a type is the share of its questions that are right.
    """

    name = "circular"

    def cluster_of(self, key: str, cluster: str, meta: Mapping[str, str]) -> str:
        """The question."""
        if "question_id" in meta:
            return meta["question_id"]
        index = meta.get("index", "")
        if not index.isdigit():
            raise ValueError(
                f"sample {key}: circular evaluation needs `question_id` or a numeric `index` in the record, "
                f"found {dict(meta)}"
            )
        return str(int(index) % CIRCULAR_OFFSET)

    def rows(self) -> Rows:
        """One row a question: its worst rotation."""
        rows = super().rows()
        questions, index = torch.unique(rows.clusters, return_inverse=True)
        worst = torch.ones(len(questions), 1, dtype=torch.float64)
        worst[:, 0] = worst[:, 0].scatter_reduce(0, index, rows.values[:, 0], "amin")
        groups = {int(question): rows.groups[i] for i, question in enumerate(index.tolist())}
        return Rows(worst, questions, [groups[i] for i in range(len(questions))])
