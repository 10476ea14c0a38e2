"""Losses and batches that train the embedded LLaVA.

Shapes: B scenes, T image tokens (144), S text rows, D width (128), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AttentionInterface, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from himap_train.data.scene_text import (
    COLOURS,
    COLUMNS,
    DESCRIBE,
    DIGITS,
    KINDS,
    ROWS,
    Item,
    Scene,
    ask,
    describe,
    list_counts,
    list_neighbours,
    list_places,
)
from himap_train.data.scenes import SceneQuestions
from himap_train.models.embedded_build import IMAGE_SIZE, IMAGE_TOKENS, PATCH_SIZE
from himap_train.models.embedded_start import HEADS

_GRID = IMAGE_SIZE // PATCH_SIZE
_PER_CELL = _GRID // len(ROWS)


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """(B, 3, 96, 96) as the processor makes them: values -1 to 1."""
    array = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def dense_scene(rng: np.random.Generator) -> Scene:
    """A fuller scene than questions are asked about: one pass of the tower learns more from it, above all of digits."""

    def item() -> Item | None:
        draw = rng.random()
        if draw < 0.2:
            return None
        kind = str(rng.choice(KINDS))
        return Item(kind) if draw < 0.6 else Item("card", str(rng.choice(COLOURS)), str(rng.choice(DIGITS)))

    return Scene(tuple(item() for _ in range(len(ROWS) * len(COLUMNS))))


def patch_labels(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """For each head the class of every patch's place, (B, T); -100 where a place has no colour or digit."""
    cells = {name: np.full((len(scenes), len(ROWS), len(COLUMNS)), -100) for name in HEADS}
    for b, scene in enumerate(scenes):
        for place, item in enumerate(scene.cells):
            row, column = divmod(place, len(COLUMNS))
            facts = {"kind": scene.kind_at(place), "row": ROWS[row], "column": COLUMNS[column]}
            facts |= {"colour": item.colour, "digit": item.digit} if item and item.colour else {}
            for name, word in facts.items():
                cells[name][b, row, column] = HEADS[name].index(word)
    grid = {name: c.repeat(_PER_CELL, 1).repeat(_PER_CELL, 2) for name, c in cells.items()}
    return {name: torch.from_numpy(g.reshape(len(scenes), -1)) for name, g in grid.items()}


def image_features(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """What the decoder gets for an image, (B, T, D): tower, without its class token, then projector."""
    hidden = model.model.vision_tower(pixel_values).last_hidden_state[:, 1:]
    return model.model.multi_modal_projector(hidden)


def bf16_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Plain attention whose softmax stays in the inputs' type. (B, heads, L, d) -> (B, L, heads, d).

    On a CPU in bf16, the backward of scaled_dot_product_attention and the fp32 softmax of "eager" each cost more than
    all matrix products.
    """
    with torch.autocast("cpu", enabled=False):
        scores = torch.matmul(query * scaling, key.transpose(2, 3))
        scores = scores if attention_mask is None else scores + attention_mask
        return torch.matmul(scores.softmax(-1), value).transpose(1, 2).contiguous(), None


AttentionInterface.register("bf16_plain", bf16_attention)


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
        self.source = SceneQuestions(split, scenes=10**9, seed=seed)  # drawn when asked for
        prefix = "USER: " + "<image>" * IMAGE_TOKENS + "\n"
        self.prefix: list[int] = self.tokenizer.encode(prefix, add_special_tokens=False)

    def get(
        self, number: int, size: int, order: Sequence[str], dense: bool = False, chained: bool = False
    ) -> tuple[Tensor, dict[str, Tensor], list[list[str]]]:
        """Image features, branches and question types of batch `number`; the types of `order` for every scene."""
        rng = np.random.default_rng([self.seed, number])
        scenes = [self.source.scene(number * size + i) for i in range(size)]
        types = [[order[(q + i) % len(order)] for q in range(len(order))] for i in range(size)]
        texts = [[ask(scene, t, rng) for t in row] for (scene, _), row in zip(scenes, types, strict=True)]
        if dense:
            texts = [row + dense_texts(scene, rng) for row, (scene, _) in zip(texts, scenes, strict=True)]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features = image_features(self.model, pixels([image for _, image in scenes]))
        return features.bfloat16(), branches(self.tokenizer, texts, chained), types


def dense_texts(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Four requests whose answers say nearly everything about a scene: one pass learns far more than from questions."""
    return [
        (DESCRIBE, describe(scene)),
        ("List the things.", list_places(scene, rng)),
        ("Count the things.", list_counts(scene, rng)),
        ("Name the neighbours.", list_neighbours(scene, rng)),
    ]
