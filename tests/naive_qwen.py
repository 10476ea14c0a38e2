"""The oracle for Qwen-VL: M-RoPE and DeepStack written out, dropped image tokens masked as keys, one row at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from naive import dropped_tokens
from tiny_qwen import IMAGE_ID, QwenCase
from torch import Tensor

THETA = 100.0


def row_positions(ids: list[int], grids: list[tuple[int, int]]) -> Tensor:
    """(3, T): text counts on in all axes; an image spreads over rows and columns, and takes its longer side."""
    numbers: list[tuple[int, int, int]] = []
    images, following, at = iter(grids), 0, 0
    while at < len(ids):
        if ids[at] == IMAGE_ID:
            rows, columns = next(images)
            numbers += [(following, following + i, following + j) for i in range(rows) for j in range(columns)]
            following, at = following + max(rows, columns), at + rows * columns
        else:
            numbers.append((following,) * 3)
            following, at = following + 1, at + 1
    return torch.tensor(numbers).T


def rotary(kind: str, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine (T, 12): six frequencies, whose axes lie in blocks (Qwen2) or in turn (Qwen3)."""
    axes = [0, 1, 2, 0, 1, 2] if kind == "qwen3_vl" else [0, 0, 1, 1, 2, 2]
    angles = torch.stack([positions[axis].double() * THETA ** (-k / 6) for k, axis in enumerate(axes)], dim=1)
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def naive_layer(layer: Any, kind: str, x: Tensor, positions: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """(T, D) -> (T, D) and the attention averaged over heads (T, T)."""
    attention, normed = layer.self_attn, layer.input_layernorm(x)
    cos, sin = rotary(kind, positions, x.dtype)
    q, k, v = (
        getattr(attention, f"{name}_proj")(normed).view(len(x), -1, attention.head_dim).transpose(0, 1)
        for name in "qkv"
    )
    if kind == "qwen3_vl":
        q, k = attention.q_norm(q), attention.k_norm(k)

    def rotate(h: Tensor) -> Tensor:
        left, right = h.chunk(2, dim=-1)
        return h * cos + torch.cat([-right, left], dim=-1) * sin

    q, k = rotate(q), rotate(k)
    k, v = (h.repeat_interleave(len(q) // len(h), dim=0) for h in (k, v))
    visible = torch.ones(len(x), len(x), dtype=torch.bool).tril() & alive[None, :]
    visible |= torch.eye(len(x), dtype=torch.bool)
    bias = torch.zeros(len(x), len(x), dtype=x.dtype).masked_fill(~visible, -math.inf)
    weights = (q @ k.transpose(1, 2) / math.sqrt(attention.head_dim) + bias).softmax(dim=-1)
    x = x + attention.o_proj((weights @ v).transpose(0, 1).reshape(len(x), -1))
    return x + layer.mlp(layer.post_attention_layernorm(x)), weights.mean(dim=0)


def naive_qwen(
    model: Any, kind: str, schedule: Any, case: QwenCase, labels: bool = False, more: Tensor | None = None
) -> tuple[Tensor, list[list[Tensor]]]:
    """Final states (B, S, D), zero at padding and dropped columns, and `kept[stage][row]`.

    `more` (B, N) are decoded tokens behind the prompts: they rank nothing.
    """
    ids, mask = case.input_ids, case.attention_mask
    prompt = ids.shape[1]
    if more is not None:
        ids, mask = torch.cat([ids, more], dim=1), torch.cat([mask, torch.ones_like(more)], dim=1)
    table = model.get_input_embeddings()
    hidden = table(ids).new_zeros(*ids.shape, table.embedding_dim)
    kept: list[list[Tensor]] = [[] for _ in schedule.stages]
    for b in range(len(ids)):
        columns = mask[b].nonzero()[:, 0]
        grids, row = case.grids[case.own(b)], ids[b, columns]
        is_image = row == IMAGE_ID
        embeds, planes = table(row), []
        if grids:
            images = QwenCase(ids, mask, ids, case.pixels[case.own(b)], grids, [len(grids)]).images()
            encoded = model.get_image_features(**images, return_dict=True)
            embeds = embeds.masked_scatter(is_image[:, None], torch.cat(list(encoded.pooler_output)))
            for plane in getattr(encoded, "deepstack_features", ()):
                planes.append(torch.zeros_like(embeds).masked_scatter(is_image[:, None], torch.cat(list(plane))))
        prompt_length = int((columns < prompt).sum())
        targets = case.labels[b, columns] if labels else None
        states, alive = naive_row(
            model, kind, schedule, embeds, row_positions(row.tolist(), grids), is_image, planes, targets, prompt_length
        )
        last = alive[-1] if alive else torch.ones(len(columns), dtype=torch.bool)
        hidden[b, columns[last]] = states[last]
        for stage, stays in zip(kept, alive, strict=True):
            stage.append(columns[:prompt_length][stays[:prompt_length]])
    return hidden, kept


def naive_row(
    model: Any,
    kind: str,
    schedule: Any,
    start: Tensor,
    positions: Tensor,
    is_image: Tensor,
    planes: list[Tensor],
    labels: Tensor | None,
    prompt: int,
) -> tuple[Tensor, list[Tensor]]:
    """One row (T, D) without padding -> final states and, per stage, which tokens are alive after it."""
    decoder, hidden = model.model.language_model, start
    alive, weights, history = torch.ones(len(start), dtype=torch.bool), torch.zeros(0), []
    for index, layer in enumerate(decoder.layers):
        absent = is_image & (index < schedule.enter)
        for stage in schedule.stages:
            if stage.layer == index:
                drop, means = dropped_tokens(stage, weights.detach(), hidden, is_image, labels, prompt, alive)
                hidden, *planes = (averaged(states, means) for states in (hidden, *planes))
                alive = alive & ~drop
                history.append(alive)
        hidden, weights = naive_layer(layer, kind, hidden, positions, alive & ~absent)
        if index < len(planes):
            hidden = hidden + planes[index]
        hidden = torch.where(absent[:, None], start, hidden)
    return decoder.norm(hidden), history


def averaged(states: Tensor, means: dict[int, list[int]]) -> Tensor:
    """(T, D) with the mean of those tokens in the place of each that stands for several."""
    return torch.stack([states[means.get(place, [place])].mean(0) for place in range(len(states))])
