"""Special tokens that stand in what people wrote are text, but those that a family writes around places in a picture:
only a chat template's own may end an answer or pad a row.

A template renders both into one string, so those of the text are marked before (`hide`) and told apart after (`ids`).
What has none is encoded by the tokenizer as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from functools import cached_property, lru_cache
from typing import Any

from tokenizers import AddedToken

from himap_train.data.forms import checked_text
from himap_train.data.records import RecordError

_CONTENT = re.compile(r"</?(box|ref|quad)>|<\|(box|object_ref|quad)_(start|end)\|>")
"""Special tokens that InternVL and Qwen-VL write in answers themselves, around places and what lies there."""
_MARK = "\ufdd0"  # no character, and in nobody's text: Unicode keeps it for uses like this one


class PlainText:
    """Encodes text in which a template's special tokens are special and those of its users are not.

    Args:
        tokenizer: the checkpoint's.
        image_token: special too, whatever the tokenizer says.
    """

    def __init__(self, tokenizer: Any, image_token: str) -> None:
        self._tokenizer = tokenizer
        named = {image_token, *tokenizer.all_special_tokens}
        self._special: dict[str, tuple[int, AddedToken]] = {
            token.content: (number, token)
            for number, token in tokenizer.added_tokens_decoder.items()
            if len(token.content) > 1 and (token.special or token.content in named)
        }
        self._ids = {number for number, _ in self._special.values()} - {tokenizer.unk_token_id}
        longest_first = sorted(self._special, key=len, reverse=True)
        written, marked = ([re.escape(form(s)) for s in longest_first] for form in (str, _marked))
        hidden = [re.escape(special) for special in longest_first if not _CONTENT.fullmatch(special)]
        self._hidden = re.compile("|".join(hidden) or "(?!)")
        self._written = re.compile("|".join(written) or "(?!)")
        self._either = re.compile("|".join([*marked, *written]) or "(?!)")

    def hide(self, text: str, where: str) -> str:
        """What someone wrote, with a mark in each special token.

        Args:
            text: of one turn.
            where: the record, for messages.

        Raises:
            RecordError: the mark itself is in the text, or half a character.
        """
        checked_text(text, f"{where}: the text")
        if _MARK in text:
            raise RecordError(f"{where}: the text holds U+FDD0, which is no character; take it out")
        while self._hidden.search(text):
            text = self._hidden.sub(lambda match: _marked(match[0]), text)
        return text

    def ids(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of what a template has rendered."""
        if _MARK not in text:
            ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
            found = sum(number in self._ids for number in ids)
            if add_special_tokens:
                found -= self._tokenizer.num_special_tokens_to_add()
            if found <= 0 or found <= len(self._written.findall(text)):
                return ids
            # Else it has taken letters that look alike for a special token, as full-width ones under NFKC.
        return self._beside_stand_ins(text, add_special_tokens)

    def _beside_stand_ins(self, text: str, add_special_tokens: bool) -> list[int]:
        """By a tokenizer that reads no special token, with stand-ins for those of the template."""
        tokenizer, stand_ins, numbers = self._split
        given = self._either.sub(lambda match: stand_ins.get(match[0]) or match[0].replace(_MARK, ""), text)
        ids = tokenizer(given, add_special_tokens=add_special_tokens, split_special_tokens=True)["input_ids"]
        if sum(i in numbers for i in ids) != sum(match in stand_ins for match in self._either.findall(text)):
            raise RecordError(f"text with special tokens that this tokenizer cannot read as text: {text!r:.80}")
        return [numbers.get(i, i) for i in ids]

    @cached_property
    def _split(self) -> tuple[Any, dict[str, str], dict[int, int]]:
        """A copy of the tokenizer, special token -> its stand-in in the text, id of a stand-in -> that of its token."""
        tokenizer = deepcopy(self._tokenizer)
        tokenizer.add_tokens(list(self._special), special_tokens=True)  # all, whatever they were
        stand_ins = {content: f"{_MARK}{number}{_MARK}" for content, (number, _) in self._special.items()}
        numbers: dict[int, int] = {}
        for content, (number, token) in self._special.items():
            how = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word", "normalized")}
            tokenizer.add_tokens([AddedToken(stand_ins[content], special=False, **how)])
            numbers[tokenizer.convert_tokens_to_ids(stand_ins[content])] = number
        return tokenizer, stand_ins, numbers


def answer_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """What an answer's ids say: without special tokens, but those that its writer means."""
    dropped = _dropped(tokenizer)
    if dropped is None:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text
    written: str = tokenizer.decode([number for number in ids if number not in dropped])
    return written


@lru_cache(maxsize=8)
def _dropped(tokenizer: Any) -> frozenset[int] | None:
    """Special tokens that are no content; None where all are none."""
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    content = {number for number, token in special.items() if _CONTENT.fullmatch(token)}
    return frozenset(special.keys() - content) if content else None


def _marked(token: str) -> str:
    return token[0] + _MARK + token[1:]
