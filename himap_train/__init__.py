"""Fine-tune LLaVA with LoRA while HiMAP prunes image tokens inside the decoder.

Importing this package loads nothing heavy and patches nothing: the public names below are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Ratio": "himap_train.pruning.keep",
    "Count": "himap_train.pruning.keep",
    "Mass": "himap_train.pruning.keep",
    "AttentionMass": "himap_train.pruning.keep",
    "PruningStage": "himap_train.pruning.stage",
    "PruningSchedule": "himap_train.pruning.schedule",
    "load_llava": "himap_train.models.loading",
    "install_pruning": "himap_train.models.install",
    "remove_pruning": "himap_train.models.install",
    "record_pruning": "himap_train.models.install",
    "load_checkpoint": "himap_train.checkpoints.load",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'himap_train' has no attribute {name!r}; public names: {', '.join(__all__)}")
