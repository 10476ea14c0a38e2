"""A conversation -> what the model is trained on: token ids with image tokens in place, labels and images.

`encode_prompt` gives exactly the ids that stand before the last answer in `encode` (see tokens.py), so teacher forcing
and prefill prune alike (DESIGN.md, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NotRequired, TypedDict

import torch
from PIL import Image

from himap_train.data.images import image_size, open_image
from himap_train.data.pixel_modes import check_background
from himap_train.data.records import Conversation, RecordError
from himap_train.data.tokens import ConversationTokenizer, TokenizedExchange
from himap_train.data.turns import first_exchanges
from himap_train.models.families import family_of_processor
from himap_train.models.families.base import AspectRatio, Background
from himap_train.models.families.image_form import image_form

IGNORED = -100
"""Label of a position that is not supervised."""


class Sample(TypedDict):
    """One encoded conversation. S tokens, image tokens included.

    `labels` stand at the positions of the tokens themselves (the model's loss shifts them), -100 where not supervised.
    `answer` (the reference) is there only for a prompt to generate from, `labels` only otherwise.
    """

    id: str
    meta: dict[str, str]
    input_ids: torch.Tensor  # (S,)
    images: list[dict[str, torch.Tensor]]  # one for each image, as the family's model takes it
    image_features: NotRequired[torch.Tensor]  # (image tokens, W), in place of pixels
    labels: NotRequired[torch.Tensor]  # (S,)
    dropped_exchanges: NotRequired[int]  # questions with their answers that did not fit into max_length
    answer: NotRequired[str]
    substitute_for: NotRequired[int]  # the index of the broken record in whose place it stands
    repeated: NotRequired[int]  # its own index, where it only gives a process as many batches as the others have


class SampleTooLongError(RecordError):
    """Not even the first question with its answer fits into max_length."""


class Encoder:
    """Encodes conversations for one checkpoint.

    Args:
        processor: the checkpoint's, from its family.
        max_length: most tokens of a sample, image tokens included; None for no limit.
        image_aspect_ratio: "as_processor", or "pad" to make images square first as LLaVA-1.5 was trained; None: as the
            checkpoint was trained (see `image_form`).
        image_background: colour under transparent images; None as above.

    Raises:
        ValueError: the processor has no chat template, or its family cannot have images padded.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        image_aspect_ratio: AspectRatio | None = None,
        image_background: Background | None = None,
    ) -> None:
        self.processor = processor
        self.max_length = max_length
        trained = image_form(processor)
        self.image_aspect_ratio = image_aspect_ratio or trained.image_aspect_ratio
        self.image_background = image_background or trained.image_background
        check_background(self.image_background)
        self.family = family_of_processor(processor)
        if self.image_aspect_ratio == "pad" and not self.family.takes_padding:
            raise ValueError(
                f"image_aspect_ratio 'pad' does not go with family {self.family.name}, which takes images of any shape "
                "by itself: give 'as_processor'"
            )
        self._tokenizer = ConversationTokenizer(processor, max_length)
        self._image_id: int = processor.image_token_id
        self._image_tokens: dict[tuple[tuple[int, int], ...], list[int]] = {}

    def encode(self, conversation: Conversation) -> Sample:
        """The whole conversation, every answer and its end token supervised.

        What does not fit into max_length is dropped from the end in whole questions with their answers, so no image is
        cut. A question after the last answer is left out.

        Raises:
            RecordError: the conversation or one of its images cannot be used.
            SampleTooLongError: not even the first question with its answer fits.
        """
        exchanges = self._tokenizer(conversation)
        images, places = self._images(conversation)
        kept = self.fitting(conversation, self.ends(exchanges, places))
        ids: list[int] = []
        labels: list[int] = []
        shown = 0
        for exchange in exchanges[:kept]:
            used = self.shown([exchange])
            prompt = _expanded(exchange.prompt, places[shown : shown + used], self._image_id)
            ids += prompt + exchange.answer
            labels += [IGNORED] * len(prompt) + exchange.answer
            shown += used
        if shown < len(images) and self.family.counts_images:
            sample = self.encode(first_exchanges(conversation, kept, shown))
            return {**sample, "dropped_exchanges": len(exchanges) - kept + sample["dropped_exchanges"]}
        return {
            "id": conversation.id,
            "meta": conversation.meta,
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "images": images[:shown],
            "dropped_exchanges": len(exchanges) - kept,
        }

    def encode_prompt(self, conversation: Conversation) -> Sample:
        """Everything up to the last answer, with the generation prompt; the reference answer beside it.

        Raises:
            RecordError: the conversation or one of its images cannot be used, or the prompt is longer than max_length.
        """
        images, places = self._images(conversation)
        ids = self._prompt_ids(conversation, places)
        if self.max_length is not None and len(ids) > self.max_length:
            raise SampleTooLongError(self._too_long(conversation, "the prompt takes", len(ids)))
        return {
            "id": conversation.id,
            "meta": conversation.meta,
            "input_ids": torch.tensor(ids),
            "images": images,
            "answer": conversation.answer,
        }

    def prompt_tokens(self, conversation: Conversation) -> tuple[int, int]:
        """(image tokens, other tokens) of `encode_prompt`, reading no more than the headers of images.

        Raises:
            RecordError: the conversation or one of its images cannot be used.
        """
        ids = self._prompt_ids(conversation, self.places(conversation))
        images = ids.count(self._image_id)
        return images, len(ids) - images

    def image_tokens(self, *sizes: tuple[int, int]) -> list[int]:
        """Number of image tokens of each image of a conversation by its (width, height), without decoding one.

        Raises:
            RecordError: the family has no use for an image of such a shape.
        """
        if sizes not in self._image_tokens:
            with _refused("images of {} pixels".format(", ".join(f"{width} x {height}" for width, height in sizes))):
                self._image_tokens[sizes] = self.family.tokens_of_sizes(self.processor, sizes, self.image_aspect_ratio)
        return self._image_tokens[sizes]

    def places(self, conversation: Conversation) -> list[list[int]]:
        """Token ids in the place of each image, reading no more than the headers of images.

        Raises:
            RecordError: one of the images cannot be used.
        """
        sizes = [image_size(image, conversation.where) for image in conversation.images]
        return list(map(self._place, self.image_tokens(*sizes), sizes))

    def ends(self, exchanges: list[TokenizedExchange], places: list[list[int]]) -> list[int]:
        """Length of the sample up to the end of each exchange.

        Args:
            exchanges: from the tokenizer.
            places: token ids in the place of each image.
        """
        remaining, total, ends = iter(places), 0, []
        for exchange in exchanges:
            images = self.shown([exchange])
            total += len(exchange.prompt) + len(exchange.answer) - images + sum(map(len, islice(remaining, images)))
            ends.append(total)
        return ends

    def shown(self, exchanges: list[TokenizedExchange]) -> int:
        """How many images exchanges show."""
        return sum(exchange.prompt.count(self._image_id) for exchange in exchanges)

    def fitting(self, conversation: Conversation, ends: list[int]) -> int:
        """How many exchanges fit into max_length.

        Args:
            conversation: for the message.
            ends: from `ends`.

        Raises:
            SampleTooLongError: not even the first.
        """
        fit = sum(self.max_length is None or end <= self.max_length for end in ends)
        if not fit:
            raise SampleTooLongError(self._too_long(conversation, "the first question and answer take", ends[0]))
        return fit

    def _images(self, conversation: Conversation) -> tuple[list[dict[str, torch.Tensor]], list[list[int]]]:
        """Each image as the model takes it, and the token ids in its place."""
        where, family, sizes = conversation.where, self.family, list[tuple[int, int]]()

        def opened() -> Iterator[Image.Image]:
            for image in conversation.images:
                picture = open_image(image, where, self.image_background)
                sizes.append(picture.size)
                yield picture

        with _refused(where):
            images = family.encode_conversation(self.processor, opened(), self.image_aspect_ratio)
        counts = [family.image_tokens(self.processor, image) for image in images]
        return images, list(map(self._place, counts, sizes))

    def _place(self, tokens: int, size: tuple[int, int]) -> list[int]:
        return self.family.placeholder(self.processor, tokens, size)

    def _prompt_ids(self, conversation: Conversation, places: list[list[int]]) -> list[int]:
        exchanges = self._tokenizer(conversation, prompt=True)
        return _expanded([token for one in exchanges for token in one.prompt + one.answer], places, self._image_id)

    def _too_long(self, conversation: Conversation, what: str, length: int) -> str:
        return (
            f"{conversation.where}: {what} {length} tokens, image tokens included, and max_length is "
            f"{self.max_length}; set a larger max_length or shorten the sample"
        )


def _expanded(ids: list[int], places: list[list[int]], image_id: int) -> list[int]:
    """Token ids with those of `places` where the images are."""
    remaining = iter(places)
    return [token for given in ids for token in (next(remaining) if given == image_id else [given])]


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """What an image processor refuses, Qwen-VL's an image 200 times as long as wide, as an error of the record."""
    try:
        yield
    except RecordError:
        raise
    except (ValueError, ArithmeticError) as error:
        raise RecordError(f"{what}: {error}") from error
    except MemoryError as error:
        raise RecordError(f"{what}: an image does not fit into memory; scale it down") from error
