"""The published schedules by name, each for the 32 layers of LLaVA-1.5-7B, as a schedule file would write them."""

from __future__ import annotations

from typing import Any

_HIMAP = ((2, 0.5), (8, 0.125))


def _stages(criterion: str, *places: tuple[int, float]) -> list[dict[str, Any]]:
    return [{"layer": layer, "criterion": criterion, "keep_ratio": ratio} for layer, ratio in places]


PRESETS: dict[str, dict[str, Any]] = {
    "none": {"stages": []},
    # HiMAP for short answers: K1=2, R1=50 %, K2=8, R2=75 % (CVPR 2025, section 5).
    "himap": {"stages": [*_stages("instruction", (2, 0.5)), *_stages("image", (8, 0.125))]},
    # HiMAP for captions and free-form answers: K2=15.
    "himap-generation": {"stages": [*_stages("instruction", (2, 0.5)), *_stages("image", (15, 0.125))]},
    # FastV (arXiv 2403.06764): K=2, R=50 %, ranked by the last token.
    "fastv": {"stages": _stages("last_token", (2, 0.5))},
    # VTW (arXiv 2405.05803): every image token leaves half way. Nothing is ranked.
    "vtw": {"stages": _stages("uniform", (15, 0.0))},
    # PyramidDrop (arXiv 2410.17247): halves at 8, 16, 24, positions renumbered. It ranks by the projections of the next
    # layer; here, as everywhere, by the attention of the layer before.
    "pyramiddrop": {"stages": _stages("last_token", (8, 0.5), (16, 0.25), (24, 0.125)), "positions": "renumber"},
    # HiMAP's layers and counts with rules that look at nothing: the floor that a criterion has to beat.
    "random": {"stages": _stages("random", *_HIMAP)},
    "uniform": {"stages": _stages("uniform", *_HIMAP)},
    # The control for position bias.
    "first-k": {"stages": _stages("first-k", *_HIMAP)},
    # DivPrune (arXiv 2503.02175): before the decoder, 9.8 % of the tokens.
    "divprune": {"stages": _stages("divprune", (0, 0.098))},
    # MMTok (arXiv 2508.18264): before the decoder, 64 of 576 tokens.
    "coverage": {"stages": _stages("coverage", (0, 0.111))},
    # DART (arXiv 2502.11494): behind two layers, 64 of 576 tokens.
    "dart": {"stages": _stages("dart", (2, 0.111))},
    # LLaVolta's compression (arXiv 2406.20092): stride 8 at layer 2. Its stages over training are a curriculum.
    "average-pool": {"stages": _stages("average-pool", (2, 0.125))},
}
