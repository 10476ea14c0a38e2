"""The published schedules by name, each for the 32 layers of LLaVA-1.5-7B."""

from __future__ import annotations

from himap_train.pruning.schedule import PruningSchedule, PruningStage


def _stages(criterion: str, *places: tuple[int, float]) -> tuple[PruningStage, ...]:
    return tuple(PruningStage(layer, criterion, ratio) for layer, ratio in places)


PRESETS: dict[str, PruningSchedule] = {
    "none": PruningSchedule(),
    # HiMAP for short answers: K1=2, R1=50 %, K2=8, R2=75 % (CVPR 2025, section 5).
    "himap": PruningSchedule((*_stages("instruction", (2, 0.5)), *_stages("image", (8, 0.125)))),
    # HiMAP for captions and free-form answers: K2=15.
    "himap-generation": PruningSchedule((*_stages("instruction", (2, 0.5)), *_stages("image", (15, 0.125)))),
    # FastV (arXiv 2403.06764): K=2, R=50 %, ranked by the last token.
    "fastv": PruningSchedule(_stages("last_token", (2, 0.5))),
    # VTW (arXiv 2405.05803): every image token leaves half way. Nothing is ranked.
    "vtw": PruningSchedule(_stages("uniform", (15, 0.0))),
    # PyramidDrop (arXiv 2410.17247): halves at 8, 16, 24, positions renumbered. It ranks by the projections of the next
    # layer; here, as everywhere, by the attention of the layer before.
    "pyramiddrop": PruningSchedule(_stages("last_token", (8, 0.5), (16, 0.25), (24, 0.125)), positions="renumber"),
    # HiMAP's layers and counts with rules that look at nothing: the floor that a criterion has to beat.
    "random": PruningSchedule(_stages("random", (2, 0.5), (8, 0.125))),
    "uniform": PruningSchedule(_stages("uniform", (2, 0.5), (8, 0.125))),
}
