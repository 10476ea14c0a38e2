"""What the path of a checkpoint stands for: an adapter's folder, a training checkpoint, or a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download, try_to_load_from_cache

from himap_train.checkpoints.adapter import CONFIG_FILE, WEIGHTS_FILE
from himap_train.data.sources import HUB_NAME
from himap_train.embedded.model import EMBEDDED_MODELS
from himap_train.models.loading import fetch_file

Weights = Literal["adapter", "last", "best"]
"""Weights of a run: the adapter that it kept, or one of its training checkpoints."""


def adapter_source(path: Path | str, weights: Weights = "adapter") -> Path | None:
    """The adapter folder or training checkpoint that `path` stands for; None for a whole model.

    Args:
        path: A run folder, an adapter folder, a training checkpoint, a whole model, or the name of one on the hub.
        weights: What is taken of a run folder: its `adapter`, or the `last` or `best` training checkpoint.

    Raises:
        FileNotFoundError: A run without these weights.
        ValueError: `weights` of what is no run, or a file that is no training checkpoint.
    """
    path = Path(path)
    is_adapter = path.is_file() or any((path / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE))
    is_run = not is_adapter and not (path / "config.json").is_file()
    is_run &= (path / "checkpoints").is_dir() or (path / "adapter").is_dir()
    if weights != "adapter" and not path.exists():
        raise FileNotFoundError(f"there is no folder {path} of a run, from which to take the {weights} weights")
    if weights != "adapter" and not is_run:
        raise ValueError(f"--weights {weights} is for the folder of a run, and {path} is none; leave it out")
    if path.suffix == ".safetensors" and path.is_file():
        raise ValueError(f"{path} is a file of weights alone; give its folder, {path.parent}")
    if is_adapter:
        return path
    if not is_run:
        return None if path.exists() else _on_hub(str(path))
    source = path / ("adapter" if weights == "adapter" else f"checkpoints/{weights}.ckpt")
    if not source.exists():
        there = sorted((path / "checkpoints").glob("*.ckpt"))
        raise FileNotFoundError(
            f"{path} has no {source.relative_to(path)}: the run did not end, or files were removed. "
            + (f"Give {there[-1]} instead" if there else "There are no training checkpoints in it either")
        )
    return source


def _on_hub(name: str) -> Path | None:
    """The folder of an adapter on the hub, or in its cache; None for anything else."""
    if name in EMBEDDED_MODELS or not HUB_NAME.fullmatch(name):
        return None
    try:
        if not isinstance(try_to_load_from_cache(name, CONFIG_FILE), str):
            if isinstance(try_to_load_from_cache(name, "config.json"), str):
                return None  # a whole model
            fetch_file(name, CONFIG_FILE)
    except Exception:  # of many kinds; what cannot be had is looked for as a model, which says why
        return None
    return Path(snapshot_download(name, ignore_patterns=["checkpoint*", "*.pt", "*.pth", "*.bin"]))
