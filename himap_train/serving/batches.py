"""Prompts that wait at the same time are answered by one `generate`, in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from threading import Condition, Thread
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteriaList

from himap_train.data.batches import collate, pad_token_id_of
from himap_train.data.end_of_answer import end_token_ids
from himap_train.data.plain_text import answer_text
from himap_train.evaluation.answering import answer_batch, evaluation_mode
from himap_train.models.stock import base_model
from himap_train.serving.requests import Asked

_TOGETHER = 0.01
"""Seconds that a prompt waits for others; next to a prefill nothing."""

logger = logging.getLogger(__name__)


class Answer:
    """An answer on its way: made token by token in one thread, read piece by piece in an event loop.

    Attributes:
        tokens: Its ids so far, an end token included.
        finish: "" while it goes on; then "stop" or "length", or "gone" where nobody listens any more.
    """

    def __init__(self, asked: Asked, tokenizer: Any, ends: Sequence[int]) -> None:
        self.asked, self.tokens, self.finish = asked, list[int](), ""
        self._tokenizer, self._ends, self._sent = tokenizer, ends, 0
        self._loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue[str | Exception | None]()

    async def __aiter__(self) -> AsyncIterator[str]:
        """Pieces of text, which together are what `answer_batch` gives; RuntimeError where the model failed."""
        try:
            while (piece := await self._pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise RuntimeError(f"no answer: {type(piece).__name__}: {piece}") from piece
                yield piece
        finally:
            self.finish = self.finish or "gone"

    def take(self, token: int) -> None:
        """One more token; nothing, once the answer has ended."""
        if self.finish:
            return
        self.tokens.append(token)
        answering = self.asked.answering
        text = answer_text(self._tokenizer, self.tokens).lstrip()
        stops = [at for stop in answering.until if (at := text.find(stop)) >= 0]
        ended = token in self._ends or bool(stops)
        finish = "stop" if ended else "length" if len(self.tokens) >= answering.max_new_tokens else ""
        self._give(text[: min(stops)] if stops else text if finish else self._certain(text), finish)

    def leave(self) -> None:
        """Nobody waits for it any more."""
        self.finish = self.finish or "gone"
        self.send(None)

    def end(self) -> None:
        """Where generation has ended for a reason that is not this answer's, such as a `max_time`."""
        if not self.finish:
            self._give(answer_text(self._tokenizer, self.tokens).lstrip(), "length")

    def _give(self, text: str, finish: str) -> None:
        """What of an answer's text was not sent yet; its end too, where there is a reason to finish."""
        piece = text.rstrip()[self._sent :]
        self._sent += len(piece)
        if finish:
            self.finish = self.finish or finish
        if piece:
            self.send(piece)
        if finish:
            self.send(None)

    def send(self, piece: str | Exception | None) -> None:
        """To the reader, in its thread."""
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def _certain(self, text: str) -> str:
        """Without half a character, and without what may become a text that ends the answer."""
        text = text.rstrip("\ufffd")
        until = self.asked.answering.until
        first = max(len(text) - max(map(len, until), default=0), 0)
        starts = (at for at in range(first, len(text)) if any(stop.startswith(text[at:]) for stop in until))
        return text[: next(starts, len(text))]


class Batches:
    """Answers prompts with one model.

    Args:
        model: LLaVA or PeftModel around one, under whatever schedule is installed.
        processor: Its processor.
        size: Most prompts of a batch; those that sample alike and have no seed share one.
    """

    def __init__(self, model: nn.Module, processor: Any, size: int) -> None:
        self._model, self._processor, self._size = model, processor, size
        base: Any = base_model(model)
        self._ends = end_token_ids(processor, base.generation_config.eos_token_id)
        self._waiting: list[Answer] = []
        self._changed = Condition()
        Thread(target=self._run, daemon=True).start()

    def ask(self, asked: Asked) -> Answer:
        """The answer to come; called in an event loop."""
        answer = Answer(asked, self._processor.tokenizer, self._ends)
        with self._changed:
            self._waiting.append(answer)
            self._changed.notify()
        return answer

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
            time.sleep(_TOGETHER)
            with self._changed:
                first = self._waiting[0]
                batch = [other for other in self._waiting if other is first or _share(first.asked, other.asked)]
                batch = batch[: self._size]
                self._waiting = [other for other in self._waiting if other not in batch]
            self._answer([answer for answer in batch if not answer.finish])

    def _answer(self, answers: list[Answer]) -> None:
        def step(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            for answer, token in zip(answers, ids[:, -1].tolist(), strict=True):
                answer.take(token)
            return torch.tensor([bool(answer.finish) for answer in answers], device=ids.device)

        if not answers:
            return
        alone = False
        try:
            self._generate(answers, step)
        except Exception as error:  # whatever one request does to the model, the next one is answered
            alone = len(answers) > 1 and not any(answer.tokens for answer in answers)  # one may spoil the rest
            if not alone:
                logger.exception("a batch of %d failed", len(answers))
                for answer in answers:
                    answer.send(error)
        if alone:  # outside: the error holds what the batch had in memory
            for answer in answers:
                self._answer([answer])

    def _generate(self, answers: list[Answer], step: Any) -> None:
        first = answers[0].asked
        pad = pad_token_id_of(self._processor.tokenizer)
        batch = collate([answer.asked.sample for answer in answers], pad, padding_side="left")
        most = max(answer.asked.answering.max_new_tokens for answer in answers)
        search = {**first.answering.search, "stopping_criteria": StoppingCriteriaList([step])}
        with evaluation_mode(self._model), torch.random.fork_rng(enabled=first.seed is not None):
            if first.seed is not None:
                torch.manual_seed(first.seed)
            answer_batch(self._model, self._processor, batch, most, search)
        for answer in answers:
            answer.end()


def _share(one: Asked, other: Asked) -> bool:
    return one.seed is None and other.seed is None and one.answering.search == other.answering.search
