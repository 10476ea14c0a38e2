"""Batches of scenes, how they train an embedded model's decoder, and how many of its answers are right.

Shapes: B scenes, T image tokens, S text rows, D width (128), V vocabulary.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from himap_train.embedded.scene_dense import dense_texts
from himap_train.embedded.scene_source import Scenes
from himap_train.embedded.scene_training import image_features, optimizer, pixels, step
from himap_train.embedded.words import copying


def branches(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[Sequence[tuple[str, str]]], chained: bool = False
) -> dict[str, Tensor]:
    """Questions about one image as branches of one sequence: all see the image, none sees another.

    So one pass over an image trains many questions, each exactly as if it stood alone. `texts` holds for each scene its
    (question, answer) pairs. With `chained` they are instead the turns of one conversation: a single branch.

    Returns:
        Four tensors (B, S): `input_ids`; `labels`, the token that follows where it is part of an answer, else -100;
        `branch`, which branch a row belongs to, -1 is padding; `position_ids`, counted from the end of the image's
        prefix.
    """
    rows: list[dict[str, list[int]]] = []
    for pairs in texts:
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "branch": [], "position_ids": []}
        for number, (question, answer) in enumerate(pairs):
            before = "</s>USER: " if chained and number else ""
            prompt = tokenizer.encode(f"{before}{question} ASSISTANT:", add_special_tokens=False)
            reply = tokenizer.encode(f" {answer}</s>", add_special_tokens=False)
            length, start = len(prompt) + len(reply) - 1, len(row["branch"]) if chained else 0
            row["input_ids"] += prompt + reply[:-1]
            row["labels"] += [-100] * (len(prompt) - 1) + reply
            row["branch"] += [0 if chained else number] * length
            row["position_ids"] += range(start, start + length)
        rows.append(row)
    # Few different lengths: each new shape costs the CPU kernels a set-up.
    longest = -(-max(len(row["branch"]) for row in rows) // 16) * 16
    empty = {"input_ids": 0, "labels": -100, "branch": -1, "position_ids": 0}
    return {k: torch.tensor([row[k] + [e] * (longest - len(row[k])) for row in rows]) for k, e in empty.items()}


def branch_mask(branch: Tensor, prefix: int) -> Tensor:
    """Additive attention mask (B, 1, prefix + S, prefix + S): causal, and between branches closed."""
    batch, rows = branch.shape
    segment = torch.cat([branch.new_full((batch, prefix), -2), branch], dim=1)
    open_ = (segment[:, None, :] == -2) | (segment[:, :, None] == segment[:, None, :])
    causal = torch.ones(prefix + rows, prefix + rows, dtype=torch.bool).tril()
    closed = ~(open_ & causal)[:, None]
    return torch.zeros(closed.shape).masked_fill_(closed, torch.finfo(torch.bfloat16).min)


def answer_logits(
    model: LlavaForConditionalGeneration, features: Tensor, prefix_ids: Sequence[int], batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Logits (N, V) at the rows that predict answers, and their targets (N,).

    `features` (B, T, D) of the images; `prefix_ids`, the template up to the first question, with T image
    placeholders; `batch` as `branches` returns it.
    """
    ids, prefix = torch.tensor(prefix_ids).expand(len(features), -1), len(prefix_ids)
    embed = model.get_input_embeddings()
    before = embed(ids).to(features.dtype).masked_scatter((ids == model.config.image_token_id)[..., None], features)
    hidden = model.model.language_model(
        inputs_embeds=torch.cat([before, embed(batch["input_ids"]).to(features.dtype)], dim=1),
        attention_mask=branch_mask(batch["branch"], prefix).to(features.dtype),
        position_ids=torch.cat([torch.arange(prefix).expand(len(ids), -1), prefix + batch["position_ids"]], dim=1),
        use_cache=False,
    ).last_hidden_state[:, prefix:]
    wanted = batch["labels"] != -100
    return model.lm_head(hidden[wanted]).float(), batch["labels"][wanted]


@dataclass(frozen=True)
class Lesson:
    """What a batch asks about its scenes.

    Attributes:
        types: Types of the questions about every scene, each starting with another of them.
        split: Of the scenes.
        dense: Whether dense texts stand instead of the later half of the questions.
        chained: Whether the questions are turns of one conversation.
        copied: Words that `copies` requests more ask to say.
        copies: How many.
    """

    types: Sequence[str]
    split: str = "train"
    dense: bool = False
    chained: bool = False
    copied: Sequence[str] = ()
    copies: int = 0


