"""What a run's folder tells about the weights that came out of it, for the model card."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from himap_train.checkpoints.adapter import training_file
from himap_train.structured import Rule, check_shape, read_json, read_yaml

ADAPTED, RUN_DENSE = "adapted pruned", "adapted, evaluated dense"
"""Rows of a run's table: its weights as they were trained, and where nothing is pruned."""
_CONFIG_SHAPE = {
    "data?": dict,
    "model?": dict,
    "trainer?": dict,
    "pruning?": {"elastic?": {"budgets": Rule("two numbers", list, lambda pair: len(pair) == 2), "dense_share": float}},
}
_ROWS_SHAPE = {
    "rows": [
        {
            "name": str,
            "metric": str,
            "overall": {"score?": float, "standard_error?": float, "count": int},
            "cost?": {"flops_ratio": float},
            "image_tokens?": float,
            "text_tokens?": float,
            "flops_ratio?": {"mean": float, "sd": float},
        }
    ]
}


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
        config = training_file(checkpoint).get("himap_config") or {}
        check_shape(config, _CONFIG_SHAPE, str(checkpoint), "himap_config")
    for folder in (checkpoint, checkpoint.parent, checkpoint.parent.parent):
        if (folder / "config.yaml").is_file() and (folder / "versions.json").is_file():
            break
    else:
        return RunFacts(config)
    config = config or read_yaml(folder / "config.yaml", _CONFIG_SHAPE)
    measured = not checkpoint.is_file() or checkpoint.stem == config.get("keep")
    metrics = folder / "metrics.json"
    return RunFacts(
        config,
        read_json(folder / "versions.json", {str: str}),
        read_json(metrics, _ROWS_SHAPE)["rows"] if measured and metrics.is_file() else [],
    )
