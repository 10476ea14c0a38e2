"""The folder of a run: what it holds, and that two runs never share one.

config.yaml (resolved), versions.json, pruning.yaml, checkpoints/, logs/, adapter/, metrics.json, table.md,
accuracy.png, samples/, report.html. A run that goes on keeps the table it had as earlier-metrics.json and so on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from himap_train.evaluation.tables import FILES
from himap_train.pruning.schedule import PruningSchedule
from himap_train.storage import atomic_file
from himap_train.versions import package_versions

CONFIG, VERSIONS, SCHEDULE = "config.yaml", "versions.json", "pruning.yaml"


def claim_folder(folder: Path, resuming: bool) -> None:
    """Make a run folder.

    Raises:
        FileExistsError: It holds a run and this is not its continuation.
    """
    if ((folder / CONFIG).exists() or _holds_weights(folder)) and not resuming:
        raise FileExistsError(
            f"{folder} already holds a run. Go on with it by adding --resume (from a checkpoint of its own), or choose "
            "another --output, or remove it"
        )
    folder.mkdir(parents=True, exist_ok=True)


def release_folder(folder: Path) -> None:
    """Let the next start have the folder of a run that ended before anything of it was saved."""
    if not _holds_weights(folder):
        (folder / CONFIG).unlink(missing_ok=True)


def _holds_weights(folder: Path) -> bool:
    return (folder / "adapter").exists() or any(file.is_file() for file in folder.glob("checkpoints/*.ckpt"))


def record_run(folder: Path, config: Mapping[str, Any], schedule: PruningSchedule) -> None:
    """Write what is needed to repeat the run: config, schedule, package versions."""
    _write_yaml(folder / CONFIG, dict(config))
    record_schedule(folder, schedule)
    with atomic_file(folder / VERSIONS) as file:
        file.write_text(json.dumps(package_versions(), indent=2) + "\n", encoding="utf-8")


def set_aside_table(folder: Path) -> None:
    """Rename the table that a run has when it goes on: it is about other weights, and no card may show it."""
    for name in FILES:
        if (folder / name).is_file():
            (folder / name).replace(folder / f"earlier-{name}")


def record_schedule(folder: Path, schedule: PruningSchedule) -> None:
    """Write the schedule that the run trains for."""
    _write_yaml(folder / SCHEDULE, schedule.to_dict())


def _write_yaml(file: Path, content: Mapping[str, Any]) -> None:
    with atomic_file(file) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