class SceneBatches:
    """Batches of scenes with several questions each, as `answer_logits` takes them; number `n` is always the same."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor, seed: int) -> None:
        self.model, self.tokenizer, self.seed = model, processor.tokenizer, seed
        self.image_size: int = model.model.vision_tower.config.image_size
        prefix = "USER: " + "<image>" * model.config.image_seq_length + "\n"
        self.prefix: list[int] = self.tokenizer.encode(prefix, add_special_tokens=False)

    def get(self, number: int, size: int, lesson: Lesson) -> tuple[Tensor, dict[str, Tensor], list[list[str]]]:
        """Image features, branches and question types of batch `number`, of `size` scenes."""
        source, count = Scenes(lesson.split, self.seed), len(lesson.types)
        rng = np.random.default_rng([self.seed, number])
        scenes = [source.scene(number * size + i) for i in range(size)]
        types = [[lesson.types[(q + i) % count] for q in range(count)] for i in range(size)]
        texts = [[source.ask(scene, t, rng)[:2] for t in row] for (scene, _), row in zip(scenes, types, strict=True)]
        if lesson.dense:
            texts = [row[: count // 2] + dense_texts(scene, rng) for row, (scene, _) in zip(texts, scenes, strict=True)]
        texts = [[*row, *(copying(lesson.copied, rng) for _ in range(lesson.copies))] for row in texts]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features = image_features(self.model, pixels([image for _, image in scenes], self.image_size))
        return features.bfloat16(), branches(self.tokenizer, texts, lesson.chained), types


def decoder_optimizer(model: LlavaForConditionalGeneration) -> torch.optim.Optimizer:
    """Of the decoder with its words."""
    return optimizer([*model.model.language_model.parameters(), *model.lm_head.parameters()])


def train_decoder(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    lesson: Callable[[int], Lesson],
    steps: range,
    cosine: int,
    peak: float,
    seed: int,
    batch: int,
    optim: torch.optim.Optimizer | None = None,
) -> None:
    """The decoder with its words, on a lesson a step.

    Args:
        model: Tower and projector stay as they are.
        processor: Of the model.
        lesson: What a step asks.
        steps: First and last of those that are run now.
        cosine: Steps after which the learning rate would be at its end.
        peak: Highest learning rate.
        seed: Of the scenes and questions.
        batch: Scenes in a step.
        optim: Goes on with this one; None for a new one.
    """
    model.model.language_model.set_attn_implementation("bf16_plain")
    data, optim, start = SceneBatches(model, processor, seed), optim or decoder_optimizer(model), time.time()
    for now in steps:
        asked = lesson(now)
        features, rows, _ = data.get(now, batch, asked)
        with torch.autocast("cpu", torch.bfloat16):
            logits, target = answer_logits(model, features, data.prefix, rows)
            loss = nn.functional.cross_entropy(logits, target)
        step(optim, loss, now, cosine, peak)
        if now % 25 == 0 or now == steps[-1]:
            right, spent = (logits.argmax(-1) == target).float().mean().item(), time.time() - start
            print(f"decoder {now}/{steps.stop} {spent:.0f} s, loss {loss.item():.3f}, right {right:.3f}", flush=True)
        if now % 100 == 99:
            held_back = asked.split.replace("train", "validation")
            print(held_back, accuracy(model, processor, held_back, scenes=80), flush=True)


@torch.no_grad()
def accuracy(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, split: str, scenes: int, seed: int = 0
) -> dict[str, float]:
    """Exact match of greedy answers by question type, one question of each type a scene, and over all."""
    data, size, lesson = SceneBatches(model, processor, seed), min(16, scenes), Lesson(Scenes(split).types, split)
    right: dict[str, list[bool]] = defaultdict(list)
    for number in range(scenes // size):
        features, rows, types = data.get(number, size, lesson)
        with torch.autocast("cpu", torch.bfloat16):
            logits, target = answer_logits(model, features, data.prefix, rows)
        scene, row = (rows["labels"] != -100).nonzero(as_tuple=True)
        branch = rows["branch"][scene, row]
        good = logits.argmax(-1) == target
        for i, kinds in enumerate(types):
            for b, kind in enumerate(kinds):
                right[kind].append(bool(good[(scene == i) & (branch == b)].all()))
    table = {kind: float(np.mean(right[kind])) for kind in lesson.types}
    return {k: round(v, 4) for k, v in (table | {"all": float(np.mean(list(table.values())))}).items()}
