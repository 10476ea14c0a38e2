"""What the training of the embedded LLaVA computes: optimizer, dense labels of patches, image features, attention.

Shapes: B scenes, T image tokens (144), D width (128), L rows of a sequence, d width of a head.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AttentionInterface, LlavaForConditionalGeneration

from himap_train.embedded.build import IMAGE_SIZE, PATCH_SIZE
from himap_train.embedded.scene_text import COLOURS, COLUMNS, DIGITS, KINDS, ROWS, Item, Scene
from himap_train.embedded.start import HEADS, PatchHeads

_GRID = IMAGE_SIZE // PATCH_SIZE
_PER_CELL = _GRID // len(ROWS)


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW; `step` sets the learning rate."""
    return torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.05)


def step(optimizer: torch.optim.Optimizer, loss: Tensor, now: int, steps: int, peak: float) -> None:
    """One update at the learning rate of step `now` of `steps`: warm-up to `peak`, then cosine to a fiftieth."""
    lr = peak * min(1.0, (now + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * now / steps)))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()


def pixels(images: Sequence[Image.Image], size: int = IMAGE_SIZE) -> Tensor:
    """(B, 3, size, size) as the processor makes them: resized where they must be, values -1 to 1."""
    same = (image.resize((size, size), Image.Resampling.BICUBIC) if image.width != size else image for image in images)
    array = np.stack([np.asarray(image) for image in same])
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


def train_tower(
    model: LlavaForConditionalGeneration,
    heads: PatchHeads,
    batch: Callable[[np.random.Generator], tuple[Tensor, list[dict[str, Tensor]]]],
    steps: int,
    peak: float,
    seed: int,
) -> None:
    """Tower, projector and heads (frozen ones stay so). Prints for each head the fraction of patches that are right.

    `batch` draws a batch's pixels and the labels of its parts, (B, T) each, in order.
    """
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    tower.set_attn_implementation("bf16_plain")
    trained = [*tower.parameters(), *projector.parameters(), *heads.parameters()]
    optim = optimizer([p for p in trained if p.requires_grad])
    rng, start = np.random.default_rng([1, seed]), time.time()
    for now in range(steps):
        pixel_values, labels = batch(rng)
        with torch.autocast("cpu", torch.bfloat16):
            parts = image_features(model, pixel_values).split([len(part["kind"]) for part in labels])
            losses, rights = zip(*[heads(part, label) for part, label in zip(parts, labels, strict=True)], strict=True)
        step(optim, sum(losses), now, steps, peak)
        if now % 25 == 0 or now == steps - 1:
            rates = " ".join(f"{name} " + " ".join(f"{right[name]:.3f}" for right in rights) for name in HEADS)
            print(f"tower {now}/{steps} {time.time() - start:.0f} s, {rates}", flush=True)
    tower.set_attn_implementation("sdpa")  # as after loading: the later stages then see the same features


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
