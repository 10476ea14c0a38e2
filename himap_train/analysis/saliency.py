"""Saliency of the attention: how much the loss on the answer leans on what each token takes from each other one.

I(i, j) = |sum over heads of A * dL/dA|, what flows from token j to token i in a layer (HiMAP, CVPR 2025, Eq. 1; L is
the mean cross-entropy of a sample's answer). Of each layer the maps exist only while its own backward runs, a group of
heads at a time, and layers are computed again in the backward pass; the weights get no gradient. What is kept are sums
over pairs of kinds of tokens. The published code computes something else: |A * A * dL/dA|, averaged over heads.

Shapes: B rows, L columns, H heads, K key-value heads, D head width, N layers, 4 kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import repeat_kv

from himap_train.analysis.pairs import ANSWER, IMAGE, INSTRUCTION, kinds_of, softmax_attention, visible_pairs
from himap_train.data.encode import IGNORED
from himap_train.evaluation.answering import evaluation_mode
from himap_train.evaluation.samples import EncodedBatch, EncodedSamples
from himap_train.models.install import install_pruning
from himap_train.models.stock import base_model, text_decoder
from himap_train.pruning.schedule import PruningSchedule

Formula = Literal["paper", "published-code"]


@dataclass(frozen=True)
class SampleFlow:
    """What flows in one sample: `[l, t, s]` is layer l, from tokens of kind s to those of kind t.

    Attributes:
        id: Of the record.
        meta: Its facts.
        tokens: (4,) tokens of each kind.
        pairs: (4, 4) pairs of which the target sees the source, itself included.
        saliency: (N, 4, 4) sum over pairs.
        attention: (N, 4, 4) sum over pairs of the attention weight, mean over heads.
        own: (N, 2, 4) of both the part from tokens of a kind to themselves.
        image_to_text: (N, image tokens) what each image token gives to text.
    """

    id: str
    meta: dict[str, str]
    tokens: Tensor
    pairs: Tensor
    saliency: Tensor
    attention: Tensor
    own: Tensor
    image_to_text: Tensor


def measure(
    model: nn.Module,
    samples: EncodedSamples,
    formula: Formula = "paper",
    advance: Callable[[int], None] = lambda count: None,
) -> list[SampleFlow]:
    """The flow in every sample, from one forward and one backward pass over each batch.

    Args:
        model: Of a known family, or a PeftModel around one; is dense afterwards.
        samples: From `read_samples`.
        formula: "paper", or what the published code computes instead.
        advance: Called with the number of samples that are done.

    Raises:
        ValueError: Samples are longer than the decoder's sliding window.
    """
    install_pruning(model, PruningSchedule())
    flows: list[SampleFlow] = []
    with evaluation_mode(model), _replayed(model):
        for batch in samples.batches:
            flows += _of_batch(model, batch, formula)
            advance(len(batch.ids))
    return flows


def _of_batch(model: nn.Module, batch: EncodedBatch, formula: Formula) -> list[SampleFlow]:
    kinds, visible = kinds_of(model, batch), visible_pairs(model, batch)
    observer = _Observer(kinds, visible, formula)
    with torch.enable_grad():
        loss = answer_losses(base_model(model), batch.states(model, observer), batch.labels).sum()
        torch.autograd.grad(loss, observer.start)
    pairs = (kinds @ visible.to(kinds.dtype) @ kinds.mT).double().cpu()
    by_layer = (observer.layers[layer] for layer in sorted(observer.layers))
    found = [torch.stack(parts, 1).double().cpu() for parts in zip(*by_layer, strict=True)]
    saliency, attention, own, given = found
    kinds = kinds.double().cpu()
    return [
        SampleFlow(name, meta, kinds[i].sum(1), pairs[i], saliency[i], attention[i], own[i], given[i][:, image])
        for i, (name, meta, image) in enumerate(zip(batch.ids, batch.meta, kinds[:, IMAGE].bool(), strict=True))
    ]


def answer_losses(base: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each supervised token, divided by how many its row has: they sum to the rows' means."""
    targets = labels[:, 1:]
    supervised = targets != IGNORED
    share = (supervised / supervised.sum(1, keepdim=True))[supervised]
    return (
        F.cross_entropy(_wide(base.lm_head(hidden[:, :-1][supervised])), targets[supervised], reduction="none") * share
    )


