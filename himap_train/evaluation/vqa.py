"""VQA accuracy (Antol et al. 2015, section 3): an answer counts fully when three of the other annotators gave it.

Mean over the annotators i of min(1, number of j != i with answer_j == prediction / 3), after the normalisation of the
official evaluation code. The peculiarities of that code are kept on purpose, so that numbers compare: see the comments.
An answer counts fully only where three others gave it, so fewer than four answers make even a right one less than right
(the official script gives 0 for a single one); they are refused.
Prediction and answers are always normalised, as LLaVA's TextVQA evaluation, lmms-eval and VLMEvalKit do; the official
VQAv2 script leaves both alone where all annotators agree to the letter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from himap_train.evaluation.sample_metric import SampleMetric

LEAST_ANSWERS = 4
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {word: str(i) for i, word in enumerate("none one two three four five six seven eight nine ten".split())}
NUMBERS["zero"] = "0"
ARTICLES = {"a", "an", "the"}
CONTRACTED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()

_DIGIT_COMMA = re.compile(r"\d,+\d")
_PERIOD = re.compile(r"\.(?!\d)")  # the official look-behind that should spare "1." has a typo and never does
_PERIODS_AT_MOST = 32  # the official code passes re.UNICODE (= 32) in the place of the count


def _missing_one_apostrophe(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {wrong: word for word in CONTRACTED for wrong in _missing_one_apostrophe(word)}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the official list has this one the wrong way round


def normalise(text: str) -> str:
    """Punctuation, full stops, lower case, digits for number words, no articles, apostrophes back in: as officially."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    joined = text
    for mark in PUNCTUATION:
        # A mark next to a space just goes, one between letters becomes a space; a number like 1,000 anywhere makes all
        # marks go.
        gone = f"{mark} " in text or f" {mark}" in text or _DIGIT_COMMA.search(text)
        joined = joined.replace(mark, "" if gone else " ")
    joined = _PERIOD.sub("", joined, count=_PERIODS_AT_MOST)
    words = [NUMBERS.get(word, word) for word in joined.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalise_text(text: str) -> str:
    """As TextVQA's evaluation, which has a first step: lower case, no comma or question mark, the possessive apart."""
    return normalise(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def vqa_score(prediction: str, answers: Sequence[str]) -> float:
    """The mean over annotators, given normalised strings; `answers` is one a human (ten in VQAv2 and TextVQA).

    Raises:
        ValueError: Fewer than four answers, of which the formula cannot make 1.
    """
    if len(answers) < LEAST_ANSWERS:
        raise ValueError(
            f"VQA accuracy compares each of ten annotators' answers with the others'; found {len(answers)}, with which "
            f"no answer could score 1. Give at least {LEAST_ANSWERS} in `answers`, repetitions included, or choose the "
            "metric exact, gqa, relaxed or anls"
        )
    same = sum(answer == prediction for answer in answers)
    return sum(min(1.0, (same - (answer == prediction)) / 3) for answer in answers) / len(answers)


class VQAAccuracy(SampleMetric):
    """VQAv2's accuracy. `answers` are those of the annotators, repetitions included."""

    name = "vqa"
    read = staticmethod(normalise)

    def measure(self, prediction: str, answers: Sequence[str], meta: Mapping[str, str]) -> tuple[float, ...]:
        """The sample's accuracy in [0, 1]."""
        return (vqa_score(self.read(prediction), [self.read(answer) for answer in answers]),)


class TextVQAAccuracy(VQAAccuracy):
    """TextVQA's accuracy: the same with words split first."""

    name = "textvqa"
    read = staticmethod(normalise_text)
