"""Multiple choice: reading the letter out of an answer by rules alone, and circular evaluation (MMBench, Liu et al.
2023).

An answer that names no single option is wrong. Some evaluators draw a random letter or ask a language model then; this
one never does. References are read exactly, never by these rules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any
from unicodedata import normalize

import torch

from himap_train.evaluation.sample_metric import Rows, SampleMetric
from himap_train.evaluation.text import plain

CIRCULAR_OFFSET = 1_000_000
"""MMBench numbers the rotations of question i as i, i + 10^6, i + 2 * 10^6, ..."""

STRICT_LETTERS = tuple("ABCDE")
"""What LLaVA's script takes for letters of options."""

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without spaces, so their neighbours are words of their own
_BEFORE_CJK = re.compile(rf"(?:^|(?<=[和或与及]))([A-Za-z])(?=[{_CJK}])")
_BEHIND_CJK = re.compile(r"(?<=[是为选择项案和或与及])([A-Za-z])(?![A-Za-z])")  # 维生素C is no letter of an option
_JOINED = r"(?!\W*(?:or|and|nor|[和或与及])?\W*\b[A-Za-z]\b(?!'))"  # "A or B": none of them leads
_LEADING_LETTER = re.compile(rf"[(\[\"'*]*([A-Za-z])[)\]\"'*]*(?:$|\s*\n|(?:[.:,]|(?<=[)\]*]))(?=\s|$){_JOINED})")
_OPTION = r"(?:(?:the\s+)?(?:option|choice|letter)\b[\s:*\"']*)?"
_NAMED_LETTERS = re.compile(  # "the answer is (b)", "Option A or B", "answer: the letter C"; "answer is a dog" isn't
    rf"\b(answer|option|choice)(?:\s+is|\s+would\s+be)?\b[\s:=*\"']*{_OPTION}"
    r"[(\[]?(?-i:(?!I\s+[a-z])([A-Z])(?![\w'-])|([a-z])(?=[)\].,;:!*\"']|\s*$))"
    rf"(?:\W*(?:[,/]|\b(?:or|and|nor)\b)\W*{_OPTION}(?-i:(?![AI]\s+[a-z])([A-Z])(?![\w'-])|(?<=\()([a-z])(?=\))))?",
    re.IGNORECASE,
)
_MARKED = r"[(\[\"'*]{0,4}(?:(?<=\()[a-z]|\b[A-Z])\b[)\]\"'*]{0,4}"
_REFUSED = re.compile(  # "not B", "isn't option (b)", "A is wrong", "option A isn't": none of these names its letter
    rf"(?:\b[Nn]ot|n['’]t)\s+(?:(?:the\s+)?(?:option|choice|letter)\s+)?{_MARKED}"
    rf"|(?:\b(?:[Oo]ption|[Cc]hoice)\s+)?{_MARKED}\s+is(?:n['’]t|\s+(?:\w+\s+)?(?:not|wrong|incorrect))\b"
    rf"|(?:不是|不选|并非|排除)\s*{_MARKED}|{_MARKED}\W*(?:不对|错误|是错)"
)
# Articles and pronouns are followed by a word, letters at most by one of these.
_LONE_LETTER = re.compile(
    r"(?<![\w'-])(?:([B-HJ-Z])|([AI])(?!\s+(?!(?:or|and|nor|is|was|because|since|as|but)\b)\w))(?![\w'-])"
    r"|(?<!\w)\(([a-z])\)"
)
_REFERENCE = re.compile(r"\(?([A-Za-z])[).:]{0,2}")


def options_of(meta: Mapping[str, str]) -> dict[str, str]:
    """Letter to text of the options: facts of the record whose name is a capital letter and that are not empty; else
    what is under `options` or `choices`, a list in its order or a mapping.
    """
    named = {name: text for name, text in meta.items() if len(name) == 1 and "A" <= name <= "Z" and text}
    for key in ("options", "choices"):
        given = json_list(meta.get(key, ""))
        mapping = len(given) == 1 and isinstance(given[0], dict)
        pairs = given[0].items() if mapping else zip(ascii_uppercase, given, strict=False)
        texts = {name.strip("() "): str(text) for name, text in pairs if isinstance(text, str | int | float)}
        named = named or {name: text for name, text in texts.items() if len(name) == 1 and "A" <= name <= "Z"}
    return named


def json_list(fact: str) -> list[Any]:
    """The list that a fact of a record is; empty where it is none."""
    try:
        found = json.loads(fact)
    except (ValueError, RecursionError):
        return []
    return found if isinstance(found, list) else []


def read_reference(answer: str, options: Mapping[str, str]) -> str:
    """The letter that a reference stands for, or '' if it stands for none: a letter ("B", "b", "(b)", "B."), the whole
    text of one option, or the 0-based number of one ("1").

    Args:
        answer: the reference.
        options: letter to text; may be empty if unknown, then any letter counts and numbers up to 25 do.
    """
    known, said = set(options) or set(ascii_uppercase), answer.strip()
    letter = _REFERENCE.fullmatch(said)
    if letter and letter[1].upper() in known:
        return letter[1].upper()
    texts = [name for name, text in options.items() if plain(text) == plain(said)]
    if texts or not re.fullmatch(r"[0-9]{1,2}", said):
        return texts[0] if len(texts) == 1 else ""
    numbered = ascii_uppercase[int(said) : int(said) + 1]
    return numbered if numbered in known else ""


