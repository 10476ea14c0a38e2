"""A conversation -> token ids of its questions and answers, images still one token each.

Prompts and answers are tokenized one after the other, each with what stands before it as context, and joined. So the
ids of a prompt never depend on the answer that follows it, whatever the tokenizer would merge at the border.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from himap_train.data.plain_text import PlainText
from himap_train.data.records import Conversation, RecordError
from himap_train.data.segments import Exchange, Template
from himap_train.data.turns import check_turns, to_messages

_CHARACTERS, _CHARACTERS_A_TOKEN, _TURNS = 2**20, 512, 1000
"""What is not tokenized: more characters than both the first and so many for each token of max_length; more turns."""


@dataclass(frozen=True)
class TokenizedExchange:
    """Ids of a prompt, one image token id for each image, and of its answer with the end token."""

    prompt: list[int]
    answer: list[int]


class ConversationTokenizer:
    """Tokenizes conversations for one checkpoint.

    Args:
        processor: the checkpoint's LlavaProcessor.
        max_length: most tokens of a sample. It bounds what is tokenized at all: 512 characters a token, but at least a
            million (2**20), and a thousand turns.

    Raises:
        ValueError: the processor has no chat template.
    """

    def __init__(self, processor: Any, max_length: int | None = None) -> None:
        self._processor = processor
        self._characters = max(_CHARACTERS, _CHARACTERS_A_TOKEN * (max_length or 0))
        self._template = Template(processor)
        self._text = PlainText(processor.tokenizer, processor.image_token)
        self._image_id: int = processor.image_token_id

    def __call__(self, conversation: Conversation, prompt: bool = False) -> list[TokenizedExchange]:
        """Ids of every question and answer, one image token for each image; images are not opened.

        Args:
            conversation: from any source.
            prompt: for generation: the last answer, if there is one, is left out.

        Raises:
            RecordError: the conversation cannot be used.
        """
        self._check_size(conversation)
        check_turns(conversation, training=not prompt)
        messages = to_messages(conversation)
        for part in (part for message in messages for part in message["content"] if part["type"] == "text"):
            part["text"] = self._text.hide(part["text"], conversation.where)
        if prompt and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        exchanges = self._join(self._template.exchanges(messages, conversation.where, open_end=prompt))
        found = sum(ids.count(self._image_id) for exchange in exchanges for ids in (exchange.prompt, exchange.answer))
        shown = sum(part["type"] == "image" for message in messages for part in message["content"])
        if messages[-1]["role"] == "user" and not prompt:
            shown -= sum(part["type"] == "image" for part in messages[-1]["content"])
        if found != shown:
            raise RecordError(
                f"{conversation.where}: {shown} image(s) but {found} image token(s) after the chat template; "
                "the template drops or repeats images"
            )
        return exchanges

    def _check_size(self, conversation: Conversation) -> None:
        characters = sum(len(turn.text) for turn in conversation.turns)
        if characters > self._characters or len(conversation.turns) > _TURNS:
            raise RecordError(
                f"{conversation.where} has {characters} characters in {len(conversation.turns)} turns; at most "
                f"{self._characters} (the more the larger max_length is) in {_TURNS} turns are read; split it or take "
                "it out"
            )

    def _join(self, exchanges: list[Exchange]) -> list[TokenizedExchange]:
        result: list[TokenizedExchange] = []
        before = ""
        for exchange in exchanges:
            prompt = self._continue(before, exchange.prompt) if before else self._start(exchange.prompt)
            end = exchange.end.lstrip(" ")
            answer: list[int] = []
            if end:
                text = exchange.answer + exchange.end.removesuffix(end)
                answer = [*self._continue(exchange.prompt, text), self._processor.tokenizer.convert_tokens_to_ids(end)]
            result.append(TokenizedExchange(prompt, answer))
            before = end
        return result

    def _start(self, text: str) -> list[int]:
        """Ids of the first prompt, with bos where the tokenizer sets one and the template did not."""
        tokenizer = self._processor.tokenizer
        if tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token):
            return self._text.ids(text)
        ids, plain = self._text.ids(text, add_special_tokens=True), self._text.ids(text)
        eos = [tokenizer.eos_token_id]
        return ids[:-1] if ids[-1:] == eos != plain[-1:] else ids

    def _continue(self, before: str, text: str) -> list[int]:
        """Ids of `text` where it stands, after `before`; alone where a token would cross the border."""
        left, both = self._text.ids(before), self._text.ids(before + text)
        return both[len(left) :] if both[: len(left)] == left else self._text.ids(text)
