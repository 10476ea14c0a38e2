"""The flows of HiMAP's section 3 by layer, question type and turn, under three normalisations, and what is zero why.

Normalisations: by the number of sources (as the paper's Eqs. 2 to 6 have it), by the number of pairs of which one token
sees the other, or not at all. Which one is chosen decides whether image tokens seem to matter: there are many of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from himap_train.analysis.knockout import KnockedOut
from himap_train.analysis.pairs import ANSWER, IMAGE, INSTRUCTION, KINDS, SYSTEM
from himap_train.analysis.saliency import Formula, SampleFlow

TEXT = (INSTRUCTION, ANSWER)
FLOWS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "S_vv": ((IMAGE,), (IMAGE,)),
    "S_vt": (TEXT, (IMAGE,)),
    "S_tv": ((IMAGE,), TEXT),
    "S_tt": (TEXT, TEXT),
    "S_sys": (KINDS, (SYSTEM,)),
    "S_img": (KINDS, (IMAGE,)),
    "S_ins": (KINDS, (INSTRUCTION,)),
}
"""Kinds that take and kinds that give; text is instruction and answer."""
OTHERS = "S_vv_others"
"""S_vv without what image tokens give to themselves."""
NORMALISATIONS = ("sources", "pairs", "none")
ALL = "all"


@dataclass(frozen=True)
class FlowRow:
    """One flow in one layer, means over the samples of a group that have it.

    Attributes:
        group: "all", "type where", "turn 2".
        layer: From 0.
        flow: One of FLOWS, or OTHERS.
        sources: Saliency a source.
        pairs: Saliency a pair.
        none: Saliency.
        attention: Share of their attention that the rows which take give to the sources.
        zero: Why it is zero, where it is: "no such tokens", "causality" (no row sees a source) or "last layer" (whose
            rows reach the loss only where they predict).
    """

    group: str
    layer: int
    flow: str
    sources: float
    pairs: float
    none: float
    attention: float
    zero: str


@dataclass(frozen=True)
class Concentration:
    """How few image tokens give what the image gives to text, mean over samples.

    Attributes:
        group: As in `FlowRow`.
        layer: From 0.
        tenth: Share that the tenth of the tokens gives which gives most; 0.1 where all give alike.
        effective: Share of the tokens that would give it evenly, exp(entropy) of them.
    """

    group: str
    layer: int
    tenth: float
    effective: float


@dataclass(frozen=True)
class CutRow:
    """What a group's answers are like where a window of layers is cut.

    Attributes:
        group: As in `FlowRow`.
        cut: As in `KnockedOut`.
        layers: "2 to 3"; "" where nothing is cut.
        samples: Of the group.
        accuracy: Share that is right.
        error: Its standard error.
        consistency: Share that is answered as by the whole model.
        pairs: Taken from a sample of any group in each layer, mean.
        overlap: As in `KnockedOut`, of all groups.
    """

    group: str
    cut: str
    layers: str
    samples: int
    accuracy: float
    error: float
    consistency: float
    pairs: float
    overlap: float


def grouped(flows: Sequence[SampleFlow]) -> dict[str, list[int]]:
    """Numbers of all samples, then of those of each type and of each turn where there are several."""
    groups = {ALL: list(range(len(flows)))}
    for fact in ("type", "turn"):
        facts = [flow.meta.get(fact) for flow in flows]
        values = sorted({value for value in facts if value})
        if len(values) > 1:
            groups |= {f"{fact} {v}": [number for number, value in enumerate(facts) if value == v] for v in values}
    return groups


def flow_rows(flows: Sequence[SampleFlow], formula: Formula = "paper") -> list[FlowRow]:
    """Every flow of every group and layer.

    Args:
        flows: From `measure`.
        formula: With "published-code" S_sys, S_img and S_ins are what the tokens of a kind take, as that code sums rows
            where the paper's Eqs. 2 to 4 sum columns.
    """
    rows: list[FlowRow] = []
    for group, numbers in grouped(flows).items():
        members = [flows[number] for number in numbers]
        for name in (*FLOWS, OTHERS):
            targets, sources = FLOWS[name.removesuffix("_others")]
            if formula == "published-code" and targets == KINDS:
                targets, sources = sources, targets
            parts = [_numbers(flow, targets, sources, others=name == OTHERS) for flow in members]
            means = torch.stack(parts).nanmean(0).tolist()  # (N, 4)
            pairs = sum(float(flow.pairs[targets, :][:, sources].sum()) for flow in members)
            tokens = all(any(flow.tokens[[*kinds]].any() for flow in members) for kinds in (targets, sources))
            for layer, (given, by_pair, plain, attention) in enumerate(means):
                zero = ""
                if not pairs:
                    zero = "causality" if tokens else "no such tokens"
                elif plain == 0 and layer == len(means) - 1:
                    zero = "last layer"
                rows.append(FlowRow(group, layer, name, given, by_pair, plain, attention, zero))
    return rows


def _numbers(flow: SampleFlow, targets: tuple[int, ...], sources: tuple[int, ...], others: bool) -> Tensor:
    """(N, 4): saliency under the three normalisations, and the share of attention; nan where there is none to share."""
    parts = torch.stack([flow.saliency, flow.attention])[:, :, targets][..., sources].sum((2, 3))  # (2, N)
    pairs = flow.pairs[targets, :][:, sources].sum()
    if others:
        parts, pairs = parts - flow.own[..., targets].sum(2).T, pairs - flow.tokens[[*targets]].sum()
    saliency, attention = parts
    given, taken = flow.tokens[[*sources]].sum(), flow.tokens[[*targets]].sum()
    return torch.stack([saliency / given, saliency / pairs, saliency, attention / taken], 1)


def concentrations(flows: Sequence[SampleFlow]) -> list[Concentration]:
    """Of every group and layer."""
    rows: list[Concentration] = []
    for group, numbers in grouped(flows).items():
        found = torch.stack([_concentration(flows[number].image_to_text) for number in numbers]).nanmean(0)  # (N, 2)
        rows += [Concentration(group, layer, tenth, even) for layer, (tenth, even) in enumerate(found.tolist())]
    return rows


def _concentration(given: Tensor) -> Tensor:
    """(N, 2) of what each image token gives, (N, tokens)."""
    share = given / given.sum(1, keepdim=True)
    most = max(round(given.shape[1] / 10), 1)
    entropy = torch.special.entr(share).sum(1)
    return torch.stack([share.topk(most).values.sum(1), entropy.exp() / given.shape[1]], 1)


def cut_rows(knocked_out: Sequence[KnockedOut], flows: Sequence[SampleFlow]) -> list[CutRow]:
    """Every cut in every group of the samples."""
    rows: list[CutRow] = []
    for group, numbers in grouped(flows).items():
        for one in knocked_out:
            layers = f"{one.layers.start} to {one.layers.stop - 1}" if one.layers else ""
            right, same = (float(answers[numbers].float().mean()) for answers in (one.right, one.consistent))
            error = math.sqrt(right * (1 - right) / len(numbers))
            rows.append(CutRow(group, one.cut, layers, len(numbers), right, error, same, one.pairs, one.overlap))
    return rows


def image_over_instruction(rows: Sequence[FlowRow]) -> dict[str, float]:
    """S_img / S_ins over all layers and samples by normalisation: what "image tokens hardly matter" rests on."""

    def total(flow: str, normalisation: str) -> float:
        return sum(getattr(row, normalisation) for row in rows if (row.group, row.flow) == (ALL, flow))

    return {name: total("S_img", name) / total("S_ins", name) for name in NORMALISATIONS}
