"""Batches of scenes that train the embedded LLaVA's decoder, and how many of its answers are right.

Shapes: B scenes, T image tokens (144), S text rows, D width (128), V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from himap_train.embedded.scene_source import Scenes
from himap_train.embedded.scene_training import image_features, pixels
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


class SceneBatches:
    """Batches of scenes with several questions each, as `answer_logits` takes them; number `n` is always the same."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor, split: str, seed: int) -> None:
        self.model, self.tokenizer, self.seed = model, processor.tokenizer, seed
        self.image_size: int = model.model.vision_tower.config.image_size
        self.source = Scenes(split, seed)  # drawn when asked for
        prefix = "USER: " + "<image>" * model.config.image_seq_length + "\n"
        self.prefix: list[int] = self.tokenizer.encode(prefix, add_special_tokens=False)

    def get(
        self,
        number: int,
        size: int,
        order: Sequence[str],
        dense: bool = False,
        chained: bool = False,
        copied: Sequence[str] = (),
        copies: int = 1,
    ) -> tuple[Tensor, dict[str, Tensor], list[list[str]]]:
        """Image features, branches and question types of batch `number`; the types of `order` for every scene.

        With `dense` there are the dense texts instead of the later half of the questions; with `copied`, words,
        `copies` requests more, to say some of them.
        """
        rng = np.random.default_rng([self.seed, number])
        scenes = [self.source.scene(number * size + i) for i in range(size)]
        types = [[order[(q + i) % len(order)] for q in range(len(order))] for i in range(size)]
        texts = [
            [self.source.ask(scene, t, rng)[:2] for t in row] for (scene, _), row in zip(scenes, types, strict=True)
        ]
        if dense:
            texts = [
                row[: len(row) // 2] + self.source.dense(scene, rng)
                for row, (scene, _) in zip(texts, scenes, strict=True)
            ]
        if copied:
            texts = [[*row, *(copying(copied, rng) for _ in range(copies))] for row in texts]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features = image_features(self.model, pixels([image for _, image in scenes], self.image_size))
        return features.bfloat16(), branches(self.tokenizer, texts, chained), types


@torch.no_grad()
def accuracy(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, split: str, scenes: int, seed: int = 0
) -> dict[str, float]:
    """Exact match of greedy answers by question type, one question of each type a scene, and over all."""
    data, size = SceneBatches(model, processor, split, seed), min(16, scenes)
    right: dict[str, list[bool]] = defaultdict(list)
    for number in range(scenes // size):
        features, rows, types = data.get(number, size, data.source.types)
        with torch.autocast("cpu", torch.bfloat16):
            logits, target = answer_logits(model, features, data.prefix, rows)
        scene, row = (rows["labels"] != -100).nonzero(as_tuple=True)
        branch = rows["branch"][scene, row]
        good = logits.argmax(-1) == target
        for i, kinds in enumerate(types):
            for b, kind in enumerate(kinds):
                right[kind].append(bool(good[(scene == i) & (branch == b)].all()))
    table = {kind: float(np.mean(right[kind])) for kind in data.source.types}
    return {k: round(v, 4) for k, v in (table | {"all": float(np.mean(list(table.values())))}).items()}
