"""Cells of a benchmark's file: options and accepted answers, in the forms in which people write them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from string import ascii_uppercase
from typing import Any

from himap_train.data.records import RecordError


def options_in(found: Any, where: str) -> dict[str, str]:
    """Label to text of options: of a list A, B, ..., of a mapping its letters, of ARC's `text` and `label` these.

    Raises:
        RecordError: Another form, nothing where an option belongs, or letters with gaps.
    """
    found = _written_out(found)
    if found is None:
        return {}
    if isinstance(found, Mapping) and {"text", "label"} <= found.keys():
        found = dict(zip(map(str, found["label"]), found["text"], strict=False))
    elif isinstance(found, Mapping):
        found = {str(label).strip("() ."): text for label, text in found.items()}
        found = dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0])))  # 2 before 10
    elif isinstance(found, list | tuple) and len(found) > len(ascii_uppercase):
        raise RecordError(f"{where} holds {len(found)} options; there are letters for {len(ascii_uppercase)}")
    elif isinstance(found, list | tuple):
        found = dict(zip(ascii_uppercase, found, strict=False))
    else:
        raise RecordError(f"{where} holds {found!r:.60}; expected a list of options, or a mapping of letters to them")
    texts = list(found.values())
    while texts and texts[-1] in (None, ""):
        texts.pop()
    labels = list(found)[: len(texts)]
    start = int(labels[0]) if labels and labels[0].isdecimal() else None
    expected = ascii_uppercase if start is None else [str(start + number) for number in range(len(texts))]
    if None in texts or "" in texts or labels != [*expected[: len(texts)]]:
        raise RecordError(
            f"{where} holds {found!r:.60}; expected texts under letters or numbers that follow each other"
        )
    said = [re.match(rf"\(?{label}[.):]\s+(?=\S)", str(text)) for label, text in zip(labels, texts, strict=True)]
    if all(said):  # ["A. cat", "B. dog"]: the prompt writes the letters
        texts = [str(text)[match.end() :] for match, text in zip(said, texts, strict=True) if match]
    return dict(zip(labels, map(str, texts), strict=True))


def as_list(answer: Any) -> list[Any]:
    """Accepted answers: a list, also as text as in a cell of a table, or one."""
    listed = _written_out(answer) if isinstance(answer, str) and answer.startswith("[") else answer
    if isinstance(listed, list) and all(isinstance(one, str | int | float) for one in listed):
        fractions = any(isinstance(one, float) and not one.is_integer() for one in listed)
        if fractions and not any(isinstance(one, str) for one in listed) and len(listed) == 4:
            return [answer if isinstance(answer, str) else json.dumps(answer)]  # a box; others are of annotators
        return [_plain(one) for one in listed]
    return answer if isinstance(answer, list) else [] if answer is None else [_plain(answer)]


def index_of(cell: Any) -> str:
    """MMBench's number of a question, as text; pandas writes 5.0 in a column with gaps."""
    return str(cell).removesuffix(".0")


def _plain(value: Any) -> Any:
    """A whole number as such, which a column with gaps holds as 2.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _written_out(value: Any) -> Any:
    """The list or mapping that a text is, as JSON or as Python writes it; the value itself where it is none.

    Numpy's way, ['a' 'b'], is none: Python would read one text.
    """
    if not isinstance(value, str) or not value.strip().startswith(("[", "{", "(")):
        return value
    with suppress(ValueError, RecursionError):
        return json.loads(value)
    if re.search(r"""['"]\s+['"]""", value):
        return value
    with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        return ast.literal_eval(value.strip())
    return value
