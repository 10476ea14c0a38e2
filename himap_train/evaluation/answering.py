"""One batch of questions answered greedily by `generate`, under whatever schedule is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from himap_train.data.batches import pad_token_id_of
from himap_train.data.end_of_answer import end_token_ids
from himap_train.evaluation.token_counts import SampleTokens
from himap_train.models.features import encode_nothing, own_weights_whole, prompt_inputs, weights_are_spread
from himap_train.models.guard import check_pruned
from himap_train.models.install import pruning_of
from himap_train.models.stock import base_model
from himap_train.pruning.schedule import PruningSchedule


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; afterwards each module is in the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def answer_batch(
    model: nn.Module, processor: Any, batch: Mapping[str, Any], max_new_tokens: int
) -> tuple[list[str], list[SampleTokens]]:
    """Greedy answers, stripped, and the tokens that were run of each prompt.

    Args:
        model: LLaVA or PeftModel around one.
        processor: Its processor.
        batch: Left-padded prompts: input_ids (B, S), attention_mask (B, S), images.
        max_new_tokens: Where an answer is cut if the model does not end it.

    Raises:
        RuntimeError: A schedule is installed but the images of this batch were not pruned.
    """
    base, generator = base_model(model), cast(Any, model)
    inputs = prompt_inputs(base, batch)
    pruning = pruning_of(model)
    before = pruning.last if pruning else None
    spread = weights_are_spread(base)
    with own_weights_whole(base):
        if not batch["images"] and spread:
            encode_nothing(base)  # other processes may have images in this batch, and `generate` encodes them first
        output = generator.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            eos_token_id=end_token_ids(processor, base.generation_config.eos_token_id),
            pad_token_id=pad_token_id_of(processor.tokenizer),
            synced_gpus=spread or None,  # until the longest answer of all processes; None: transformers' own choice
        )
    image_tokens = inputs["input_ids"] == base.config.image_token_id
    check_pruned(pruning.schedule if pruning else PruningSchedule(), pruning_of(model), before, image_tokens)
    new = output[:, inputs["input_ids"].shape[1] :]
    answers = [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
    image_rows = image_tokens.sum(1)
    text_rows = inputs["attention_mask"].sum(1) - image_rows
    if pruning and pruning.last and image_rows.any():
        kept = [rows.tolist() for rows in pruning.last.kept_rows]
    else:  # text alone, which nothing needs to have pruned
        kept = [[0] * len(answers)] * (len(pruning.schedule.stages) if pruning else 0)
    by_row = zip(*kept, strict=True) if kept else [()] * len(answers)
    rows = zip(image_rows.tolist(), text_rows.tolist(), by_row, strict=True)
    return answers, [SampleTokens(image, text, stays) for image, text, stays in rows]
