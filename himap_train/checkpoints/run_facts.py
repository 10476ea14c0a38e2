"""What a run's folder tells about the weights that came out of it, for the model card."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml


@dataclass(frozen=True)
class RunFacts:
    """Facts of one run.

    Attributes:
        config: Resolved config.
        versions: Package versions, as the run recorded them.
        rows: Rows of its table, if it measured the weights that are exported.
    """

    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


def run_facts(checkpoint: Path) -> RunFacts:
    """Facts of the run that a run folder, its adapter folder or one of its training checkpoints belongs to.

    The table of a run is about its `adapter`. A training checkpoint has the same weights if it is the one that the run
    kept (`keep: last` or `best`).
    """
    config: dict[str, Any] = {}
    if checkpoint.is_file():
        config = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True).get("himap_config") or {}
    for folder in (checkpoint, checkpoint.parent, checkpoint.parent.parent):
        if (folder / "config.yaml").is_file() and (folder / "versions.json").is_file():
            break
    else:
        return RunFacts(config)
    config = config or yaml.safe_load((folder / "config.yaml").read_text("utf-8")) or {}
    measured = not checkpoint.is_file() or checkpoint.stem == config.get("keep")
    metrics = folder / "metrics.json"
    return RunFacts(
        config,
        json.loads((folder / "versions.json").read_text("utf-8")),
        json.loads(metrics.read_text("utf-8"))["rows"] if measured and metrics.is_file() else [],
    )
