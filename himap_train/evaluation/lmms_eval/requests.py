"""What lmms-eval asks, in this project's words: a conversation, and how its answer is searched for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from himap_train.data.records import IMAGE_PLACEHOLDER, Conversation, ImageSource, Turn
from himap_train.pruning.names import check_keys

_SAMPLING = ("temperature", "top_p", "top_k")
_SEARCH = ("num_beams", "repetition_penalty")
_OTHERS = ("do_sample", "max_new_tokens", "until", "image_aspect_ratio")  # the last is for LLaVA's own code alone
_FILLER = "\n\n"
"""The harness' stop text of a task that names none; to stop there would cut long answers."""


@dataclass(frozen=True)
class Answering:
    """How a task wants its answers: their length, the options of `generate`, and texts before which they end."""

    max_new_tokens: int
    search: dict[str, Any]
    until: tuple[str, ...]

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Answering:
        """From a task's `generation_kwargs` and `--gen_kwargs`: greedy unless there is a temperature, or `do_sample`.

        Raises:
            ValueError: Something else is asked for; it is named.
        """
        check_keys("generation_kwargs, or --gen_kwargs,", options, (*_SAMPLING, *_SEARCH, *_OTHERS))
        temperature = options.get("temperature")
        sample = bool(options.get("do_sample", temperature)) and temperature != 0
        names = (*_SAMPLING, *_SEARCH) if sample else _SEARCH
        search = {name: options[name] for name in names if options.get(name) is not None}
        until = options.get("until") or []
        most = options.get("max_new_tokens")
        if most is not None and int(most) < 1:
            raise ValueError(f"generation_kwargs, or --gen_kwargs: max_new_tokens is {most}; expected 1 or more")
        stops = [until] if isinstance(until, str) else until
        return cls(
            1024 if most is None else int(most),
            {"do_sample": sample, **search},
            tuple(text for text in stops if text and text != _FILLER),
        )

    def cut(self, answer: str) -> str:
        """The answer up to the first text that ends it."""
        for text in self.until:
            answer = answer.split(text)[0]
        return answer.strip()


def user_message(visuals: Sequence[Any] | None, text: str) -> list[dict[str, Any]]:
    """A simple task's images and text as a chat task gives them."""
    images = [{"type": "image", "url": visual} for visual in visuals or ()]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def to_conversation(name: str, messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """Chat messages as a conversation. A text that says itself where its images belong (`<image>`) is believed.

    Raises:
        ValueError: Something is shown that is no image.
    """
    images: list[ImageSource] = []
    turns = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        shown = [_image(name, part) for part in parts if part["type"] != "text"]
        places = sum((part.get("text") or "").count(IMAGE_PLACEHOLDER) for part in parts)
        place = "" if places == len(shown) else IMAGE_PLACEHOLDER
        texts = ((part.get("text") or "") if part["type"] == "text" else place for part in parts)
        turns.append(Turn(message["role"], "".join(texts)))
        images += shown
    return Conversation(name, tuple(images), tuple(turns))


def _image(name: str, part: Mapping[str, Any]) -> ImageSource:
    found = part.get("url")
    if part["type"] != "image" or not isinstance(found, Image.Image | bytes | str):
        raise ValueError(
            f"{name} shows a {part['type']} ({type(found).__name__}); model himap is asked about images and text alone"
        )
    return Path(found) if isinstance(found, str) else found
