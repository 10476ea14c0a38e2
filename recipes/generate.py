"""Ask a LLaVA one question about one image, pruned or not, and see which patches pruning keeps.

python recipes/generate.py                    # a scene of the embedded test set
python recipes/generate.py --image photo.jpg --question "What is this?" --checkpoint runs/mine
python recipes/generate.py --schedule himap --show-kept kept.png
python recipes/generate.py --data my/test.json --record 7
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TextStreamer

from himap_train import record_pruning
from himap_train.analysis.pictures import kept_pictures
from himap_train.checkpoints.scheduled import AS_SAVED, installed_schedule, load_with_schedule
from himap_train.command_line import run_command
from himap_train.data.batches import collate, pad_token_id_of
from himap_train.data.encode import Sample, encode_prompt
from himap_train.data.end_of_answer import end_token_ids
from himap_train.data.images import open_image
from himap_train.data.pixel_modes import Background
from himap_train.data.records import Conversation, Source, Turn
from himap_train.data.sources import open_source
from himap_train.evaluation.budgeted import check_budget_argument, run_at_budget
from himap_train.models.families.base import AspectRatio
from himap_train.models.features import prompt_inputs
from himap_train.models.stock import base_model
from himap_train.pruning.reading import ScheduleArgument


def main(
    image: Path | None = None,
    question: str | None = None,
    data: str = "embedded:test",
    record: int = 0,
    checkpoint: str = "embedded",
    schedule: ScheduleArgument = AS_SAVED,
    budget: float | None = None,
    show_kept: Path | None = None,
    image_aspect_ratio: AspectRatio = "as_processor",
    image_background: Background = "white",
    max_new_tokens: int = 256,
    seed: int = 0,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
) -> None:
    """Stream the greedy answer to standard output.

    Args:
        image: A picture file; by default that of a record.
        question: What to ask about it; by default the record's first question.
        data: Where the record is from, as in evaluate.py.
        record: Its number.
        checkpoint: "embedded", a run or adapter folder, a merged folder, or any stock LLaVA (folder or hub name).
        schedule: as-saved, none, a preset (himap, fastv, ...), a pruning.yaml, or the stages inline.
        budget: Run that schedule's layers at this flops_ratio of the prompt instead, 0.4 say; 1 is dense.
        show_kept: Draw into this file which patches survive each stage.
        image_aspect_ratio: "pad" makes images square first, as LLaVA-1.5 was trained.
        image_background: Colour under a transparent image, "white" or "black".
        max_new_tokens: Where the answer is cut.
        seed: For the criterion `random`.
        dtype: Dtype of the weights; "auto" as they are stored.
        device: "auto", "cpu", "cuda", "cuda:1", ...
    """
    check_budget_argument(budget, schedule)
    conversation = ask(image, question, data, record)
    if show_kept is not None:
        show_kept.parent.mkdir(parents=True, exist_ok=True)
    model, processor = load_with_schedule(checkpoint, schedule, dtype, device)
    text_config: Any = base_model(model).config.text_config
    context = text_config.max_position_embeddings - max_new_tokens
    sample = encode_prompt(conversation, processor, context, image_aspect_ratio, image_background)
    if budget is not None:
        images = int((sample["input_ids"] == processor.image_token_id).sum())
        run_at_budget(model, budget, images, len(sample["input_ids"]) - images)
    if show_kept is not None and not installed_schedule(model).stages:
        raise ValueError("--show-kept has nothing to draw: the schedule is dense; choose one with --schedule himap")
    print(f"USER: {conversation.turns[0].text.removeprefix('<image>').strip()}\nASSISTANT: ", end="", flush=True)
    torch.manual_seed(seed)
    with record_pruning(model) as trace:
        stream(model, processor, sample, max_new_tokens)
    if show_kept is not None:
        picture = open_image(conversation.images[0], conversation.id, image_background)
        kept = [rows[0] for rows in trace.kept]
        kept_pictures(processor, sample, [picture], kept, installed_schedule(model))[0].save(show_kept)
        print(f"kept patches drawn in {show_kept}", file=sys.stderr)


def ask(image: Path | None, question: str | None, data: str, record: int) -> Conversation:
    """The conversation to continue.

    Raises:
        ValueError: An image without a question, a record that is not there or has no image.
        FileNotFoundError: No such image.
    """
    if image is None:
        source = open_source(data, split="test")
        if not isinstance(source, Source) or not 0 <= record < len(source):
            raise ValueError(f"{data} has no record {record}")
        found = source[record]
        if not found.images:
            raise ValueError(f"record {record} of {data} has no image")
        text = found.turns[0].text if question is None else f"<image>\n{question}"
        return Conversation(found.id, found.images, (Turn("user", text),))
    if question is None:
        raise ValueError(f"what should be asked about {image}? Pass --question")
    if not image.is_file():
        raise FileNotFoundError(f"image file {image} does not exist (current folder: {Path.cwd()})")
    return Conversation(str(image), (image,), (Turn("user", f"<image>\n{question}"),))


def stream(model: Any, processor: Any, sample: Sample, max_new_tokens: int) -> None:
    """Print the answer word by word."""
    batch = collate([sample], pad_token_id_of(processor.tokenizer), padding_side="left")
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.inference_mode():
        model.generate(
            **prompt_inputs(base_model(model), batch),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            eos_token_id=end_token_ids(processor, base_model(model).generation_config.eos_token_id),
            pad_token_id=pad_token_id_of(processor.tokenizer),
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
