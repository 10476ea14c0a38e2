"""The oracle: a decoder that removes nothing and masks dropped image tokens as keys. Slow, obvious, one row at a time.

It uses the stock model's weights and rotary table, and nothing of the package but the schedule's plain fields. The
ranking rules are those of the design: a stage at layer `l` ranks by the attention of layer `l - 1`; T tokens a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from cases import toy_readings
from naive_methods import (
    by_windows,
    coverage_order,
    dart_order,
    dominant_and_contextual,
    over_window_means,
    rater_tokens,
    recycled,
    square_places,
)
from torch import Tensor
from transformers import LlavaForConditionalGeneration


@dataclass
class NaiveOutput:
    """Of a padded batch: `hidden` (B, S, D), zero at padding and dropped columns; `kept[stage][row]`: columns left."""

    hidden: Tensor
    kept: list[list[Tensor]]


def naive_forward(
    model: LlavaForConditionalGeneration,
    schedule: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    image_features: list[Tensor] | None = None,
    labels: Tensor | None = None,
    prompt: int | None = None,
    kept: list[list[Tensor]] | None = None,
) -> NaiveOutput:
    """Columns from `prompt` on were decoded: they rank nothing. `kept` takes the choice as given, as for random."""
    embeds = model.get_input_embeddings()(input_ids)
    is_image = input_ids == model.config.image_token_id
    if image_features:
        embeds = embeds.masked_scatter(is_image[..., None], torch.cat(image_features).to(embeds.dtype))
    hidden = torch.zeros_like(embeds)
    chosen: list[list[Tensor]] = [[] for _ in schedule.stages]
    for b in range(len(input_ids)):
        columns = attention_mask[b].nonzero()[:, 0]  # a row without its padding
        prompt_length = len(columns) if prompt is None else int((columns < prompt).sum())
        row_labels = None if labels is None else labels[b, columns]
        forced = None if kept is None else [torch.isin(columns, stage[b]) for stage in kept]
        states, alive = naive_row(
            model, schedule, embeds[b, columns], is_image[b, columns], row_labels, prompt_length, forced
        )
        last = alive[-1] if alive else torch.ones(len(columns), dtype=torch.bool)
        hidden[b, columns[last]] = states[last]
        for stage, stays in zip(chosen, alive, strict=True):
            stage.append(columns[:prompt_length][stays[:prompt_length]])
    return NaiveOutput(hidden, chosen)


def naive_row(
    model: LlavaForConditionalGeneration,
    schedule: Any,
    hidden: Tensor,
    is_image: Tensor,
    labels: Tensor | None,
    prompt: int,
    forced: list[Tensor] | None,
) -> tuple[Tensor, list[Tensor]]:
    """One row (T, D) without padding -> final states (T, D) and, per stage, which tokens are alive after it (T,)."""
    decoder = model.get_decoder()
    positions, alive = torch.arange(len(hidden)), torch.ones(len(hidden), dtype=torch.bool)
    weights, keys, before, history, given = torch.zeros(0), torch.zeros(0), hidden, [], hidden
    for index, layer in enumerate(decoder.layers):
        if schedule.enter:  # image tokens are not there before, and come in as they were given
            in_prompt = is_image & (torch.arange(len(hidden)) < prompt)
            alive = ~in_prompt if index == 0 else alive | in_prompt if index == schedule.enter else alive
            hidden = torch.where(in_prompt[:, None], given, hidden) if index == schedule.enter else hidden
        for number, stage in enumerate(schedule.stages):
            if stage.layer != index:
                continue
            if forced is not None:
                alive = forced[number] | (torch.arange(len(hidden)) >= prompt)
            else:
                drop, means = dropped_tokens(
                    stage, weights.detach(), hidden, is_image, labels, prompt, alive, keys, before, given,
                    marks=hasattr(model.model, "connector"),  # SmolVLM
                )  # fmt: skip
                hidden = torch.stack([mean_of(hidden, means.get(p, [p])) for p in range(len(hidden))])
                alive = alive & ~drop
            if schedule.positions == "renumber":
                positions = alive.long().cumsum(0) - 1
            history.append(alive)
        before, keys = hidden, naive_keys(layer, decoder.rotary_emb, hidden, positions)
        hidden, weights = naive_layer(layer, decoder.rotary_emb, hidden, positions, alive)
    return decoder.norm(hidden), history


def mean_of(hidden: Tensor, members: Any) -> Tensor:
    """The mean of these tokens, or their weighted sum."""
    if isinstance(members, dict):
        return torch.stack([share * hidden[p] for p, share in members.items()]).sum(0)
    return hidden[members].mean(0)


def naive_layer(
    layer: Any,
    rotary: Any,
    x: Tensor,
    positions: Tensor,
    alive: Tensor,
    presence: Tensor | None = None,
    gains: dict[int, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """(T, D) -> (T, D) and the attention averaged over heads (T, T): row = query, column = key.

    `presence` (T,) weighs the keys in the softmax: 1 for all that are there, 0 for none; it may go a little beyond.
    `gains` adds tokens that are not there: so much of what a row's result would change if the token were.
    """
    attention, normed = layer.self_attn, layer.input_layernorm(x)
    cos, sin = (table[0] for table in rotary(x[None], positions[None]))

    def heads(projected: Tensor) -> Tensor:
        return projected.view(len(x), -1, attention.head_dim).transpose(0, 1)

    def rotate(h: Tensor) -> Tensor:
        left, right = h.chunk(2, dim=-1)
        return h * cos + torch.cat([-right, left], dim=-1) * sin

    q, k, v = (heads(projection(normed)) for projection in (attention.q_proj, attention.k_proj, attention.v_proj))
    if hasattr(attention, "q_norm"):  # Qwen3: of each head
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = rotate(q), rotate(k)
    k, v = (h.repeat_interleave(len(q) // len(h), dim=0) for h in (k, v))
    visible = torch.ones(len(x), len(x), dtype=torch.bool).tril() & alive[None, :]
    visible |= torch.eye(len(x), dtype=torch.bool)  # a dropped row is ignored later, but must not be NaN
    bias = torch.zeros(len(x), len(x), dtype=x.dtype).masked_fill(~visible, -math.inf)
    logits = q @ k.transpose(1, 2) / math.sqrt(attention.head_dim)
    if presence is None:
        weights = (logits + bias).softmax(dim=-1)
    else:
        causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        seen = presence.expand(len(x), -1).masked_fill(~causal, 0.0)
        seen = torch.where(torch.eye(len(x), dtype=torch.bool) & ~alive, torch.ones_like(seen), seen)
        numerators = (logits - logits.amax(dim=-1, keepdim=True)).exp() * seen
        weights = numerators / numerators.sum(-1, keepdim=True)
    mixed = weights @ v  # (heads, T, width)
    result = mixed.clone()
    for place, gain in (gains or {}).items():
        assert presence is not None
        causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        there = (presence + (torch.arange(len(x)) == place)).expand(len(x), -1).masked_fill(~causal, 0.0)
        shares = (logits - logits.amax(dim=-1, keepdim=True)).exp() * there
        share = shares[:, :, place] / shares.sum(-1)  # of the added token in each row
        result[:, place:] += gain * share[:, place:, None] * (v[:, None, place] - mixed[:, place:])
    x = x + attention.o_proj(result.transpose(0, 1).reshape(len(x), -1))
    return x + layer.mlp(layer.post_attention_layernorm(x)), weights.mean(dim=0)


def naive_keys(layer: Any, rotary: Any, x: Tensor, positions: Tensor) -> Tensor:
    """Keys of a layer, turned by their positions: (heads, T, width)."""
    keys = layer.self_attn.k_proj(layer.input_layernorm(x)).view(len(x), -1, layer.self_attn.head_dim).transpose(0, 1)
    keys = layer.self_attn.k_norm(keys) if hasattr(layer.self_attn, "k_norm") else keys
    cos, sin = (table[0] for table in rotary(x[None], positions[None]))
    left, right = keys.chunk(2, dim=-1)
    return keys * cos + torch.cat([-right, left], dim=-1) * sin


def dropped_tokens(
    stage: Any,
    weights: Tensor,
    hidden: Tensor,
    is_image: Tensor,
    labels: Tensor | None,
    prompt: int,
    alive: Tensor,
    keys: Tensor | None = None,
    before: Tensor | None = None,
    given: Tensor | None = None,
    marks: bool = False,
) -> tuple[Tensor, dict[int, Any]]:
    """Which tokens (T,) leave at this stage, and of which tokens those that stay become the mean.

    Images of one turn are ranked by that turn's prompt alone.
    """
    means: dict[int, Any] = {}
    supervised = [labels is not None and int(labels[p]) != -100 for p in range(prompt)]
    starts = [p for p in range(prompt) if supervised[p] and (p == 0 or not supervised[p - 1])]
    turn = [sum(start < p for start in starts) for p in range(prompt)]  # of positions that are not supervised
    drop = torch.zeros(len(alive), dtype=torch.bool)
    for group in sorted({turn[p] for p in range(prompt) if is_image[p]}):
        tokens = [p for p in range(prompt) if is_image[p] and turn[p] == group]
        current = [p for p in tokens if alive[p]]
        in_turn = [p for p in range(prompt) if turn[p] == group and not supervised[p]]
        behind = tokens[-1] if marks else tokens[0]  # where marks stand between tiles, those rank nothing
        text = [p for p in in_turn if not is_image[p] and p > behind] or [in_turn[-1]]
        protected = [p for p in current if (supervised[p + 1] if p + 1 < prompt else labels is None)]
        if stage.attention_below is not None:
            share = sum(float(weights[row, p]) for row in text for p in current) / len(text)
            if share >= stage.attention_below:
                continue
        if "keep" in stage.to_dict():
            scores = naive_scores(stage.criterion, weights, current, text, 0)
            count = mass_count(stage.keep, scores, protected, len(tokens))
        else:
            count = max(kept_count(stage, len(tokens)), len(protected))
        if count >= len(current):
            continue
        if stage.criterion == "divprune":
            order = farthest_first(hidden, current, protected, count)
        elif stage.method.name == "coverage":
            order = coverage_order(
                stage.method, hidden, current, protected, [p for p in text if not is_image[p]], count
            )
        elif stage.method.name == "dart":
            question = [p for p in text if not is_image[p]]
            order = dart_order(stage.method, hidden, keys, current, protected, question, count)
        elif stage.method.name == "visionzip":
            order, merged = dominant_and_contextual(stage.method, toy_readings(given), current, protected, count)
            means |= merged
        elif stage.criterion == "average-pool":
            runs = even_runs([p for p in current if p not in protected], count - len(protected))
            means |= {run[(len(run) - 1) // 2]: run for run in runs}
            stay = {*protected, *(run[(len(run) - 1) // 2] for run in runs)}
            order = sorted(current, key=lambda p: p not in stay)
        else:
            raters = text
            if stage.method.name == "sparsevlm":
                raters = rater_tokens(before, current, text)
            scores = naive_scores(stage.method.name, weights, current, raters, count)
            if stage.method.name == "image_stratified":
                scores = over_window_means(stage.method.window, square_places(is_image), scores)
            order = sorted(current, key=lambda p: (p not in protected, -scores[p], p))
            if window := getattr(stage.method, "window", 0):
                order = by_windows(window, square_places(is_image), scores, protected)
            if stage.method.name == "sparsevlm":
                order, clusters = recycled(stage.method, hidden, order, protected, count)
                means |= clusters
        drop[order[count:]] = True
    return drop, means


def farthest_first(hidden: Tensor, tokens: list[int], protected: list[int], count: int) -> list[int]:
    """DivPrune: tokens in the order in which they are chosen; what must stay first."""

    def distance(a: int, b: int) -> float:
        return 1 - float(torch.cosine_similarity(hidden[a].detach().double(), hidden[b].detach().double(), dim=0))

    chosen = list(protected)
    while len(chosen) < count:
        rest = [p for p in tokens if p not in chosen]
        others = {p: chosen or [q for q in tokens if q != p] for p in rest}
        chosen.append(max(rest, key=lambda p: (min((distance(p, q) for q in others[p]), default=0.0), -p)))
    return chosen + [p for p in tokens if p not in chosen]


def even_runs(tokens: list[int], count: int) -> list[list[int]]:
    """Tokens in so many runs of lengths that differ by one at most."""
    bounds = [i * len(tokens) // count for i in range(count + 1)] if count else [0]
    return [tokens[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def kept_count(stage: Any, original: int) -> int:
    """Round half up of the original count, at least one unless the ratio is 0."""
    if stage.keep_count is not None:
        return stage.keep_count
    return ratio_count(stage.keep_ratio, original)


def ratio_count(ratio: float, original: int) -> int:
    """Round half up, at least one unless the ratio is 0."""
    return 0 if ratio == 0 else max(1, math.floor(Fraction(str(ratio)) * original + Fraction(1, 2)))


def mass_count(keep: Any, scores: dict[int, float], protected: list[int], original: int) -> int:
    """Tokens from the most important on until their share of all scores is reached, within the bounds."""
    order = sorted(scores, key=lambda p: (p not in protected, -scores[p], p))
    held, reached = 0.0, 0
    while reached < len(order) and (reached == 0 or held < keep.mass * sum(scores.values())):
        held += scores[order[reached]]
        reached += 1
    bounded = min(max(reached, ratio_count(keep.at_least, original)), ratio_count(keep.at_most, original))
    return max(bounded, len(protected))


def naive_scores(criterion: str, weights: Tensor, image: list[int], text: list[int], count: int) -> dict[int, float]:
    """Image token -> importance."""
    if criterion == "first-k":
        return {p: -p for p in image}
    if criterion == "stride":
        n = len(image)
        return {p: float((i + 1) * count // n > i * count // n) for i, p in enumerate(image)}
    if criterion == "image_debiased":
        return {p: sum(float(weights[row, p]) for row in image) / sum(row >= p for row in image) for p in image}
    rows = {"instruction": text, "sparsevlm": text, "last_token": text[-1:], "image": image, "image_stratified": image}[
        criterion
    ]
    return {p: sum(float(weights[row, p]) for row in rows) for p in image}


def naive_logits(model: LlavaForConditionalGeneration, hidden: Tensor) -> Tensor:
    """(..., D) -> (..., vocabulary)."""
    return model.lm_head(hidden)


def naive_loss(model: LlavaForConditionalGeneration, hidden: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the supervised positions, each predicted by the row before it."""
    terms = [
        -naive_logits(model, hidden[b, p - 1]).log_softmax(dim=-1)[labels[b, p]]
        for b in range(len(labels))
        for p in range(1, labels.shape[1])
        if int(labels[b, p]) != -100
    ]
    return torch.stack(terms).mean()


def naive_generate(model: LlavaForConditionalGeneration, schedule: Any, inputs: dict[str, Any], steps: int) -> Tensor:
    """Greedy continuation (B, steps); every step runs the whole sequence again with the prompt's choice."""
    ids, mask, prompt = inputs["input_ids"], inputs["attention_mask"], inputs["input_ids"].shape[1]
    for _ in range(steps):
        with torch.no_grad():
            out = naive_forward(model, schedule, ids, mask, inputs.get("image_features"), prompt=prompt)
        ids = torch.cat([ids, naive_logits(model, out.hidden[:, -1]).argmax(dim=-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids[:, prompt:]
