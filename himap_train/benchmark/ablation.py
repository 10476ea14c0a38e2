"""What an ablation runs: layers, keep ratios and criteria crossed, published grids by name, each with its controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import Any

from himap_train.pruning.methods import read_method
from himap_train.pruning.names import nearest
from himap_train.pruning.schedule import PruningSchedule
from himap_train.pruning.stage import PruningStage

CONTROLS = ("uniform", "random", "first-k")
_HIMAP, _RATIOS = ("instruction", "image"), (0.5, 0.125)


@dataclass(frozen=True)
class Grid:
    """Choices that are crossed, each with a value for every stage; of criteria, perhaps for the first stages alone.

    A layer may be `{first: 2, last: 16, attention_below: 0.3}`: the stage waits between these.
    """

    layers: Sequence[tuple[int | dict[str, Any], ...]] = ((2, 8),)
    ratios: Sequence[tuple[float, ...]] = (_RATIOS,)
    criteria: Sequence[tuple[Any, ...]] = (_HIMAP,)


PRESETS: dict[str, list[Grid]] = {
    # HiMAP's Table 4: each of its criteria alone at the first layer, and every pair of them.
    "table4": [Grid(criteria=[*product(_HIMAP), *product(_HIMAP, repeat=2)])],
    # Where to remove (K1, K2) and how much stays, one varied while the other stands.
    "kr": [
        Grid(layers=[(a, b) for a in (2, 4, 8, 12) for b in (8, 12, 15, 20) if a < b]),
        Grid(ratios=list(product((0.75, 0.5, 0.25), (0.25, 0.125, 0.0625)))),
    ],
    # One criterion at both stages, against HiMAP's two.
    "same-criterion": [
        Grid(
            ratios=[(0.75, 0.25), _RATIOS, (0.25, 0.0625)],
            criteria=[_HIMAP, *((name, name) for name in ("instruction", "image", "image_debiased", "last_token"))],
        )
    ],
    # One stage at a layer for all samples, against one that waits until each has read its image.
    "depth": [
        Grid(
            layers=[(2,), (4,), (8,), (12,), (16,)]
            + [({"first": 2, "last": 16, "attention_below": share},) for share in (0.1, 0.3, 0.5, 0.75)],
            ratios=[(0.125,)],
            criteria=[("instruction",)],
        )
    ],
}
"""Grids by name, for 32 layers."""


def read_grids(preset: str, **given: Sequence[Sequence[Any]] | None) -> list[Grid]:
    """The grids of a preset; what is given for a field of `Grid`, the choices of each stage, takes the place of theirs.

    Raises:
        ValueError: An unknown preset or criterion (the nearest is named), or numbers of stages that differ.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown{nearest(preset, tuple(PRESETS))}")
    for criterion in (criterion for stage in given.get("criteria") or () for criterion in stage):
        read_method(criterion, "--criteria")
    crossed: dict[str, Any] = {name: list(product(*stages)) for name, stages in given.items() if stages is not None}
    grids = [replace(grid, **crossed) for grid in PRESETS[preset]]
    for grid in grids:
        stages = {name: max(map(len, choices), default=0) for name, choices in vars(grid).items()}
        if len(set(stages.values())) > 1 or not stages["layers"]:
            found = ", ".join(f"--{name} for {number}" for name, number in stages.items())
            raise ValueError(f"{found} stages: give a list of choices for each stage, such as [[2,4],[8]]")
    return grids


def schedules_of(
    grids: Sequence[Grid], controls: Sequence[str], depth: int | None, scale: bool, skip_impossible: bool
) -> list[PruningSchedule]:
    """The dense schedule and all of the grids', each once.

    Args:
        grids: What is crossed.
        controls: Criteria that every number of stages, layers and ratios is run with too.
        depth: Layers of the decoder; None where it is not known yet.
        scale: Bring grids that are too deep to the same relative depth.
        skip_impossible: Leave out schedules that cannot be.

    Raises:
        ValueError: A control is unknown, or some schedules cannot be: they are named, with the reason.
    """
    for control in controls:
        read_method(control, "--controls")
    keys = ("layer", "criterion", "keep_ratio")
    found, impossible = {"": PruningSchedule()}, dict[str, str]()
    for grid in grids:
        lengths = dict.fromkeys(map(len, grid.criteria))
        criteria = [*grid.criteria, *((control,) * length for length in lengths for control in controls)]
        for crossed in product(grid.layers, criteria, grid.ratios):
            stages = list(zip(*crossed, strict=False))
            name = ", ".join(f"{criterion} at {layer} keeps {ratio}" for layer, criterion, ratio in stages)
            try:
                each = (PruningStage.each_from_dict(dict(zip(keys, stage, strict=True))) for stage in stages)
                found[name] = PruningSchedule(tuple(chain(*each)))
            except ValueError as error:
                impossible[name] = str(error)
    if depth is not None:
        too_deep = any(stage.layer >= depth for schedule in found.values() for stage in schedule.stages)
        for name, schedule in list(found.items()):
            try:
                found[name] = schedule.scaled_to(depth) if scale and too_deep else schedule
                found[name].validate_for(depth)
            except ValueError as error:
                impossible[name] = str(error)
                del found[name]
    if impossible and not skip_impossible:
        raise ValueError(
            f"{len(impossible)} schedules of the grid are impossible ({len(found) - 1} are not), and nothing was run; "
            f"give other values, or leave them out with --skip_impossible. "
            + "; ".join(f"{name}: {error}" for name, error in impossible.items())
        )
    return list(dict.fromkeys(found.values()))
