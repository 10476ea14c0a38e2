"""Knock-outs: what the answers lose where a window of layers cannot take something from something else.

A cut takes pairs out of the attention of every layer of a window; a token always sees itself. Of its controls one takes
as many from each row, drawn at random from all that the row sees: where it sees little beside the image the two are
much the same, and how much is told. The other takes the image from as many rows, drawn from all that see an image
token (IMG2RND in HiMAP's section 3). Answers are teacher-forced: one is right where every token of it is the most
likely one, which is where greedy decoding says it word for word; and it is consistent where every token is the one that
the whole model says.

Shapes: B rows, L columns, H heads, D head width, 4 kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import repeat_kv

from himap_train.analysis.pairs import ANSWER, IMAGE, INSTRUCTION, kinds_of, softmax_attention, visible_pairs
from himap_train.data.encode import IGNORED
from himap_train.evaluation.answering import evaluation_mode
from himap_train.evaluation.samples import EncodedBatch, EncodedSamples
from himap_train.models.install import install_pruning
from himap_train.models.stock import base_model
from himap_train.pruning.schedule import PruningSchedule

CUTS = {
    "image-to-text": "",
    "image-to-image": "",
    "random-to-text": "image-to-text",
    "random-to-image": "image-to-image",
    "image-to-random": "image-to-text",
}
"""What is taken from what, and whose control it is."""


@dataclass(frozen=True)
class KnockedOut:
    """One cut in one window, over all samples.

    Attributes:
        cut: One of CUTS; "none" for the whole model.
        layers: The window.
        right: (samples,) bool.
        consistent: (samples,) bool.
        pairs: Taken from a sample, mean.
        overlap: Of a control: share of its pairs that its cut takes too; 0 of others.
    """

    cut: str
    layers: range
    right: Tensor
    consistent: Tensor
    pairs: float
    overlap: float

    @property
    def accuracy(self) -> float:
        """Share of the samples that are right."""
        return float(self.right.float().mean())


def windows(num_layers: int, width: int) -> list[range]:
    """Windows of `width` layers, each half its width behind the one before, and last the whole decoder.

    Raises:
        ValueError: No such width.
    """
    if not 1 <= width <= num_layers:
        raise ValueError(f"windows of {width} layers in a decoder of {num_layers}: give 1 to {num_layers}")
    starts = [*range(0, num_layers - width, max(width // 2, 1)), num_layers - width]
    return list(dict.fromkeys([*(range(start, start + width) for start in starts), range(num_layers)]))


def passes(layers: list[range]) -> int:
    """How often `knock_out` runs each batch."""
    return 1 + len(CUTS) * len(layers)


def knock_out(
    model: nn.Module,
    samples: EncodedSamples,
    layers: list[range],
    renormalise: bool = True,
    seed: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> list[KnockedOut]:
    """The whole model, then every cut in every window.

    Args:
        model: Of a known family, or a PeftModel around one; is dense afterwards.
        samples: From `read_samples`.
        layers: The windows.
        renormalise: Pairs that are left share what a cut takes, as with removed tokens (minus infinity before the
            softmax, as in the published code); otherwise it is lost (0 behind the softmax, as the paper has it).
        seed: Of the controls.
        advance: Called with 1 after each pass over a batch.
    """
    install_pruning(model, PruningSchedule())
    plan = [("none", range(0)), *((cut, window) for cut in CUTS for window in layers)]
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in plan]
    with evaluation_mode(model):
        for number, batch in enumerate(samples.batches):
            visible = visible_pairs(model, batch)
            taken = cut_pairs(kinds_of(model, batch), visible, torch.Generator().manual_seed(seed + number))
            whole = predicted(model, batch)
            for results, (cut, window) in zip(found, plan, strict=True):
                said = predicted(model, batch, Cut(visible & ~taken[cut], visible, window, renormalise))
                numbers = torch.stack([taken[cut].sum(), (taken[cut] & taken[CUTS.get(cut) or "none"]).sum()]).cpu()
                right, consistent = (_whole_rows(said, expected) for expected in (batch.labels[:, 1:], whole))
                results.append((right, consistent, numbers))
                advance(1)
    return [_joined(*entry, results) for entry, results in zip(plan, found, strict=True)]


def _joined(cut: str, window: range, results: list[tuple[Tensor, Tensor, Tensor]]) -> KnockedOut:
    right, consistent = (torch.cat([result[part] for result in results]) for part in (0, 1))
    pairs, both = torch.stack([numbers for _, _, numbers in results]).sum(0).tolist()
    return KnockedOut(cut, window, right, consistent, pairs / len(right), both / max(pairs, 1))


def cut_pairs(kinds: Tensor, visible: Tensor, draws: torch.Generator) -> dict[str, Tensor]:
    """The pairs that each cut takes, (B, L, L) bool: rows take, columns give.

    Args:
        kinds: (B, 4, L).
        visible: (B, L, L) bool.
        draws: On the CPU, for the controls.
    """
    image, text = kinds[:, IMAGE].bool(), (kinds[:, INSTRUCTION] + kinds[:, ANSWER]).bool()
    others = visible & ~torch.eye(visible.shape[1], dtype=torch.bool, device=visible.device)
    of_image = others & image.unsqueeze(1)
    to_text, to_image = of_image & text.unsqueeze(2), of_image & image.unsqueeze(2)
    reading = to_text.any(2).sum(1, keepdim=True)
    return {
        "none": torch.zeros_like(others),
        "image-to-text": to_text,
        "image-to-image": to_image,
        "random-to-text": _drawn(others, to_text.sum(2, keepdim=True), draws),
        "random-to-image": _drawn(others, to_image.sum(2, keepdim=True), draws),
        "image-to-random": of_image & _drawn(of_image.any(2), reading, draws).unsqueeze(2),
    }


def _drawn(among: Tensor, number: Tensor, draws: torch.Generator) -> Tensor:
    """As many of `among` (..., L) bool as `number` (..., 1) says, at random."""
    order = torch.rand(among.shape, generator=draws).to(among.device).masked_fill(~among, -1.0)
    return order.argsort(-1, descending=True).argsort(-1) < number


class Cut:
    """Attention of a window of layers on fewer pairs, as `own_attention`; other layers are left alone.

    Args:
        kept: (B, L, L) bool, the pairs that are left.
        visible: (B, L, L) bool, those that there were.
        window: The layers.
        renormalise: As in `knock_out`.
    """

    def __init__(self, kept: Tensor, visible: Tensor, window: range, renormalise: bool) -> None:
        self.kept, self.visible, self.window, self.renormalise = kept, visible, window, renormalise

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor | None:
        """As `OwnAttention`."""
        if layer not in self.window:
            return None
        share = query.shape[1] // key.shape[1]
        keys, values, kept = repeat_kv(key, share), repeat_kv(value, share), self.kept.unsqueeze(1)
        if self.renormalise:
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=kept, scale=scaling)
        weights = softmax_attention(query.float(), keys.float(), scaling, self.visible) * kept
        return weights.to(values.dtype) @ values


def predicted(model: nn.Module, batch: EncodedBatch, own_attention: Cut | None = None) -> Tensor:
    """The most likely token behind each position before a supervised one, (B, L - 1) long; elsewhere -100."""
    hidden, supervised = batch.states(model, own_attention)[:, :-1], batch.labels[:, 1:] != IGNORED
    said = torch.full_like(batch.labels[:, 1:], IGNORED)
    said[supervised] = base_model(model).lm_head(hidden[supervised]).argmax(-1)
    return said


def _whole_rows(said: Tensor, expected: Tensor) -> Tensor:
    """Rows where both agree everywhere, (B,) bool on the CPU."""
    return (said == expected).all(1).cpu()
