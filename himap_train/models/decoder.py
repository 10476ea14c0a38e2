"""The decoder's layer loop with tokens dropped between layers: the one place where that happens.

Copied from transformers 5.23 `LlamaModel.forward` (`MistralModel` and `Qwen2Model` differ in their masks alone); what
is HiMAP's is marked. Training, evaluation, `generate()` and export all run `pruned_forward`; it never reads
`self.training`.

After the first removal every row is packed to the left, so its padding lies behind it and a causal kernel without any
mask is exact. A token keeps its original position number, which lives in its rotary embedding; numbers with gaps are
never shown to transformers' mask functions, which would read them as packed sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaModel, MistralModel, Qwen2Model
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults

from himap_train.models.attention import ScoreCollector
from himap_train.models.cache import mark_stage, stage_of
from himap_train.models.cpu_attention import CausalBlocks
from himap_train.models.inputs import check_image_mask, check_inputs
from himap_train.models.installed import InstalledPruning, PruneCounts
from himap_train.pruning.layout import TokenCounts, TokenLayout, build_layout
from himap_train.pruning.learned.marginal import Marginal, marginal_tokens
from himap_train.pruning.scoring import ranking_rows, scores_without_attention
from himap_train.pruning.selection import (
    Removal,
    compact,
    gather_tokens,
    image_ranks,
    plan_removals,
    scatter_back,
    select,
    settle_mass,
)

DECODERS: tuple[type[nn.Module], ...] = (LlamaModel, MistralModel, Qwen2Model)


@dataclass
class _Tokens:
    """What the layers run on. After a removal `positions` is None: see the module's docstring."""

    hidden: Tensor
    rotary: tuple[Tensor, Tensor]
    mask: Tensor | None
    positions: Tensor | None
    marginal: Marginal | None = None


