"""Ask a LLaVA one question about one image, pruned or not, and see which patches pruning keeps.

python recipes/generate.py                    # a scene of the embedded test set
python recipes/generate.py --image photo.jpg --question "What is this?" --checkpoint runs/mine
python recipes/generate.py --schedule himap --show-kept kept.png
python recipes/generate.py --data my/test.json --record 7
"""

from __future__ import annotations

from himap_train.quick_help import answer_help

answer_help(__file__)

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from transformers import TextStreamer

from himap_train.analysis.answered import answer_question, prompt_encoder
from himap_train.analysis.pictures import stacked
from himap_train.checkpoints.load import AS_SAVED, installed_schedule, load_with_schedule
from himap_train.command_line import run_command
from himap_train.data.plain_text import answer_text
from himap_train.data.records import IMAGE_PLACEHOLDER, Conversation, Turn
from himap_train.data.sources import open_source
from himap_train.evaluation.budgeted import check_budget_argument, run_at_budget
from himap_train.models.families.base import AspectRatio, Background
from himap_train.pruning.reading import ScheduleArgument


def main(
    image: Path | None = None,
    question: str | None = None,
    data: str = "embedded:test",
    record: int = 0,
    schedule: ScheduleArgument = AS_SAVED,
    budget: float | None = None,
    show_kept: Path | None = None,
    image_aspect_ratio: AspectRatio | None = None,
    image_background: Background | None = None,
    max_new_tokens: int = 256,
    seed: int = 0,
    **loading: Any,
) -> None:
    """Stream the greedy answer to standard output.

    Args:
        image: A picture file; by default that of a record.
        question: What to ask about it, or about all images of the record; by default the record's first question.
        data: Where the record is from, as in evaluate.py.
        record: Its number.
        schedule: as-saved, none, a preset (himap, fastv, ...), a pruning.yaml, or the stages inline.
        budget: Run that schedule's layers at this flops_ratio of the prompt instead, 0.4 say; 1 is dense.
        show_kept: Draw into this file which patches survive each stage, of several images one below the other.
        image_aspect_ratio: By default as the checkpoint was trained; "pad" makes images square first, as LLaVA-1.5 was.
        image_background: Colour under a transparent image, "white" or "black"; by default as it was trained.
        max_new_tokens: Where the answer is cut.
        seed: For the criterion `random`.
        **loading: Options of `load_with_schedule`.
    """
    check_budget_argument(budget, schedule)
    conversation = ask(image, question, data, record)
    if show_kept is not None:
        if Image.registered_extensions().get(show_kept.suffix.lower()) not in Image.SAVE:
            raise ValueError(f"--show-kept {show_kept} is no name of a picture: let it end in .png or .jpg")
        show_kept.parent.mkdir(parents=True, exist_ok=True)
    model, processor = load_with_schedule(schedule=schedule, **loading)
    images = {"image_aspect_ratio": image_aspect_ratio, "image_background": image_background}
    encoder = prompt_encoder(model, processor, **images)
    if budget is not None:
        run_at_budget(model, budget, *encoder.prompt_tokens(conversation))
    runs = installed_schedule(model)
    if show_kept is not None and not runs.stages:
        raise ValueError("--show-kept has nothing to draw: the schedule is dense; choose one with --schedule himap")
    asked = conversation.turns[-1].text.replace(IMAGE_PLACEHOLDER, "").strip()
    print(f"USER: {asked}\nASSISTANT: ", end="", flush=True)
    torch.manual_seed(seed)
    written: Any = SimpleNamespace(decode=partial(answer_text, processor.tokenizer))
    streamer = TextStreamer(written, skip_prompt=True)
    found = answer_question(model, encoder, conversation, runs, max_new_tokens, {"streamer": streamer})
    if show_kept is not None:
        if not found.pictures:
            raise ValueError("--show-kept: where the image tokens of this model lie in a picture is not known")
        stacked(found.pictures).save(show_kept)
        print(f"kept patches drawn in {show_kept}", file=sys.stderr)


def ask(image: Path | None, question: str | None, data: str, record: int) -> Conversation:
    """The conversation to continue.

    Raises:
        ValueError: An image without a question, a record that is not there or has no image.
        FileNotFoundError: No such image.
    """
    if image is None:
        source = open_source(data, split="test")
        if not 0 <= record < len(source):
            raise ValueError(f"{data} has no record {record}")
        found = source[record]
        system = tuple(turn for turn in found.turns[:1] if turn.role == "system")
        first = next((turn.text for turn in found.turns if turn.role == "user"), "")
        text = first if question is None else IMAGE_PLACEHOLDER * len(found.images) + f"\n{question}"
        if not (shown := text.count(IMAGE_PLACEHOLDER)):
            raise ValueError(f"record {record} of {data} has no image, or none in its first question")
        return Conversation(found.id, found.images[:shown], (*system, Turn("user", text)))
    if question is None:
        raise ValueError(f"what should be asked about {image}? Pass --question")
    if not image.is_file():
        raise FileNotFoundError(f"image file {image} does not exist (current folder: {Path.cwd()})")
    return Conversation(str(image), (image,), (Turn("user", f"<image>\n{question}"),))


if __name__ == "__main__":
    sys.exit(run_command(main))
