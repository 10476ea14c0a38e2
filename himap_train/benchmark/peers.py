"""How others prune, in their own way but on the same model, for a comparison on one machine.

Each is a small transcription of what its published code does to be able to rank, in place of the decoder's forward:
FastV (arXiv 2403.06764) asks the layer for its attention map, and therefore runs eager attention everywhere;
PyramidDrop (arXiv 2410.17247) projects queries and keys of the next layer once more and goes through the samples one
by one; masking hides dropped tokens and removes none, as FastV's accuracy tables do. They are written for batches
without padding, one image block and one answer a row, which is what the benchmark runs.

Shapes: B rows, L current columns, S columns as passed in, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from himap_train.models.attention import ScoreCollector
from himap_train.models.stock import base_model
from himap_train.models.versions import CACHE, decoder_output
from himap_train.pruning.layout import TokenLayout, build_layout
from himap_train.pruning.ranks import select
from himap_train.pruning.removal import plan_removals
from himap_train.pruning.schedule import PruningSchedule
from himap_train.pruning.token_map import gather_tokens


@dataclass
class _State:
    """What the layers run on: `hidden` (B, L, width), and which columns (B, L) and image tokens (B, L) are left."""

    hidden: Tensor
    rotary: tuple[Tensor, Tensor]
    mask: Tensor | None
    columns: Tensor
    image: Tensor
    prompt_end: int  # columns before the first answer token, as passed in


PeerLayers = Callable[[Any, _State, PruningSchedule, dict[str, Any]], Tensor]
"""Runs all layers of a decoder; returns (B, S, width), zero where tokens were dropped."""


@contextmanager
def peer_decoder(model: nn.Module, layers: PeerLayers, schedule: PruningSchedule, attention: str) -> Iterator[None]:
    """Inside the block the model's decoder runs `layers` with an attention implementation of its own."""
    decoder: Any = base_model(model).model.language_model
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = attention
    decoder.forward = partial(_forward, decoder, layers, schedule)
    try:
        yield
    finally:
        decoder.config._attn_implementation = before
        del decoder.forward


