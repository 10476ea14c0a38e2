"""Attention that hands the ranking rows to a collector and then runs the stock kernel.

The scores are read from the queries and keys that the layer itself computes, so LoRA, rotary embedding, per-head norms,
ZeRO-3 and quantised weights are in them, no projection runs twice and no attention map of the whole sequence exists.
transformers looks attention functions up by name: ours are registered under `himap_<stock name>`, always together with
the stock mask function, because a name without one means no mask at all.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, flash_attention_mask, sdpa_mask
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from himap_train.models.cpu_attention import CausalBlocks, runs_in_blocks
from himap_train.pruning.layout import TokenCounts, TokenLayout
from himap_train.pruning.learned.marginal import HIDDEN, Marginal, shadow_gain
from himap_train.pruning.methods.attention import attention_blocks
from himap_train.pruning.methods.base import Method, Reads, Seen, with_scores
from himap_train.pruning.stage import LOOKS, PruningStage

PREFIX = "himap_"
AttentionResult = tuple[Tensor, Tensor | None]
OwnAttention = Callable[[int, Tensor, Tensor, Tensor, float], Tensor | None]
"""What may take the kernel's place in an analysis, and build its own mask: of a layer's number, its (B, H, L, D)
queries, (B, K, L, D) keys and values and the scaling of the logits it gives (B, H, L, D), or None to leave it alone.
"""


class ScoreCollector:
    """Shows the layer that it is passed to, the one before a stage, to that stage's method.

    One object for one call of one layer. Where gradient checkpointing runs that layer again, the scores have been taken
    and are not computed a second time.
    """

    def __init__(
        self, stage: PruningStage, layout: TokenLayout, counts: TokenCounts, states: Tensor | None = None
    ) -> None:
        self.stage = stage
        self._given = Seen(layout, counts, states=states)
        self._seen: Seen | None = None

    def collect(self, query: Tensor, key: Tensor, scaling: float) -> None:
        """Read (B, H, L, D) queries and (B, K, L, D) keys with the rotary embedding applied."""
        if self._seen is not None:
            return
        method, shown = self.stage.method, self._given
        with unrounded(query):
            if self.stage.waits:
                looks = LOOKS.score(_with_attention(LOOKS, shown, query, key, scaling))
                shown = replace(shown, looks=looks)
            if self.stage.ranks_before and method.reads is Reads.ATTENTION:
                shown = with_scores(method, _with_attention(method, shown, query, key, scaling))
            elif self.stage.ranks_before:
                shown = with_scores(method, replace(shown, keys=key.detach()))
        self._seen = shown

    def seen(self) -> Seen:
        """What the method has seen, with its scores.

        Raises:
            RuntimeError: If the layer never called the attention function.
        """
        if self._seen is None:
            raise RuntimeError(
                f"layer {self.stage.layer - 1} did not report its attention to the stage at layer {self.stage.layer}; "
                "its attention function was replaced: call install_pruning again"
            )
        return self._seen


@contextmanager
def unrounded(tokens: Tensor) -> Iterator[None]:
    """Inside, where tokens are chosen, no gradient is recorded, and autocast rounds nothing: by cosines in bfloat16
    other tokens stay than at inference.
    """
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        yield


def _with_attention(method: Method, given: Seen, query: Tensor, key: Tensor, scaling: float) -> Seen:
    """With the rows of attention that a method asks for."""
    rows = method.rows(given.layout, given.counts)
    blocks = attention_blocks(query, key, rows.index, given.layout.valid, scaling, rows.fewest)
    return replace(given, rows=rows, attention=blocks)


def _flash_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> AttentionResult:
    """FlashAttention 2 by its own name: the stock wrapper takes the name from the config, where ours stands."""
    out = _flash_attention_forward(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attention_mask,
        query_length=query.shape[2],
        is_causal=True,
        dropout=dropout,
        softmax_scale=scaling,
        sliding_window=sliding_window,
        target_dtype=get_target_dtype(query, module),
        attn_implementation="flash_attention_2",
    )
    return out, None


# Llama, Mistral and Qwen2 have the same eager function, each in its own file.
_STOCK: dict[str, tuple[Callable[..., AttentionResult], Callable[..., Tensor | None]]] = {
    "sdpa": (sdpa_attention_forward, sdpa_mask),
    "eager": (eager_attention_forward, eager_mask),
    "flash_attention_2": (_flash_attention, flash_attention_mask),
}
ATTENTION_IMPLEMENTATIONS = tuple(_STOCK)


def _attend_marginally(
    attend: Callable[..., AttentionResult],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    marginal: Marginal,
    scaling: float,
) -> AttentionResult:
    """Attention through any kernel, with a derivative by the presence of the marginal tokens; see `pruning.marginal`.

    Heads are 8 wider: a query has a constant 1 there and a key its bias, so the logits are `scaling * q k + bias`. The
    values have a column that only shadows fill, which tells how much attention they would take.

    Args:
        attend: Attention of query, key and value.
        query: (B, H, L, D).
        key: (B, K, L, D).
        value: (B, K, L, D).
        marginal: At these L tokens.
        scaling: What the kernel multiplies the logits with.
    """
    width = value.shape[3]
    one = torch.nn.functional.pad(query.new_ones(1), (0, 7)).expand(*query.shape[:3], 8)
    biases = _columns((marginal.bias / scaling).to(key.dtype), key.shape[1])
    held = _columns(marginal.shadow.to(value.dtype) * math.exp(-HIDDEN), value.shape[1])
    wider = (torch.cat(pair, dim=3) for pair in ((query, one), (key, biases), (value, held)))
    out, weights = attend(*wider)
    out, held = out[..., :width], out[..., width : width + 1].detach()
    if int(marginal.shadows.max()):
        out = out + shadow_gain(out, held, query.detach(), key.detach(), value.detach(), marginal, scaling)
    return out, weights


def _columns(first: Tensor, heads: int) -> Tensor:
    """(B, L) as the first of 8 columns, the others zero: (B, heads, L, 8)."""
    return torch.nn.functional.pad(first.unsqueeze(2), (0, 7)).unsqueeze(1).expand(-1, heads, -1, -1)


@cache
def register_attention(name: str) -> str:
    """Make the collecting twin of a stock attention function known to transformers, and return its name.

    Raises:
        ValueError: If there is no twin for it.
    """
    if name not in _STOCK:
        raise ValueError(
            f"attention implementation {name!r} cannot be pruned; load the model with attn_implementation="
            f"one of {', '.join(ATTENTION_IMPLEMENTATIONS)}"
        )
    forward, mask = _STOCK[name]
    by_place = [parameter.name for parameter in inspect.signature(forward).parameters.values()][5:]

    def collecting_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *more: Any,
        score_collector: ScoreCollector | None = None,
        causal_blocks: CausalBlocks | None = None,
        marginal: Marginal | None = None,
        own_attention: OwnAttention | None = None,
        **kwargs: Any,
    ) -> AttentionResult:
        kwargs |= dict(zip(by_place, more, strict=False))  # as the stock function names them, `dropout` first in sdpa's
        scaling = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
        if score_collector is not None:
            score_collector.collect(query, key, scaling)
        if own_attention is not None:
            own = own_attention(int(module.layer_idx), query, key, value, scaling)  # type: ignore[arg-type]
            if own is not None:
                return own.transpose(1, 2), None
        if marginal is not None:
            same = partial(collecting_attention, module, attention_mask=attention_mask, causal_blocks=causal_blocks)
            return _attend_marginally(partial(same, **kwargs), query, key, value, marginal, scaling)
        if causal_blocks and name == "sdpa" and runs_in_blocks(query, key, attention_mask, kwargs.get("dropout", 0.0)):
            return causal_blocks.attend(query, key, value, scaling), None
        return forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(PREFIX + name, collecting_attention)
    AttentionMaskInterface.register(PREFIX + name, mask)
    return PREFIX + name
