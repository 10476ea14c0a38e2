"""Inter-layer information flow: from which layer on which tokens have taken from the image what they take.

HiMAP (CVPR 2025, section 3) finds that shallow layers carry what the image says into the instruction and deeper ones
mix it among the image tokens, and prunes behind each of the two. It measures that by saliency, which needs gradients;
here it is the attention itself: of the instruction's rows the mean share that goes to image tokens, and of the image's
rows that which goes to other image tokens. One dense pass reads both at every layer.

Shapes: B rows, L columns, R ranking rows, H heads, K key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from himap_train.evaluation.answering import evaluation_mode
from himap_train.models.families import family_of
from himap_train.models.install import install_pruning
from himap_train.models.stock import base_model
from himap_train.pruning.layout import build_layout
from himap_train.pruning.methods.attention import attention_blocks
from himap_train.pruning.methods.base import RankingRows
from himap_train.pruning.methods.image import ByImage
from himap_train.pruning.methods.instruction import Instruction
from himap_train.pruning.schedule import PruningSchedule
from himap_train.search.samples import EncodedBatch, SearchSamples
from himap_train.search.space import Point, Space

HANDED_OVER = 0.5
"""Share of a flow's total over all layers behind which its stage stands."""
SPLIT = 0.25
"""What HiMAP's second stage keeps of what its first one kept."""


@dataclass(frozen=True)
class Flow:
    """Attention to image tokens at every layer, mean over samples and rows, 0 to 1.

    Attributes:
        instruction: From the prompt's text behind the image.
        image: From other image tokens.
    """

    instruction: tuple[float, ...]
    image: tuple[float, ...]


class FlowCollector:
    """Takes the place of a `ScoreCollector` at every layer of one dense forward of a batch.

    Args:
        rows: The ranking rows of the instruction and of the image.
        image: (B, L) bool, image tokens.
        valid: (B, L) bool, not padding.
    """

    def __init__(self, rows: Sequence[RankingRows], image: Tensor, valid: Tensor) -> None:
        self.rows, self.image, self.valid = rows, image, valid
        self.layers: list[list[float]] = []

    def collect(self, query: Tensor, key: Tensor, scaling: float) -> None:
        """One layer's (B, H, L, D) queries and (B, K, L, D) keys: for each kind of rows the sum over the batch."""
        self.layers.append([float(self._share(query, key, scaling, rows)) for rows in self.rows])

    def _share(self, query: Tensor, key: Tensor, scaling: float, rows: RankingRows) -> Tensor:
        total = torch.zeros(len(query), device=query.device)
        columns = torch.arange(query.shape[2], device=query.device)
        for part, attention in attention_blocks(query, key, rows.index, self.valid, scaling, rows.fewest):
            seen = attention.shape[2]
            others = columns[:seen] != rows.index[:, part].unsqueeze(2)
            source = rows.may_rank[:, part, :seen] & self.image[:, None, :seen] & others
            total += (attention * source).sum((1, 2))
        return (total / rows.may_rank.any(2).sum(1).clamp(min=1)).sum()


def information_flow(model: nn.Module, samples: SearchSamples) -> Flow:
    """The flow on samples, from one dense pass over each batch.

    Args:
        model: LLaVA or PeftModel around one; is dense afterwards.
        samples: From `read_samples`.
    """
    install_pruning(model, PruningSchedule())
    totals: Any = 0
    with evaluation_mode(model):
        for batch in samples.batches:
            totals = totals + torch.tensor(_layers(base_model(model), batch), dtype=torch.float64)
    instruction, image = (totals / samples.count).T.tolist()
    return Flow(tuple(instruction), tuple(image))


def _layers(base: Any, batch: EncodedBatch) -> list[list[float]]:
    ids, mask = batch.texts["input_ids"], batch.texts["attention_mask"]
    layout, counts = build_layout(ids == base.config.image_token_id, mask, batch.labels != -100)
    rows = [method.rows(layout, counts) for method in (Instruction(), ByImage())]
    collector = FlowCollector(rows, layout.image, layout.valid)
    base.model(
        input_ids=ids,
        attention_mask=mask,
        mm_encoder_outputs={"image": batch.encoded},
        **family_of(base).forward_inputs(base.config, ids, batch.sizes),
        **batch.sizes,
        use_cache=False,
        score_collector=collector,
    )
    return collector.layers


def handed_over(flow: Sequence[float], share: float = HANDED_OVER) -> int:
    """The first layer, 1 or more, before which at least this share of a flow's total has gone over."""
    total = sum(flow)
    before = accumulate(flow)  # its entry l is what layers 0 to l have carried, so what stands before layer l + 1
    return next((layer for layer, done in enumerate(before, start=1) if done >= share * total), len(flow))


def suggest(flow: Flow, space: Space) -> Point:
    """Layers from the flow: the first stage behind the instruction's, the others behind the image's.

    Further stages divide what the image's flow still carries into equal parts. A layer that the budget or the decoder
    has no room for becomes the nearest one that they have.
    """
    room = space.num_layers - space.stages  # each later stage needs a layer of its own behind
    layers = [min(handed_over(flow.instruction), space.deepest_first, room)]
    for number in range(1, space.stages):
        share = HANDED_OVER + (1 - HANDED_OVER) * (number - 1) / (space.stages - 1)
        wanted = max(handed_over(flow.image, share), layers[-1] + 1)
        layers.append(min(wanted, room + number))
    return space.point(layers, [SPLIT] * (space.stages - 1))
