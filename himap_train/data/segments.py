"""The text of a conversation, cut where the answers begin and end, by the checkpoint's own chat template.

Every chat template can be cut without knowing it: the text before an answer is the template applied to the turns before
it with `add_generation_prompt`, and what the template puts around an answer is found by rendering another answer in its
place. So `{% generation %}` tags are not needed. An answer ends with an end token: the template's own, or else eos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from himap_train.data.records import RecordError
from himap_train.data.turns import Message
from himap_train.limits import bounded

_PROBE = "Probe"


@dataclass(frozen=True)
class Exchange:
    """A prompt and its answer as text.

    Attributes:
        prompt: everything since the end of the answer before, up to where the model starts to write.
        answer: what the model should write, without the end token.
        end: the end token; empty for a prompt whose answer is still to be written.
    """

    prompt: str
    answer: str = ""
    end: str = ""


class Template:
    """Cuts conversations with the chat template of one processor.

    Args:
        processor: a LlavaProcessor with a chat template (its own, or its tokenizer's).

    Raises:
        ValueError: the checkpoint has no chat template or no eos token.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        tokenizer = processor.tokenizer
        if not (processor.chat_template or tokenizer.chat_template):
            raise ValueError(
                "this checkpoint's processor has no chat template; set processor.chat_template, "
                "or use a checkpoint in the Hugging Face layout (such as llava-hf/llava-1.5-7b-hf)"
            )
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no eos token, so no answer would ever end; set tokenizer.eos_token")
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._ends = [token for token in special if token != processor.image_token]
        self._takes_parts = self._can_take_parts()

    def exchanges(self, messages: Sequence[Message], where: str, open_end: bool = False) -> list[Exchange]:
        """Cuts a conversation up to its last answer.

        Args:
            messages: from `to_messages`.
            where: the record, for messages.
            open_end: the last turn is a question whose answer is to be generated: an exchange without an answer.

        Raises:
            RecordError: the template cannot express this conversation.
        """
        found: list[Exchange] = []
        done, end = "", ""  # what the template has rendered up to the end of the last answer
        cuts = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        for index in [*cuts, len(messages)] if open_end else cuts:
            before = self._render(messages[:index], where, add_generation_prompt=True)
            prompt = _after(before, done, end, where)
            if index == len(messages):
                return [*found, Exchange(prompt)]
            answer, end, done = self._answer(messages[: index + 1], before, where)
            found.append(Exchange(prompt, answer, end or str(self._processor.tokenizer.eos_token)))
        return found

    def end_of_answer(self) -> str:
        """The token that closes an answer.

        Raises:
            RecordError: the template cannot express a question with its answer.
        """
        turns = [{"role": role, "content": [{"type": "text", "text": _PROBE}]} for role in ("user", "assistant")]
        return self.exchanges(turns, "a question and an answer")[0].end.lstrip(" ")

    def _answer(self, messages: Sequence[Message], before: str, where: str) -> tuple[str, str, str]:
        """Text of the last answer with what leads to it, the template's own end token or "", and all that the template
        has rendered up to the answer's end.
        """
        probe = {"role": "assistant", "content": [{"type": "text", "text": _PROBE}]}
        around = _behind(self._render([*messages[:-1], probe], where), before, where)
        lead, found, tail = around.partition(_PROBE)
        rendered = self._render(messages, where)
        text = _rest(_behind(rendered, before, where), lead, where)
        if not found or not text.endswith(tail):
            raise RecordError(f"{where}: the chat template does not show the answer as it is")
        end = next((token for token in self._ends if tail.lstrip(" ").startswith(token)), "")
        spaces = tail[: len(tail) - len(tail.lstrip(" "))] if end else ""
        return lead + text[: len(text) - len(tail)], spaces + end, rendered[: len(rendered) - len(tail)]

    def _render(self, messages: Sequence[Message], where: str, add_generation_prompt: bool = False) -> str:
        chat = list(messages) if self._takes_parts else [self._as_string(message) for message in messages]
        try:
            with bounded("the checkpoint's chat template"):
                return self._processor.apply_chat_template(chat, add_generation_prompt=add_generation_prompt)
        except (TemplateError, ArithmeticError) as error:
            raise RecordError(f"{where}: the checkpoint's chat template refuses it: {error}") from error

    def _can_take_parts(self) -> bool:
        """Whether the template takes content as a list of parts; those of text-only models take a string."""
        parts = [{"role": "user", "content": [{"type": "text", "text": _PROBE}]}]
        try:
            text = self._processor.apply_chat_template(parts)
        except (TemplateError, TypeError):
            return False
        return _PROBE in text and "'type'" not in text

    def _as_string(self, message: Message) -> Message:
        image = self._processor.image_token + "\n"
        text = "".join(image if part["type"] == "image" else part["text"] for part in message["content"])
        return {**message, "content": text}


def _rest(text: str, start: str, where: str) -> str:
    if not text.startswith(start):
        raise RecordError(
            f"{where}: the chat template renders earlier turns differently when a turn is added, so the "
            "answers cannot be found in it; give the checkpoint a template that renders turns one after the other"
        )
    return text[len(start) :]


def _behind(text: str, prompt: str, where: str) -> str:
    """What follows a prompt. Where a template sets an answer apart by other white space than it ends a prompt with
    (LLaVA-OneVision's: a space and a line break, but a line break alone), that of the prompt counts.
    """
    if text.startswith(prompt):
        return text[len(prompt) :]
    return _rest(text, prompt.rstrip(), where).lstrip()


def _after(text: str, done: str, end: str, where: str) -> str:
    """What follows the last answer and its end token; the space that a template without one puts there goes."""
    rest = _rest(text, done, where)
    return rest[len(end) :] if end and rest.startswith(end) else rest.lstrip(" ") if done else rest
