"""The published schedules by name, each for the 32 layers of LLaVA-1.5-7B, as a schedule file would write them."""

from __future__ import annotations

from typing import Any

_HIMAP = ((2, 0.5), (8, 0.125))


def _stages(criterion: str | dict[str, Any], *places: tuple[int, float]) -> list[dict[str, Any]]:
    return [{"layer": layer, "criterion": criterion, "keep_ratio": ratio} for layer, ratio in places]


def _hidrop(first: int) -> list[dict[str, Any]]:
    """As fractions of 576, so that other pictures keep their part."""
    filters = zip((10, 14, 16, 18), (first, 10, 5, 1), strict=True)
    return _stages("last_token", *((layer, round(kept / 576, 4)) for layer, kept in filters), (24, 0.0))


PRESETS: dict[str, dict[str, Any]] = {
    "none": {"stages": []},
    # HiMAP for short answers: K1=2, R1=50 %, K2=8, R2=75 % (CVPR 2025, section 5).
    "himap": {"stages": [*_stages("instruction", (2, 0.5)), *_stages("image", (8, 0.125))]},
    # HiMAP for captions and free-form answers: K2=15.
    "himap-generation": {"stages": [*_stages("instruction", (2, 0.5)), *_stages("image", (15, 0.125))]},
    # FastV (arXiv 2403.06764): K=2, R=50 %, ranked by the last token.
    "fastv": {"stages": _stages("last_token", (2, 0.5))},
    # Window FastV (arXiv 2502.11501): as FastV, a quarter of each window of 4 x 4 tokens.
    "window-fastv": {"stages": _stages({"name": "last_token", "window": 4}, (2, 0.25))},
    # VTW (arXiv 2405.05803): every image token leaves half way. Nothing is ranked.
    "vtw": {"stages": _stages("uniform", (15, 0.0))},
    # PyramidDrop (arXiv 2410.17247): halves at 8, 16, 24, positions renumbered. It ranks by the projections of the next
    # layer; here, as everywhere, by the attention of the layer before.
    "pyramiddrop": {"stages": _stages("last_token", (8, 0.5), (16, 0.25), (24, 0.125)), "positions": "renumber"},
    # HiDrop (arXiv 2602.23699), 64 of 576 tokens on average over the layers: they come in at layer 8; 215, 10, 5 and 1
    # of them stay behind the filters; all leave at layer 24. The last prompt token ranks. A plain top-k is what was
    # published: the "differentiable top-k" of the released code takes its scores from detached states and uses its
    # result as indices alone, so no gradient passes, and it chooses what torch.topk does. Ranked, as everywhere here,
    # by the attention of the layer before; HiDrop ranks by the projections of the next one.
    "hidrop": {"stages": _hidrop(215), "enter": 8},
    # The same for 48 tokens on average.
    "hidrop-48": {"stages": _hidrop(87), "enter": 8},
    # HiMAP's layers and counts with rules that look at nothing: the floor that a criterion has to beat.
    "random": {"stages": _stages("random", *_HIMAP)},
    "uniform": {"stages": _stages("uniform", *_HIMAP)},
    # The control for position bias.
    "first-k": {"stages": _stages("first-k", *_HIMAP)},
    # SparseVLM (arXiv 2410.04417), the released counts for "192 tokens": 300, 200 and 110 behind layers 2, 6 and 15.
    "sparsevlm": {"stages": _stages("sparsevlm", (3, 0.5208), (7, 0.3472), (16, 0.191))},
    # DivPrune (arXiv 2503.02175): before the decoder, 9.8 % of the tokens.
    "divprune": {"stages": _stages("divprune", (0, 0.098))},
    # MMTok (arXiv 2508.18264): before the decoder, 64 of 576 tokens.
    "coverage": {"stages": _stages("coverage", (0, 0.111))},
    # VisionZip (arXiv 2412.04467): before the decoder, 54 dominant and 10 contextual of 576 tokens.
    "visionzip": {"stages": _stages("visionzip", (0, 0.111))},
    # DART (arXiv 2502.11494): behind two layers, 64 of 576 tokens.
    "dart": {"stages": _stages("dart", (2, 0.111))},
    # LLaVolta's compression (arXiv 2406.20092): stride 8 at layer 2. Its stages over training: `PHASES`.
    "average-pool": {"stages": _stages("average-pool", (2, 0.125))},
}

PHASES: dict[str, list[dict[str, Any]]] = {
    # LLaVolta (arXiv 2406.20092), four stages: strides 8 and 2 at layer 2, stride 2 at layer 16, a quarter of the steps
    # each, then nothing is compressed, as at inference: `share: 0.75` with a dense schedule.
    "llavolta": [{"stages": _stages("average-pool", place)} for place in ((2, 0.125), (2, 0.5), (16, 0.5))],
}
"""Schedules that a curriculum runs one after the other, by name, each for 32 layers."""
