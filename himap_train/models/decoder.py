"""The decoder's layer loop with tokens dropped between layers: the one place where that happens.

Copied from transformers 5.23 `LlamaModel.forward` (see `families` for what others do); what is HiMAP's is marked.
Training, evaluation, `generate()` and export all run `pruned_forward`; it never reads `self.training`. After the first
removal every row is packed to the left, so its padding lies behind it and a causal kernel without any mask is exact. A
token keeps its original position number, which lives in its rotary embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults

from himap_train.models.attention import register_attention
from himap_train.models.cache import stage_of, stored, unread_images
from himap_train.models.cpu_attention import CausalBlocks
from himap_train.models.inputs import check_image_mask, check_inputs, check_options
from himap_train.models.installed import InstalledPruning
from himap_train.models.prompt import check_continued, drafted, known_prompt, warn_of_labels
from himap_train.models.stages import Stages
from himap_train.models.tokens import Prefill, Tokens, causal_mask, entered, first_positions, removed
from himap_train.models.versions import CACHE, chosen_states, decoder_output
from himap_train.pruning.layout import TokenCounts, TokenLayout, build_layout
from himap_train.pruning.methods.base import Reads
from himap_train.pruning.places import TokenGrid
from himap_train.pruning.removal import with_facts
from himap_train.pruning.token_map import TokenMap, scatter_back


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
    image_grids: Sequence[TokenGrid] | None = None,
    tower_readings: Tensor | None = None,
    cache: Cache | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """Forward of a text decoder under the schedule installed on it.

    Args:
        self: The text decoder.
        input_ids: (B, S), or `inputs_embeds`.
        attention_mask: (B, S + cached), 0 at padding on either side.
        position_ids: (B, S) or (1, S); of a family with M-RoPE (3 or 4, B, S).
        past_key_values: What transformers called `cache` before 5.24.
        inputs_embeds: (B, S, D).
        use_cache: As in transformers.
        image_token_mask: (B, S) bool. HiMAP: needed in a prefill with `inputs_embeds`.
        supervised_mask: (B, S) bool, `labels != -100`. HiMAP: what is predicted must not choose what is looked at; see
            `prompt` for who else says it.
        image_grids: HiMAP: those of all images, see `Places.of`.
        tower_readings: HiMAP: those of all images, see `TowerReadings.of`.
        cache: Empty for a prefill; filled by our prefill when decoding.
        **kwargs: What the family adds between layers, and what changes nothing here; see `inputs.check_options`.

    Returns:
        As the stock decoder: full length, dropped rows zero.

    Raises:
        ValueError: On inputs that cannot be pruned correctly.
    """
    pruning: InstalledPruning = self.himap_pruning
    register_attention(pruning.config._attn_implementation)  # which may have been changed
    cache = past_key_values if cache is None else cache
    if pruning.schedule.dense:
        return type(self).forward(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if inputs_embeds is None:
        token_ids = cast(Tensor, input_ids)
        inputs_embeds = self.embed_tokens(token_ids)
        if image_token_mask is None:
            image_token_mask = token_ids == pruning.image_token_id
    if use_cache and cache is None:
        cache = DynamicCache(config=self.config)
    cached = 0 if cache is None else cache.get_seq_length()
    positions = pruning.family.positions(position_ids, inputs_embeds, cached)
    given = None if position_ids is None else positions.text
    added = pruning.family.layer_inputs(kwargs)
    asked = kwargs.pop("output_hidden_states", self.config.output_hidden_states)
    states: list[Tensor] | None = None if asked is None or asked is False else []
    check_options(pruning.family, kwargs)
    check_inputs(self, attention_mask, given, cache, inputs_embeds)
    mask = causal_mask(self, inputs_embeds, attention_mask, cache, positions.text)
    rotary = self.rotary_emb(inputs_embeds, position_ids=positions.rotary)
    tokens = Tokens(inputs_embeds, rotary, mask, positions.text, added)
    call = {CACHE: cache, "use_cache": use_cache}
    if cached:
        hidden = _decode(self, tokens, positions.rotary, attention_mask, image_token_mask, states, call)
    else:
        where = check_image_mask(image_token_mask, inputs_embeds)
        answers = known_prompt(supervised_mask, self, inputs_embeds, where)
        layout, counts = build_layout(where, attention_mask, answers, pruning.family.marks_tiles)
        layout = with_facts(layout, counts, pruning.schedule, image_grids, tower_readings)
        if answers is not None:
            warn_of_labels(counts)
        hidden = _prefill(self, tokens, layout, counts, states, call)
    return decoder_output(hidden, cache, None if states is None else chosen_states((*states, hidden), asked))


def _prefill(
    decoder: Any,
    tokens: Tokens,
    layout: TokenLayout,
    counts: TokenCounts,
    states: list[Tensor] | None,
    call: dict[str, Any],
) -> Tensor:
    """HiMAP: all layers with the removals between them; (B, S, D), dropped rows zero."""
    pruning: InstalledPruning = decoder.himap_pruning
    schedule, length = pruning.schedule, tokens.hidden.shape[1]
    start = first_positions(tokens.positions, layout) if schedule.positions == "renumber" else None
    reads = any(stage.method.reads not in (Reads.NOTHING, Reads.TOWER) for stage in schedule.stages)
    prefill = Prefill(decoder, call[CACHE], layout.valid.sum(1), start, unread=reads and counts.unread > 0)
    stages, collector = Stages(prefill, counts), None
    call["causal_blocks"] = CausalBlocks() if pruning.cpu_blocks else None
    whole = tokens, layout
    if schedule.enter:
        text = TokenMap.of(layout.valid & ~layout.image, counts.text)
        tokens, layout = removed(prefill, 0, tokens, layout, text)
    for number, layer in enumerate(decoder.layers[: decoder.config.num_hidden_layers]):
        if number == schedule.enter > 0:
            tokens, layout = entered(prefill, number, *whole, tokens, layout), whole[1]
        tokens, layout = stages.leave(number, tokens, layout, collector)
        if states is not None:
            states.append(scatter_back(tokens.hidden, layout.columns, layout.valid, length))
        collector = stages.collector(number + 1, tokens, layout)
        report = {"score_collector": collector} if collector else {}
        tokens = tokens.run(layer, number, call | report)
    pruning.last = stages.record()
    return scatter_back(decoder.norm(tokens.hidden), layout.columns, layout.valid, length)


def _decode(
    decoder: Any,
    tokens: Tokens,
    positions: Tensor,
    attention_mask: Tensor | None,
    image_token_mask: Tensor | None,
    states: list[Tensor] | None,
    call: dict[str, Any],
) -> Tensor:
    """HiMAP: new tokens behind a cache whose layers hold what each stage kept; nothing is removed any more."""
    batch, new = tokens.hidden.shape[:2]
    cache = cast(Cache, call[CACHE])
    cached = cache.get_seq_length()
    # A placeholder that was drafted (prompt lookup finds it in the prompt) stands for no image.
    if new > 1 and image_token_mask is not None and not drafted(cached) and bool(image_token_mask.any()):
        raise ValueError(
            "there are image tokens behind a filled KV cache; tokens are chosen once, in the prefill: "
            f"pass the whole conversation without {CACHE}"
        )
    check_continued(cached, new, unread_images(cache))
    new_slots = None if attention_mask is None else attention_mask[:, -new:].bool()
    for number, layer in enumerate(decoder.layers[: decoder.config.num_hidden_layers]):
        if facts := stage_of(cache, number):
            slots = facts.append(new_slots, new, batch, stored(cache, number))
            tokens = replace(
                tokens, mask=causal_mask(decoder, tokens.hidden, slots, cache, layer=number), positions=None
            )
            if facts.renumber:
                shifted = positions - facts.dropped.unsqueeze(1)
                tokens = replace(tokens, rotary=decoder.rotary_emb(tokens.hidden, position_ids=shifted))
        if states is not None:
            states.append(tokens.hidden)
        tokens = tokens.run(layer, number, call)
    normed: Tensor = decoder.norm(tokens.hidden)
    return normed
