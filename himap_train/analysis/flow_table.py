"""The flows of HiMAP's section 3 by layer, question type and turn, under three normalisations, and what is zero why.

Normalisations: by the number of sources (as the paper's Eqs. 2 to 6 have it), by the number of pairs of which one token
sees the other, or none at all. Which one is chosen decides whether image tokens seem to matter: there are many of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from himap_train.analysis.knockout import KnockedOut
from himap_train.analysis.pairs import ANSWER, IMAGE, INSTRUCTION, KINDS, SYSTEM
from himap_train.analysis.saliency import Formula, SampleFlow

TEXT = (INSTRUCTION, ANSWER)
FLOWS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "S_vv": ((IMAGE,), (IMAGE,)),
    "S_vv_others": ((IMAGE,), (IMAGE,)),
    "S_vt": (TEXT, (IMAGE,)),
    "S_tv": ((IMAGE,), TEXT),
    "S_tt": (TEXT, TEXT),
    "S_sys": (KINDS, (SYSTEM,)),
    "S_img": (KINDS, (IMAGE,)),
    "S_ins": (KINDS, (INSTRUCTION,)),
}
"""Kinds that take and kinds that give; text is instruction and answer, others means without a token itself."""
NORMALISATIONS = ("sources", "pairs", "none")
COLUMNS = (*NORMALISATIONS, "attention", "tenth", "effective")
ALL = "all"
Row = dict[str, Any]
"""One line of a table, by column; nan where there is no number."""


def grouped(flows: Sequence[SampleFlow]) -> dict[str, list[int]]:
    """Numbers of all samples, then of those of each type and of each turn where there are several."""
    groups = {ALL: list(range(len(flows)))}
    for fact in ("type", "turn"):
        facts = [flow.meta.get(fact) for flow in flows]
        values = sorted({value for value in facts if value})
        if len(values) > 1:
            groups |= {f"{fact} {v}": [number for number, value in enumerate(facts) if value == v] for v in values}
    return groups


def flow_rows(flows: Sequence[SampleFlow], formula: Formula = "paper") -> list[Row]:
    """Every flow of every group and layer, means over the samples that have it.

    Columns: group ("all", "type where", "turn 2"), layer, flow; its saliency under each of NORMALISATIONS; attention,
    the share of theirs that the rows which take give to the sources; zero, why it is that: "no such tokens",
    "causality" (no row sees a source) or "last layer" (whose rows reach the loss only where they predict). Of S_vt also
    tenth, the share that the tenth of the image tokens gives which gives most, and effective, the share of the image
    tokens that would give it evenly (exp(entropy) of them).

    Args:
        flows: From `measure`.
        formula: With "published-code" S_sys, S_img and S_ins are what the tokens of a kind take, as that code sums rows
            where the paper's Eqs. 2 to 4 sum columns.
    """
    rows: list[Row] = []
    for group, numbers in grouped(flows).items():
        members = [flows[number] for number in numbers]
        for name, (targets, sources) in FLOWS.items():
            if formula == "published-code" and targets == KINDS:
                targets, sources = sources, targets
            parts = [_numbers(flow, name, targets, sources) for flow in members]
            pairs = sum(float(flow.pairs[targets, :][:, sources].sum()) for flow in members)
            tokens = all(any(flow.tokens[[*kinds]].any() for flow in members) for kinds in (targets, sources))
            for layer, means in enumerate(torch.stack(parts).nanmean(0).tolist()):
                row = {"group": group, "layer": layer, "flow": name, **dict(zip(COLUMNS, means, strict=True))}
                reason = "" if row["none"] or layer < len(parts[0]) - 1 else "last layer"
                rows.append(row | {"zero": reason if pairs else "causality" if tokens else "no such tokens"})
    return rows


def _numbers(flow: SampleFlow, name: str, targets: tuple[int, ...], sources: tuple[int, ...]) -> Tensor:
    """(N, 6), those of COLUMNS; nan where there is nothing to share."""
    parts = torch.stack([flow.saliency, flow.attention])[:, :, targets][..., sources].sum((2, 3))  # (2, N)
    pairs = flow.pairs[targets, :][:, sources].sum()
    if name == "S_vv_others":
        parts, pairs = parts - flow.own[..., targets].sum(2).T, pairs - flow.tokens[[*targets]].sum()
    saliency, attention = parts
    given, taken = flow.tokens[[*sources]].sum(), flow.tokens[[*targets]].sum()
    share = flow.image_to_text / flow.image_to_text.sum(1, keepdim=True) * (1.0 if name == "S_vt" else torch.nan)
    tenth = share.topk(max(round(share.shape[1] / 10), 1)).values.sum(1)
    effective = torch.special.entr(share).sum(1).exp() / share.shape[1]
    return torch.stack([saliency / given, saliency / pairs, saliency, attention / taken, tenth, effective], 1)


def cut_rows(knocked_out: Sequence[KnockedOut], flows: Sequence[SampleFlow]) -> list[Row]:
    """Every cut in every group of the samples.

    Columns: group; cut, as in `KnockedOut`; layers ("2 to 3", "" where nothing is cut); samples of the group; accuracy
    with its standard error; consistency; pairs and overlap as in `KnockedOut`, of all groups.
    """
    rows: list[Row] = []
    for group, numbers in grouped(flows).items():
        for one in knocked_out:
            layers = f"{one.layers.start} to {one.layers.stop - 1}" if one.layers else ""
            right, same = (float(answers[numbers].float().mean()) for answers in (one.right, one.consistent))
            row = {"group": group, "cut": one.cut, "layers": layers, "samples": len(numbers), "accuracy": right}
            row |= {"error": math.sqrt(right * (1 - right) / len(numbers)), "consistency": same}
            rows.append(row | {"pairs": one.pairs, "overlap": one.overlap})
    return rows


def column(rows: Sequence[Row], flow: str, name: str) -> list[float]:
    """A flow of all samples, layer by layer."""
    return [row[name] for row in rows if (row["group"], row["flow"]) == (ALL, flow)]


def image_over_instruction(rows: Sequence[Row]) -> dict[str, float]:
    """S_img / S_ins over all layers and samples by normalisation: what "image tokens hardly matter" rests on."""
    return {name: sum(column(rows, "S_img", name)) / sum(column(rows, "S_ins", name)) for name in NORMALISATIONS}
