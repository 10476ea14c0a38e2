"""One batch of questions answered by `generate`, or of answers ranked, under whatever schedule is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from himap_train.data.batches import pad_token_id_of
from himap_train.data.encode import IGNORED
from himap_train.data.end_of_answer import end_token_ids
from himap_train.data.plain_text import answer_text
from himap_train.evaluation.result import SampleTokens
from himap_train.models.features import (
    encode_nothing,
    hidden_states,
    own_weights_whole,
    prompt_inputs,
    weights_are_spread,
)
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
    model: nn.Module,
    processor: Any,
    batch: Mapping[str, Any],
    max_new_tokens: int,
    search: Mapping[str, Any] | None = None,
) -> tuple[list[str], list[SampleTokens]]:
    """Answers, stripped, and the tokens that were run of each prompt.

    Args:
        model: LLaVA or PeftModel around one.
        processor: Its processor.
        batch: Left-padded prompts: input_ids (B, S), attention_mask (B, S), images.
        max_new_tokens: Where an answer is cut if the model does not end it.
        search: What `generate` does in place of greedy decoding: do_sample, temperature, num_beams, streamer, ...

    Raises:
        RuntimeError: A schedule is installed but the images of this batch were not pruned.
    """
    base, generator = base_model(model), cast(Any, model)
    inputs = prompt_inputs(base, batch)
    pruning = pruning_of(model)
    before = pruning.last if pruning else None
    spread = weights_are_spread(base)
    how = {"do_sample": False, "num_beams": 1, **(search or {})}
    with own_weights_whole(base):
        if not batch["images"] and spread:
            encode_nothing(base)  # other processes may have images in this batch, and `generate` encodes them first
        output = generator.generate(
            **inputs,
            **how,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            eos_token_id=end_token_ids(processor, base.generation_config.eos_token_id),
            pad_token_id=pad_token_id_of(processor.tokenizer),
            synced_gpus=spread or None,  # until the longest answer of all processes; None: transformers' own choice
        )
    image_tokens = inputs["input_ids"] == base.config.image_token_id
    new = output[:, inputs["input_ids"].shape[1] :]
    answers = [answer_text(processor.tokenizer, row).strip() for row in new.tolist()]
    return answers, _tokens_run(model, before, image_tokens, inputs["attention_mask"].bool(), how["num_beams"])


def answer_losses(model: nn.Module, batch: Mapping[str, Any]) -> tuple[list[tuple[float, bool]], list[SampleTokens]]:
    """How likely each answer of a batch is, its end token included.

    Args:
        model: As in `answer_batch`.
        batch: Padded conversations with answers: input_ids (B, S), attention_mask (B, S), images, labels (B, S).

    Returns:
        The mean loss of each answer's tokens and whether greedy decoding would give it; and the tokens that were run of
        each prompt.

    Raises:
        RuntimeError: As in `answer_batch`.
    """
    base = base_model(model)
    ids, mask, labels = (batch[name].to(base.device) for name in ("input_ids", "attention_mask", "labels"))
    images = {name: values.to(base.device) for name, values in batch["images"].items()}
    pruning = pruning_of(model)
    before = pruning.last if pruning else None
    states = hidden_states(model, input_ids=ids, attention_mask=mask, images=images, labels=labels)
    supervised = labels[:, 1:] != IGNORED
    logits, targets = base.lm_head(states[:, :-1][supervised]).float(), labels[:, 1:][supervised]  # (N, V), (N,)
    rows = supervised.sum(1).tolist()
    losses = F.cross_entropy(logits, targets, reduction="none").split(rows)
    greedy = (logits.argmax(-1) == targets).split(rows)
    ranked = [(loss.mean().item(), bool(same.all())) for loss, same in zip(losses, greedy, strict=True)]
    tokens = _tokens_run(model, before, ids == base.config.image_token_id, mask.bool() & (labels == IGNORED))
    return ranked, tokens


def _tokens_run(
    model: nn.Module, before: Any, image_tokens: Tensor, prompts: Tensor, beams: int = 1
) -> list[SampleTokens]:
    """Tokens of each prompt, once it is sure that the forward behind `before` pruned them; (B, S) bool both."""
    pruning = pruning_of(model)
    schedule = pruning.schedule if pruning else PruningSchedule()
    check_pruned(schedule, pruning, before, image_tokens.repeat_interleave(beams, 0))
    image_rows = image_tokens.sum(1)
    text_rows = prompts.sum(1) - image_rows
    if pruning and pruning.last and image_rows.any():
        kept = [rows[::beams].tolist() for rows in pruning.last.kept_rows]
    else:  # text alone, which nothing needs to have pruned
        kept = [[0] * len(image_rows)] * len(schedule.stages)
    by_row = zip(*kept, strict=True) if kept else [()] * len(image_rows)
    rows = zip(image_rows.tolist(), text_rows.tolist(), by_row, strict=True)
    return [SampleTokens(image, text, stays) for image, text, stays in rows]
