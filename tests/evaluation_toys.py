"""Questions about random images for tests of the evaluation."""

from __future__ import annotations

import torch
from PIL import Image

from himap_train.data.records import Conversation, Turn

QUIET = {"progress": False, "max_new_tokens": 4}


def image(number: int) -> Image.Image:
    pixels = torch.randint(0, 256, (32, 40, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def conversation(number: int, question: str, answer: str = "yes", images: int = 1, **meta: str) -> Conversation:
    turns = (Turn("user", "<image>" * images + question), Turn("assistant", answer))
    return Conversation(str(number), tuple(image(number + i) for i in range(images)), turns, meta)


class Source(list):
    """A map-style source."""