@merge_with_config_defaults  # type: ignore[untyped-decorator]
def pruned_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    image_token_mask: Tensor | None = None,
    supervised_mask: Tensor | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """Forward of a text decoder under the schedule installed on it.

    Args:
        self: The text decoder.
        input_ids: (B, S), or `inputs_embeds`.
        attention_mask: (B, S + cached), 0 at padding on either side.
        position_ids: (B, S) or (1, S).
        past_key_values: Empty for a prefill; filled by our prefill when decoding.
        inputs_embeds: (B, S, D).
        use_cache: As in transformers.
        image_token_mask: (B, S) bool. HiMAP: needed in a prefill.
        supervised_mask: (B, S) bool, `labels != -100`. HiMAP: what is predicted must not choose what is looked at.
        **kwargs: Passed to the layers.

    Returns:
        As the stock decoder: full length, dropped rows zero.

    Raises:
        ValueError: On inputs that cannot be pruned correctly.
    """
    pruning: InstalledPruning = self.himap_pruning
    if not pruning.schedule.stages:
        return type(self).forward(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if inputs_embeds is None:
        inputs_embeds = self.embed_tokens(input_ids)
    if use_cache and past_key_values is None:
        past_key_values = DynamicCache(config=self.config)
    cached = 0 if past_key_values is None else past_key_values.get_seq_length()
    check_inputs(self, attention_mask, position_ids, past_key_values, cached + inputs_embeds.shape[1], kwargs)
    if position_ids is None:
        position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + cached
    mask = _causal_mask(self, inputs_embeds, attention_mask, past_key_values, position_ids)
    rotary = self.rotary_emb(inputs_embeds, position_ids=position_ids)
    tokens = _Tokens(inputs_embeds, rotary, mask, position_ids)
    states: list[Tensor] | None = [] if kwargs.pop("output_hidden_states", False) else None
    call = {"past_key_values": past_key_values, "use_cache": use_cache, **kwargs}
    if cached:
        hidden = _decode(self, tokens, attention_mask, image_token_mask, states, call)
    else:
        layout, counts = build_layout(
            check_image_mask(image_token_mask, inputs_embeds), attention_mask, supervised_mask
        )
        hidden = _prefill(self, tokens, layout, counts, states, call)
    return BaseModelOutputWithPast(
        last_hidden_state=hidden,
        past_key_values=past_key_values,
        hidden_states=None if states is None else (*states, hidden),
    )


def _prefill(
    decoder: Any,
    tokens: _Tokens,
    layout: TokenLayout,
    counts: TokenCounts,
    states: list[Tensor] | None,
    call: dict[str, Any],
) -> Tensor:
    """HiMAP: all layers with the removals between them; (B, S, D), dropped rows zero."""
    pruning: InstalledPruning = decoder.himap_pruning
    removals = plan_removals(pruning.schedule, counts)
    length = tokens.hidden.shape[1]
    seen, layouts = PruneCounts(counts.image.sum(1)), []
    start = _first_positions(tokens.positions, layout) if pruning.schedule.positions == "renumber" else None
    collector: ScoreCollector | None = None
    ratios = pruning.ratios if torch.is_grad_enabled() else None
    # Not for an empty schedule: it runs what the stock forward runs.
    call["causal_blocks"] = CausalBlocks() if pruning.cpu_blocks and pruning.schedule.stages else None
    for number, layer in enumerate(decoder.layers):
        if removal := removals.get(number):
            if removal.removes or ratios is not None:
                scores = _scores(removal, layout, collector)
                if collector is not None:
                    removals = settle_mass(removals, number, scores, layout)
                    removal = removals[number]
                ranks = image_ranks(scores, layout, counts.image.shape[1])
                if ratios is not None:
                    carried = tokens.marginal.moved if tokens.marginal else None
                    tokens.marginal = marginal_tokens(ratios[number], ranks, layout, removal, carried)
                if removal.removes or tokens.marginal:
                    keep = select(ranks, layout, removal.after.current)
                    cache = call["past_key_values"]
                    tokens, layout = _remove(decoder, number, tokens, layout, keep, removal, start, cache)
            seen.kept_rows.append(removal.after.current.sum(1))
            layouts.append(layout)
        if states is not None:
            states.append(scatter_back(tokens.hidden, layout, length))
        collector = _collector(removals.get(number + 1), layout, always=ratios is not None)
        report = {"score_collector": collector} if collector else {}
        tokens.hidden = _run(layer, tokens, call | report)
    pruning.last = seen
    for trace in pruning.traces:
        trace.kept = [[row[real].cpu() for row, real in zip(at.columns, at.valid, strict=True)] for at in layouts]
    return scatter_back(decoder.norm(tokens.hidden), layout, length)


def _collector(removal: Removal | None, layout: TokenLayout, always: bool) -> ScoreCollector | None:
    """HiMAP: what the layer before a stage reports to; None where nothing will be ranked."""
    if removal is None or not (removal.removes or always) or not removal.stage.needs_attention:
        return None
    return ScoreCollector(removal.stage, ranking_rows(removal.stage, layout, removal.before), layout.valid)


def _scores(removal: Removal, layout: TokenLayout, collector: ScoreCollector | None) -> Tensor:
    """HiMAP: by which a stage ranks the image tokens, (B, L)."""
    if collector is not None:
        return collector.scores()
    return scores_without_attention(removal.stage.criterion, layout, removal.before, removal.after.current)


def _remove(
    decoder: Any,
    number: int,
    tokens: _Tokens,
    layout: TokenLayout,
    keep: Tensor,
    removal: Removal,
    start: Tensor | None,
    cache: Cache | None,
) -> tuple[_Tokens, TokenLayout]:
    """HiMAP: one gather moves everything that belongs to a token; rows come out packed to the left.

    With `start` (B, 1) positions are counted anew from there, without it every token keeps its own.
    """
    device, counts, lengths = keep.device, removal.after, removal.after.lengths
    marginal = tokens.marginal
    if marginal is not None:
        keep, lengths = keep | marginal.shadow, lengths + marginal.shadows
    longest = int(lengths.max())
    index = compact(keep, longest)
    valid = torch.arange(longest, device=device) < lengths.to(device, non_blocking=True).unsqueeze(1)
    hidden = gather_tokens(tokens.hidden, index)
    if marginal is not None:
        marginal = marginal.gather(index, valid)
        valid = valid & ~marginal.shadow  # as padding: nothing keeps it, ranks by it or reads it at the end
    layout = layout.gather(index, valid)
    if start is not None:
        rotary = decoder.rotary_emb(hidden, position_ids=start + torch.arange(longest, device=device))
    else:
        rotary = (gather_tokens(tokens.rotary[0], index), gather_tokens(tokens.rotary[1], index))
    mask = _causal_mask(decoder, hidden, None, cache, layer=number)
    if cache is not None:
        dropped = (counts.image - counts.current).sum(1).to(device, non_blocking=True)
        slots = None if int(lengths.min()) == longest else valid
        mark_stage(cache, number, slots, dropped, renumber=start is not None)
    return _Tokens(hidden, rotary, mask, None, marginal), layout


def _first_positions(positions: Any, layout: TokenLayout) -> Tensor:
    """Position number of each row's first real token: (B, 1)."""
    first = layout.valid.long().argmax(1, keepdim=True)
    return positions.expand(first.shape[0], -1).gather(1, first)


def _decode(
    decoder: Any,
    tokens: _Tokens,
    attention_mask: Tensor | None,
    image_token_mask: Tensor | None,
    states: list[Tensor] | None,
    call: dict[str, Any],
) -> Tensor:
    """HiMAP: new tokens behind a cache whose layers hold what each stage kept; nothing is removed any more."""
    batch, new = tokens.hidden.shape[:2]
    if new > 1 and image_token_mask is not None and bool(image_token_mask.any()):
        raise ValueError(
            "there are image tokens behind a filled KV cache; tokens are chosen once, in the prefill: "
            "pass the whole conversation without past_key_values"
        )
    cache, positions = call["past_key_values"], cast(Tensor, tokens.positions)
    new_slots = None if attention_mask is None else attention_mask[:, -new:].bool()
    for number, layer in enumerate(decoder.layers):
        if stage := stage_of(cache, number):
            slots = stage.append(new_slots, new, batch)
            tokens.mask = _causal_mask(decoder, tokens.hidden, slots, cache, layer=number)
            tokens.positions = None
            if stage.renumber:
                shifted = positions - stage.dropped.unsqueeze(1)
                tokens.rotary = decoder.rotary_emb(tokens.hidden, position_ids=shifted)
        if states is not None:
            states.append(tokens.hidden)
        tokens.hidden = _run(layer, tokens, call)
    return decoder.norm(tokens.hidden)


def _causal_mask(
    decoder: Any,
    hidden: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None,
    positions: Tensor | None = None,
    layer: int | None = None,
) -> Tensor | None:
    """In the form that the attention implementation takes; None where a causal kernel needs none."""
    return create_causal_mask(decoder.config, hidden, attention_mask, cache, positions, layer_idx=layer)  # type: ignore[return-value]


def _run(layer: nn.Module, tokens: _Tokens, call: dict[str, Any]) -> Tensor:
    given = {
        "attention_mask": tokens.mask,
        "position_embeddings": tokens.rotary,
        "position_ids": tokens.positions,
        **call,
        **({} if tokens.marginal is None else {"marginal": tokens.marginal}),
    }
    return layer(tokens.hidden, **given)
