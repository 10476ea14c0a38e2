"""The one place that turns what a user wrote into a schedule, and fits it to a decoder's depth.

A preset's name, a mapping, a YAML file (a checkpoint's pruning.yaml is one), `none` or null.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from himap_train.pruning.names import nearest
from himap_train.pruning.presets import PHASES, PRESETS
from himap_train.pruning.schedule import PruningSchedule
from himap_train.structured import named, read_yaml

_SHALLOW = 24
"""Layers from which a preset's relative depths are taken on trust."""

ScheduleArgument = dict[str, Any] | str | None
"""A preset's name (`none` among them), a YAML file, the stages inline, or null for dense."""
PhasesArgument = str | list[ScheduleArgument]
"""A name of `presets.PHASES`, or schedules."""


def read_schedule(value: str | Path | Mapping[str, Any] | PruningSchedule | None) -> PruningSchedule:
    """A schedule from a preset's name, a mapping, a YAML file, or None for dense.

    Raises:
        ValueError: Unknown preset or key (the nearest is named), or a schedule that cannot be.
        FileNotFoundError: A YAML file that is not there.
    """
    if value is None or isinstance(value, PruningSchedule):
        return value or PruningSchedule()
    if isinstance(value, Mapping):
        return PruningSchedule.from_dict(value)
    if Path(value).suffix in (".yaml", ".yml", ".json"):  # JSON is YAML
        return schedule_file(Path(value))
    return PruningSchedule.from_preset(str(value))


def schedule_file(file: Path) -> PruningSchedule:
    """The schedule in a YAML file; an empty file is none.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It holds no schedule; names the file, and the key where it is one.
    """
    return schedule_in(read_yaml(file), file)


def schedule_in(content: Mapping[str, Any] | None, file: Path | str) -> PruningSchedule:
    """The schedule that stands in a file as a mapping; dense where there is none.

    Raises:
        ValueError: It cannot be; names the file.
    """
    with named(file, "holds no schedule"):
        return PruningSchedule() if content is None else PruningSchedule.from_dict(content)


def is_preset(schedule: ScheduleArgument) -> bool:
    """Whether a preset is named; presets are written for 32 layers, all else for the decoder at hand."""
    return (
        isinstance(schedule, str) and schedule in PRESETS or isinstance(schedule, dict) and set(schedule) == {"preset"}
    )


def fitted_schedule(value: ScheduleArgument, layers: int) -> PruningSchedule:
    """The schedule that a value names, for a decoder of so many layers: presets at the same relative depth.

    Raises:
        FileNotFoundError: A YAML file that is not there.
        ValueError: It is unknown.
    """
    schedule = read_schedule(value)
    return fit_preset(schedule, layers) if is_preset(value) else schedule


def read_phases(value: PhasesArgument) -> list[PruningSchedule]:
    """The schedules that a name or a list stands for.

    Raises:
        FileNotFoundError: A YAML file that is not there.
        ValueError: One of them, or the name, is unknown.
    """
    if isinstance(value, str) and value not in PHASES:
        raise ValueError(f"phases {value!r} are unknown{nearest(value, tuple(PHASES))}; or a list of schedules")
    return [read_schedule(phase) for phase in (PHASES[value] if isinstance(value, str) else value)]


def fitted_phases(value: PhasesArgument, layers: int) -> list[PruningSchedule]:
    """The same for a decoder of so many layers: named ones at the same relative depth, as presets."""
    phases = read_phases(value)
    if not isinstance(value, str):
        return [fitted_schedule(phase, layers) for phase in value]
    fits = all(stage.layer < layers for phase in phases for stage in phase.stages)
    return phases if fits else [phase.scaled_to(layers) for phase in phases]


def fit_preset(preset: PruningSchedule, layers: int) -> PruningSchedule:
    """The preset itself if the decoder has its layers, else the preset at the same relative depths.

    On a shallow decoder a warning goes with it: the same relative depth may come before anything has been read.
    """
    deepest = max((preset.enter, *(stage.layer for stage in preset.stages)))
    if deepest < layers:
        return preset
    scaled = preset.scaled_to(layers)
    if layers < _SHALLOW and any(stage.reads_before for stage in scaled.stages):
        at = ", ".join(str(stage.layer) for stage in scaled.stages)
        warnings.warn(
            f"the preset was found on 32 layers; on {layers} its stages come to layers {at}, where attention may not "
            "know yet what matters: let recipes/search_schedule.py choose layers and criteria on your data",
            stacklevel=2,
        )
    return scaled