def extract_letter(prediction: str, options: Mapping[str, str]) -> str:
    """The letter that an answer names, or '' if it names none or several.

    The first of these that says something decides: the whole answer is a letter ("b", "(B)", "B."); the whole answer is
    the text of an option; it starts with a letter ("B. a cat"); "answer", or else "option" or "choice", with or without
    "is" or ":", comes before a letter; a capital letter, or one in brackets, stands as a word by itself ("A" and "I"
    before another word are words), in Chinese behind "is", "choose" or "option"; it contains the text of an option, of
    texts in each other the longest.

    Letters are those of options, and letters inside the text of an option belong to that. What an answer refuses ("not
    B", "A is wrong") it does not name. Texts ignore case and a final full stop; full-width characters are plain ones.

    Args:
        prediction: what the model said.
        options: letter to text; may be empty if unknown, then any letter counts and texts can't.
    """
    said, known = normalize("NFKC", prediction).strip(), set(options) or set(ascii_uppercase)
    whole = _REFERENCE.fullmatch(said)
    if whole and whole[1].upper() in known:
        return whole[1].upper()
    texts = {letter: plain(normalize("NFKC", text)) for letter, text in options.items() if plain(text)}
    equal = {letter for letter, text in texts.items() if text == plain(said)}
    contained, rest = _contained(said, texts)
    if (spaced := _BEHIND_CJK.sub(r" \1", _BEFORE_CJK.sub(r"\1. ", said))) != said:
        _, rest = _contained(spaced, texts)
    rest = _REFUSED.sub(" ", rest).strip()
    start = _LEADING_LETTER.match(rest)
    named: dict[bool, set[str]] = {True: set(), False: set()}
    for word, *found in _NAMED_LETTERS.findall(rest):
        named[word.lower() == "answer"].update(letter.upper() for letter in found)
    lone = {next(filter(None, groups)).upper() for groups in _LONE_LETTER.findall(rest)}
    ordered = (equal, {start[1].upper()} if start else set(), named[True], named[False], lone)
    letters = next((found for letters in ordered if (found := letters & known)), contained)
    return letters.pop() if len(letters) == 1 else ""


def _contained(said: str, texts: Mapping[str, str]) -> tuple[set[str], str]:
    """Letters of the options whose texts stand in an answer, and the answer without those texts."""
    # A letter as a text is no text here: it can't be told from the letter of an option.
    telling = {text for text in texts.values() if len(text) > 1 or re.match(rf"[\d{_CJK}]", text)}
    wanted = sorted(telling, key=len, reverse=True)
    if not wanted:
        return set(), said
    either = "|".join(_bounded(r"\s+".join(map(re.escape, text.split())), text) for text in wanted)
    pattern = re.compile(rf"((?:\bnot|n['’]t)\s+(?:an?\s+|the\s+)?|不是|并非)?({either})", re.IGNORECASE)
    found = {plain(text) for refused, text in pattern.findall(said) if not refused}
    return {letter for letter, text in texts.items() if text in found}, pattern.sub(" text ", said)


def _bounded(pattern: str, text: str) -> str:
    """A text of an option as a word by itself; in a script without spaces it may stand beside anything."""
    other = rf"[^\W{_CJK}]"
    before = "" if re.match(f"[{_CJK}]", text) else rf"(?<!{other})(?<!\d\.)"
    return before + pattern + ("" if re.search(f"[{_CJK}]$", text) else rf"(?!{other}|[.,]\d)")


def strict_letter(prediction: str, options: Mapping[str, str]) -> str:
    """The letter as LLaVA's `eval_science_qa.py` reads it, or '' where that script counts a question as failed.

    The whole answer is a letter from A to E; or it begins with one, a full stop and a space; or "The answer is ", a
    capital letter and one more character stand in it exactly once. A letter beyond the options is none. Where options
    are not known, there are five.
    """
    if prediction in STRICT_LETTERS or (prediction[:1] in STRICT_LETTERS and prediction[1:3] == ". "):
        letter = prediction[:1]
    else:
        found = re.findall(r"The answer is ([A-Z]).", prediction)
        letter = found[0] if len(found) == 1 else ""
    return letter if letter in STRICT_LETTERS[: len(options) or None] else ""


class MultipleChoice(SampleMetric):
    """Letter accuracy (ScienceQA, AI2D, SEED-Bench, MMBench without rotations).

    References are read by `read_reference`; an answer is right that names one of them.
    """

    name = "choice"
    read = staticmethod(extract_letter)

    def measure(self, prediction: str, answers: Sequence[str], meta: Mapping[str, str]) -> tuple[float, ...]:
        """1.0 if the letter is right."""
        options = options_of(meta)
        right = {answer: read_reference(answer, options) for answer in answers}
        for answer, letter in right.items():
            if not letter:
                raise ValueError(
                    f"the reference answer {answer!r:.80} names no option of {options or 'A to Z'}; expected a letter, "
                    "the text of one option, or its number from 0"
                )
        return (float(self.read(prediction, options) in right.values()),)


class StrictChoice(MultipleChoice):
    """Letter accuracy with answers read as LLaVA's own ScienceQA script does; see `strict_letter`."""

    name = "choice-strict"
    read = staticmethod(strict_letter)


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
                f"circular evaluation needs `question_id` or a numeric `index` in the record, found {dict(meta)}"
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
