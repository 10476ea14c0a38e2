"""How pictures are made ready beyond what a processor's files say. It lies beside the weights that were trained so, and
goes with their processor, so that nobody asks them about other pictures without saying so.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from himap_train.models.families import family_of_processor
from himap_train.models.families.base import AspectRatio, Background, Family
from himap_train.models.families.processing import stock_file
from himap_train.structured import Rule, read_json

FORM_FILE = "himap/images.json"


@dataclass(frozen=True)
class ImageForm:
    """What training data said of its pictures.

    Attributes:
        image_aspect_ratio: "pad" makes them square first, "as_processor" leaves their shape to the processor.
        image_background: Colour under transparent ones.
        max_image_tokens: Most image tokens of one, which is made smaller for it; None: as the processor has it.
    """

    image_aspect_ratio: AspectRatio = "as_processor"
    image_background: Background = "white"
    max_image_tokens: int | None = None


def _one_of(kind: Any) -> Rule:
    return Rule(f"one of {', '.join(get_args(kind))}", str, lambda found: found in get_args(kind))


_SHAPE = {
    "image_aspect_ratio": _one_of(AspectRatio),
    "image_background": _one_of(Background),
    "max_image_tokens?": Rule(
        "a number of tokens from 1 on, or null", int | None, lambda found: found is None or found > 0
    ),
}


def image_form(processor: Any) -> ImageForm:
    """What the checkpoint of a processor was trained with; for a stock one what its processor does."""
    return getattr(processor, "himap_image_form", ImageForm())


def take_form(processor: Any, form: ImageForm) -> None:
    """Let a processor stand for pictures that are made ready so; raises as `limit_images` does."""
    limit_images(processor, form.max_image_tokens)
    processor.himap_image_form = form


def check_limit(family: Family, most: int | None) -> None:
    """Raise ValueError for a limit where images of a family are not made smaller."""
    if most is not None and not family.resizes_images:
        raise ValueError(
            f"data.max_image_tokens is {most}: images of family {family.name} have as many tokens as its weights say; "
            "prune them instead"
        )


def limit_images(processor: Any, most: int | None) -> Any:
    """A processor, made to make no image larger than so many image tokens; None: as it is.

    Raises:
        ValueError: Its images cannot be of so few.
    """
    if processor is not None and most is not None:
        family = family_of_processor(processor)
        check_limit(family, most)
        family.limit_image_tokens(processor, most)
    return processor


def read_form(processor: Any, source: str) -> None:
    """Give a processor what lies in its folder or hub repository.

    Raises:
        ValueError: The file is damaged.
    """
    found = stock_file(source, FORM_FILE, ours=True)
    if found is not None:
        take_form(processor, ImageForm(**read_json(Path(found), _SHAPE)))


def write_form(folder: Path, processor: Any) -> None:
    """Write the file beside a processor's own; none where the processor's own say all."""
    if image_form(processor) != ImageForm():
        (folder / FORM_FILE).parent.mkdir(exist_ok=True)
        (folder / FORM_FILE).write_text(json.dumps(asdict(image_form(processor))) + "\n", encoding="utf-8")