def _forward(
    self: Any,
    layers: PeerLayers,
    schedule: PruningSchedule,
    inputs_embeds: Tensor,
    image_token_mask: Tensor,
    supervised_mask: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """In place of the decoder's forward; arguments that are of no use here are left alone."""
    batch, length = image_token_mask.shape
    cache = DynamicCache(config=self.config) if use_cache else None
    columns = torch.arange(length, device=inputs_embeds.device).expand(batch, length)
    rotary = self.rotary_emb(inputs_embeds, position_ids=columns[:1])
    mask: Any = create_causal_mask(self.config, inputs_embeds, None, None, None)
    prompt_end = length if supervised_mask is None else int(supervised_mask[0].long().argmax())
    state = _State(inputs_embeds, rotary, mask, columns, image_token_mask, prompt_end)
    call = {CACHE: cache, "use_cache": use_cache, "supervised_mask": supervised_mask}
    return decoder_output(layers(self, state, schedule, call), cache)


def _run(layer: Any, state: _State, call: dict[str, Any], **extra: Any) -> Tensor:
    cache = {name: call[name] for name in (CACHE, "use_cache")}
    return layer(state.hidden, attention_mask=state.mask, position_embeddings=state.rotary, **cache, **extra)


def _in_place(self: Any, state: _State, length: int) -> Tensor:
    """The normed rows at the columns where they came from."""
    normed = self.norm(state.hidden)
    full = normed.new_zeros(len(normed), length, normed.shape[2])
    return full.scatter(1, state.columns.unsqueeze(2).expand_as(normed), normed)


def _last_prompt_row(state: _State) -> int:
    """Place of the last prompt token among the columns that are left; the same in every row."""
    return int((state.columns[0] < state.prompt_end).sum()) - 1


def _keep(state: _State, scores: Tensor, count: int) -> Tensor:
    """Sorted places (B, L') of the text and of the `count` highest of `scores` (B, L) among the image tokens."""
    best = scores.masked_fill(~state.image, -torch.inf).topk(count, dim=1).indices
    stays = (~state.image).scatter(1, best, True)
    return stays.nonzero()[:, 1].view(len(stays), -1)


def fastv_attention_maps(self: Any, state: _State, schedule: PruningSchedule, call: dict[str, Any]) -> Tensor:
    """FastV: the attention map of layer K - 1, its last row, top-k, original positions, a fresh mask."""
    length, counts = state.hidden.shape[1], _counts(schedule, state)
    maps: list[Tensor] = []
    for number, layer in enumerate(self.layers):
        if number in counts:
            scores = maps[0].mean(1)[:, _last_prompt_row(state)]
            index = _keep(state, scores.detach(), counts[number])
            rotary = (gather_tokens(state.rotary[0], index), gather_tokens(state.rotary[1], index))
            hidden = gather_tokens(state.hidden, index)
            mask: Any = create_causal_mask(self.config, hidden, None, None, None)
            state = replace(
                state,
                hidden=hidden,
                rotary=rotary,
                mask=mask,
                columns=state.columns.gather(1, index),
                image=state.image.gather(1, index),
            )
        maps = []
        hook = layer.self_attn.register_forward_hook(lambda module, args, out, kept=maps: kept.append(out[1]))
        state.hidden = _run(layer, state, call)
        hook.remove()
    return _in_place(self, state, length)


def pyramiddrop_ranking(self: Any, state: _State, schedule: PruningSchedule, call: dict[str, Any]) -> Tensor:
    """PyramidDrop: the next layer's projections on detached features, sample by sample, positions counted anew."""
    length, counts = state.hidden.shape[1], _counts(schedule, state)
    for number, layer in enumerate(self.layers):
        if number in counts:
            indices = []
            for row in range(len(state.hidden)):
                one = replace(state, hidden=state.hidden[row : row + 1], image=state.image[row : row + 1])
                indices.append(_keep(one, _reprojected_scores(layer, one), counts[number])[0])
            kept = [state.hidden[row][index] for row, index in enumerate(indices)]
            hidden = nn.utils.rnn.pad_sequence(kept, batch_first=True)
            index = torch.stack(indices)
            places = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
            state = replace(
                state,
                hidden=hidden,
                rotary=self.rotary_emb(hidden, position_ids=places),
                columns=state.columns.gather(1, index),
                image=state.image.gather(1, index),
            )
        state.hidden = _run(layer, state, call)
    return _in_place(self, state, length)


@torch.no_grad()
def _reprojected_scores(layer: Any, one: _State) -> Tensor:
    """Attention (1, L) of the last prompt token under `layer`'s own norm and projections."""
    attention, normed = layer.self_attn, layer.input_layernorm(one.hidden.detach())
    shape = (*normed.shape[:2], -1, attention.head_dim)
    query, key = (project(normed).view(shape).transpose(1, 2) for project in (attention.q_proj, attention.k_proj))
    query, key = apply_rotary_pos_emb(query, key, one.rotary[0][:1], one.rotary[1][:1])
    last = _last_prompt_row(one)
    key = repeat_kv(key[:, :, : last + 1], attention.num_key_value_groups)
    weights = (query[:, :, last : last + 1] @ key.transpose(2, 3) * attention.scaling).softmax(-1, dtype=torch.float32)
    return nn.functional.pad(weights.mean(1)[:, 0], (0, normed.shape[1] - last - 1))


def masking(self: Any, state: _State, schedule: PruningSchedule, call: dict[str, Any]) -> Tensor:
    """Dropped tokens stay in the sequence and are hidden from the others by a mask of (B, 1, S, S)."""
    layout, counts = build_layout(state.image, None, call["supervised_mask"])
    removals = plan_removals(schedule.stages, counts)
    length = state.hidden.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=state.hidden.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=state.hidden.device)
    collector: ScoreCollector | None = None
    for number, layer in enumerate(self.layers):
        if collector is not None:
            kept = removals[number].after.current
            keep = select(removals[number].stage.method.choose(collector.seen(), kept), layout, kept)
            layout = TokenLayout(layout.numbers, layout.flags & keep)
            state.mask = (causal & keep.unsqueeze(1) | itself).unsqueeze(1)
        removal = removals.get(number + 1)
        collector = None
        if removal is not None:
            collector = ScoreCollector(removal.stage, layout, removal.before)
        state.hidden = _run(layer, state, call, **({"score_collector": collector} if collector else {}))
    return self.norm(state.hidden) * layout.valid.unsqueeze(2)


def _counts(schedule: PruningSchedule, state: _State) -> dict[int, int]:
    """Image tokens of a row that each stage leaves, by layer."""
    _, counts = build_layout(state.image[:1])
    removals = plan_removals(schedule.stages, counts)
    return {layer: int(removal.after.current[0, 0]) for layer, removal in removals.items()}