def _wide(values: Tensor) -> Tensor:
    """In fp32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class _Observer:
    """Computes the attention of every layer, and in its backward pass sums up what flows.

    Args:
        kinds: (B, 4, L).
        visible: (B, L, L) bool.
        formula: Of the saliency.
    """

    def __init__(self, kinds: Tensor, visible: Tensor, formula: Formula) -> None:
        self.kinds, self.visible, self.formula = kinds, visible, formula
        self.start: list[Tensor] = []
        self.layers: dict[int, tuple[Tensor, ...]] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        if not query.requires_grad:  # the first layer's, where the graph begins: no weight asks for a gradient
            query.requires_grad_()
            self.start = self.start or [query]
        out: Tensor = _Attention.apply(query, key, value, self, layer, scaling)
        return out

    def saliency(self, weights: Tensor, gradient: Tensor) -> Tensor:
        """Sum over some heads, (B, L, L), of the attention (B, H, L, L) and the gradient of the loss by it."""
        if self.formula == "paper":
            return (weights * gradient).sum(1)
        return (weights * weights * gradient).abs().sum(1)

    def observe(self, layer: int, saliency: Tensor, attention: Tensor, heads: int) -> None:
        """Take the sums over all heads of a layer, (B, L, L)."""
        saliency = saliency.abs() if self.formula == "paper" else saliency / heads
        kinds, both = self.kinds.to(saliency.dtype), torch.stack([saliency, attention / heads], 1)
        own = both.diagonal(dim1=2, dim2=3) @ kinds.mT
        by_kind, text = kinds.unsqueeze(1) @ both @ kinds.mT.unsqueeze(1), kinds[:, (INSTRUCTION, ANSWER)].sum(1)
        self.layers[layer] = *by_kind.unbind(1), own, (text.unsqueeze(1) @ saliency).squeeze(1)


class _Attention(torch.autograd.Function):
    """Attention through the fused kernel whose backward makes the weights again and shows them with their gradient."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, observer: _Observer, layer: int, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.given = observer, layer, scaling
        share, mask = query.shape[1] // key.shape[1], observer.visible.unsqueeze(1)
        keys, values = repeat_kv(key, share), repeat_kv(value, share)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        observer, layer, scaling = ctx.given
        query, key, value = ctx.saved_tensors
        share = query.shape[1] // key.shape[1]
        found: list[tuple[Tensor, ...]] = []
        saliency, attention = torch.zeros((), device=query.device), torch.zeros((), device=query.device)
        for number, (queries, given) in enumerate(zip(query.split(share, 1), gradient.split(share, 1), strict=True)):
            group = queries, key[:, number : number + 1], value[:, number : number + 1]
            with torch.enable_grad():
                q, k, v = (_wide(part.detach()).requires_grad_() for part in group)
                weights = softmax_attention(q, k, scaling, observer.visible)
                out = weights @ v
            by_weights, *by_group = torch.autograd.grad(out, (weights, q, k, v), _wide(given))
            weights = weights.detach()
            saliency = saliency + observer.saliency(weights, by_weights)
            attention = attention + weights.sum(1)
            found.append(tuple(part.to(query.dtype) for part in by_group))
        observer.observe(layer, saliency, attention, query.shape[1])
        return *(torch.cat(parts, 1) for parts in zip(*found, strict=True)), None, None, None


@contextmanager
def _replayed(model: nn.Module) -> Iterator[None]:
    """No weight asks for a gradient inside, and layers are computed again in the backward pass."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    layers = list(text_decoder(model).layers)
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for weight in trained:
            weight.requires_grad_(False)
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)
        for layer, found in zip(layers, before, strict=True):
            del layer.forward
            if found is not None:
                layer.forward = found
