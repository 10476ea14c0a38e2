"""Questions answered by yes or no:

POPE (Li et al. 2023) and MME (Fu et al. 2023), each with the answer parser of its own evaluation code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from himap_train.evaluation.sample_metric import Rows, SampleMetric

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "ocr")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def pope_answer(text: str) -> str:
    """'no' if the first sentence, without commas, has the word No, no or not; else 'yes'.

    As LLaVA's eval_pope.py reads it.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def mme_answer(text: str) -> str:
    """'yes' or 'no' if the text is that or has it in its first four characters, else 'other', which is always wrong."""
    start = text.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def _truth(answers: Sequence[str]) -> float:
    truths = {answer.strip().rstrip(".").lower() for answer in answers}
    if truths not in ({"yes"}, {"no"}):
        raise ValueError(
            f"the reference answer {' or '.join(map(repr, answers))} is neither yes nor no; choose another metric for "
            "this data"
        )
    return float(truths == {"yes"})


def f1_figures(said: list[bool], true: list[bool]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 with 'yes' as the positive class, and the share of *predicted* yes.

    0 where a ratio has no cases.
    """
    hits = sum(s and t for s, t in zip(said, true, strict=True))
    precision = hits / sum(said) if any(said) else 0.0
    recall = hits / sum(true) if any(true) else 0.0
    return {
        "accuracy": sum(s == t for s, t in zip(said, true, strict=True)) / len(said),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": sum(said) / len(said),
    }


class POPE(SampleMetric):
    """Is an object in the image?

    Types are the splits (random, popular, adversarial); LLaVA reports the mean of their F1.
    """

    name = "pope"

    def measure(self, prediction: str, answers: Sequence[str], meta: Mapping[str, str]) -> tuple[float, ...]:
        """Right, said yes, is yes."""
        said, true = float(pope_answer(prediction) == "yes"), _truth(answers)
        return float(said == true), said, true

    def figures(self, rows: Rows) -> dict[str, float]:
        """Accuracy, precision, recall, F1 and yes-ratio over all and per split, and the mean F1 of the splits."""
        said, true = rows.values[:, 1].bool(), rows.values[:, 2].bool()
        figures = {f"pope_{name}": value for name, value in f1_figures(said.tolist(), true.tolist()).items()}
        splits = {group: rows.where(group) for group in rows.group_names()}
        by_split = {group: f1_figures(said[chosen].tolist(), true[chosen].tolist()) for group, chosen in splits.items()}
        figures |= {f"pope_{name}/{group}": value for group, found in by_split.items() for name, value in found.items()}
        if by_split:
            figures["pope_f1_mean_of_splits"] = sum(found["f1"] for found in by_split.values()) / len(by_split)
        return figures


class MME(SampleMetric):
    """Two yes/no questions an image: per category the accuracy in % plus accuracy+ in % (both questions of an image
    right).

    The clusters must be the images. Perception sums ten categories (2000 at most), cognition four (800 at most).
    """

    name = "mme"

    def measure(self, prediction: str, answers: Sequence[str], meta: Mapping[str, str]) -> tuple[float, ...]:
        """1.0 if right."""
        said, true = mme_answer(prediction), _truth(answers)
        return (float(said == ("yes" if true else "no")),)

    def figures(self, rows: Rows) -> dict[str, float]:
        """Accuracy over all, acc, acc+ and their sum per category, and the sums of the perception and cognition
        categories.
        """
        figures = {"mme_accuracy": rows.values[:, 0].mean().item()}
        sums = {}
        for group in rows.group_names():
            chosen = rows.where(group)
            right, images = rows.values[chosen, 0], rows.clusters[chosen]
            accuracy = 100 * right.mean().item()
            plus = 100 * sum(bool(right[images == image].all()) for image in images.unique()) / len(images.unique())
            figures |= {f"mme_acc/{group}": accuracy, f"mme_acc_plus/{group}": plus}
            sums[group.lower()] = accuracy + plus
        figures["mme_perception"] = sum(sums.get(name, 0.0) for name in PERCEPTION)
        figures["mme_cognition"] = sum(sums.get(name, 0.0) for name in COGNITION)
        return figures
