"""What the training of the embedded models computes: optimizer, dense labels of patches, image features, attention.

Shapes: B scenes, T image tokens, D width (128), L rows of a sequence, d width of a head.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AttentionInterface, LlavaForConditionalGeneration

from himap_train.embedded.build import WIDTH
from himap_train.embedded.scene_text import COLOURS, COLUMNS, DIGITS, KINDS, ROWS, Scene, third

# The dense labels of a patch, and the words that the rows of the class head become.
HEADS: dict[str, tuple[str, ...]] = {
    "kind": (*KINDS, "card", "nothing"),
    "colour": COLOURS,
    "digit": DIGITS,
    "row": ROWS,
    "column": COLUMNS,
}
HEAD_WORDS = tuple(word for words in HEADS.values() for word in words)


class PatchHeads(nn.Module):
    """One linear classifier a label over the projector's output; its rows later start the word embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, len(HEAD_WORDS), bias=False)

    def forward(self, features: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Sum of the heads' cross-entropies, and for each head the fraction of patches that are right."""
        loss, right = features.new_zeros(()), {}
        for (name, _), logits in zip(
            HEADS.items(), self.linear(features).float().split([len(w) for w in HEADS.values()], dim=-1), strict=True
        ):
            target = labels[name]
            loss = loss + nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)
            valid = target != -100
            right[name] = (logits.argmax(-1) == target)[valid].float().mean().item()
        return loss, right


class Stages:
    """The stages of a recipe; one whose result is in the folder already is not repeated.

    Args:
        folder: Made.
        kept: Modules and optimizers, which hold a stage's result.
    """

    def __init__(self, folder: Path, **kept: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.kept = folder, kept

    def __call__(self, name: str, run: Callable[[], object]) -> None:
        """Run one, or take its result."""
        file = self.folder / f"{name}.pt"
        if not file.exists():
            run()
            torch.save({key: part.state_dict() for key, part in self.kept.items()}, file)
        for key, state in torch.load(file, weights_only=True).items():
            self.kept[key].load_state_dict(state)


def scaled(steps: int, scale: float) -> int:
    """`steps` shrunk, at least 1."""
    return max(1, round(scale * steps))


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


def pixels(images: Sequence[Image.Image], size: int) -> Tensor:
    """(B, 3, size, size) as the processor makes them: resized where they must be, values -1 to 1."""
    same = (image.resize((size, size), Image.Resampling.BICUBIC) if image.width != size else image for image in images)
    array = np.stack([np.asarray(image) for image in same])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def patch_labels(scenes: Sequence[Scene], side: int) -> dict[str, Tensor]:
    """For each head the class of what lies at each of `side` x `side` patches, (B, T); -100 for no colour or digit.

    A patch of a coarse scene has the class of the place that its centre lies in.
    """
    thirds = np.array([third(index, side) for index in range(side)])
    grids = {name: np.full((len(scenes), side, side), -100) for name in HEADS}
    grids["kind"][:] = HEADS["kind"].index("nothing")
    grids["row"][:], grids["column"][:] = thirds[:, None], thirds
    for number, scene in enumerate(scenes):
        for (row, column), item in scene.things:
            where = (row, column) if scene.fine else np.ix_(thirds == row, thirds == column)
            for name, word in vars(item).items():
                if word:
                    grids[name][number][where] = HEADS[name].index(word)
    return {name: torch.from_numpy(grid.reshape(len(scenes), -1)) for name, grid in grids.items()}


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
