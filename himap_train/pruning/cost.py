"""FLOPs, KV-cache bytes and token counts of a schedule: the only such formula in the project.

One decoder layer over t tokens (hidden width d, gated MLP of width m, g = key-value heads / heads) costs
`(2 + 2 g) t d^2 + 2 t^2 d + 3 t d m` multiply-adds; FLOPs are twice that. Attention is counted in full, as kernels and
PyTorch's counter do, although half of it is masked: `causal` leaves that half out.

The HiMAP paper (Eq. 10) counts image tokens alone and an ungated MLP, `4 n d^2 + 2 n^2 d + 2 n d m`, and calls
multiply-adds FLOPs; `image_only_flops_ratio` is that ratio, for comparison with published tables.

What choosing the tokens costs, each method says of itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from himap_train.pruning.methods.base import Widths

if TYPE_CHECKING:
    from himap_train.pruning.schedule import PruningSchedule
    from himap_train.pruning.stage import PruningStage


@dataclass(frozen=True)
class Cost:
    """Cost of one sample's prefill, and of the cache that it leaves.

    Attributes:
        flops: Whole decoder, text tokens and ranking included, `lm_head` left out.
        dense_flops: The same without pruning.
        flops_ratio: `flops / dense_flops`.
        image_only_flops_ratio: The paper's Eq. 10, image tokens alone.
        kv_bytes: Keys and values of all layers after the prefill.
        kv_bytes_ratio: Against the dense cache.
        image_tokens_per_layer: Image tokens that each layer runs on.
        upper_bound: Whether a stage keeps by attention mass or waits, so that samples cost this or less.
    """

    flops: float
    dense_flops: float
    flops_ratio: float
    image_only_flops_ratio: float
    kv_bytes: int
    kv_bytes_ratio: float
    image_tokens_per_layer: tuple[int, ...]
    upper_bound: bool = False


def image_tokens_per_layer(
    schedule: PruningSchedule, num_layers: int, image_tokens: int, kept: Sequence[int] | None = None
) -> tuple[int, ...]:
    """How many image tokens each layer runs on.

    Args:
        schedule: What is removed where.
        num_layers: Layers of the decoder.
        image_tokens: Image tokens of the sample.
        kept: Image tokens that each stage was seen to leave. None takes what the schedule says, which is the most that
            may stay where a stage keeps by attention mass or waits.
    """
    if kept is None:
        kept = [int(stage.most(torch.tensor(image_tokens))) for stage in schedule.stages]
    stays = {stage.layer: count for stage, count in zip(schedule.stages, kept, strict=True)}
    current, per_layer = image_tokens, []
    for layer in range(num_layers):
        current = min(stays.get(layer, current), current)
        per_layer.append(current if layer >= schedule.enter else 0)
    return tuple(per_layer)


def schedule_cost(
    schedule: PruningSchedule,
    config: Any,
    image_tokens: int = 576,
    text_tokens: int = 115,
    bytes_per_value: int | None = None,
    kept: Sequence[int] | None = None,
    causal: bool = False,
) -> Cost:
    """Cost of a schedule on a model.

    Where a stage keeps by attention mass or waits the number of tokens follows each sample: without `kept` the cost is
    then that of the most that may stay, an upper bound.

    Args:
        schedule: What is removed where.
        config: Hugging Face configuration of a LLaVA or of a Llama-like text decoder.
        image_tokens: Image tokens of the sample.
        text_tokens: All other tokens; the ranking rows of `instruction` are taken to be all of them (an upper bound).
        bytes_per_value: Size of a number in the cache; None takes the config's dtype, or 2 where it names none.
        kept: Image tokens that each stage was seen to leave of this sample, for its measured cost.
        causal: Leave the masked half of attention out of the FLOPs (not of the paper's).

    Raises:
        ValueError: If a stage lies outside the decoder.
    """
    config = getattr(config, "text_config", config)
    schedule.validate_for(config.num_hidden_layers)
    layers = image_tokens_per_layer(schedule, config.num_hidden_layers, image_tokens, kept)
    dense = (image_tokens,) * config.num_hidden_layers
    flops = sum(layer_flops(config, n + text_tokens, causal) for n in layers)
    flops += choosing_flops(schedule, config, layers, image_tokens, text_tokens)
    dense_flops = sum(layer_flops(config, n + text_tokens, causal) for n in dense)
    paper_dense = sum(_paper_macs(config, n) for n in dense)
    if bytes_per_value is None:
        dtype = getattr(config, "dtype", None)
        bytes_per_value = dtype.itemsize if isinstance(dtype, torch.dtype) else 2
    per_token = 2 * kv_width(config) * bytes_per_value
    kv_bytes, dense_kv_bytes = (per_token * sum(n + text_tokens for n in counts) for counts in (layers, dense))
    return Cost(
        flops=flops,
        dense_flops=dense_flops,
        flops_ratio=flops / dense_flops,
        image_only_flops_ratio=sum(_paper_macs(config, n) for n in layers) / paper_dense if paper_dense else 1.0,
        kv_bytes=kv_bytes,
        kv_bytes_ratio=kv_bytes / dense_kv_bytes,
        image_tokens_per_layer=layers,
        upper_bound=schedule.by_sample and kept is None,
    )


def layer_flops(config: Any, tokens: float, causal: bool = False) -> float:
    """FLOPs (two per multiply-add) of one decoder layer over `tokens` tokens."""
    return linear_flops(config, tokens) + attention_flops(config, tokens, causal)


def linear_flops(config: Any, tokens: float) -> float:
    """Projections and gated MLP of one decoder layer."""
    width, heads = config.hidden_size, config.num_attention_heads * head_width(config)
    projections = (2 * heads + 2 * kv_width(config)) * tokens * width
    return 2.0 * (projections + 3 * tokens * width * config.intermediate_size)


def attention_flops(config: Any, tokens: float, causal: bool = False) -> float:
    """Scores and their product with the values; `causal` counts the (tokens + 1) / 2 keys that a row sees."""
    keys = (tokens + 1) / 2 if causal else tokens
    return 4.0 * tokens * keys * config.num_attention_heads * head_width(config)


def choosing_flops(
    schedule: PruningSchedule, config: Any, layers: Sequence[int], image_tokens: int, text_tokens: int
) -> float:
    """What choosing the tokens costs at all stages, of one sample; `layers` from `image_tokens_per_layer`."""
    text = getattr(config, "text_config", config)
    total = 0.0
    for stage in schedule.stages:
        before = tokens_before(schedule, stage, layers, image_tokens)
        total += stage.flops(widths(text), before, text_tokens, layers[stage.layer])
    return total


def tokens_before(schedule: PruningSchedule, stage: PruningStage, layers: Sequence[int], image_tokens: int) -> int:
    """Image tokens that a stage chooses from; `layers` from `image_tokens_per_layer`."""
    return image_tokens if stage.layer == schedule.enter else layers[stage.layer - 1]


def widths(config: Any) -> Widths:
    """What the cost of a method depends on, of a decoder's config."""
    heads = config.num_attention_heads
    return Widths(config.hidden_size, heads, heads * head_width(config), kv_width(config))


def _paper_macs(config: Any, n: int) -> int:
    width = config.hidden_size
    return 4 * n * width**2 + 2 * n**2 * width + 2 * n * width * config.intermediate_size


def head_width(config: Any) -> int:
    """Width of one attention head of a decoder."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_width(config: Any) -> int:
    """Width of a token's keys, and of its values."""
    return (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_width(config)
