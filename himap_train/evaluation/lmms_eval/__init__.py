"""The field's harness evaluates our checkpoints: `python -m lmms_eval --model himap`, see docs/benchmarks.md."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def manifest() -> Any:
    """What the harness finds at our entry point in `lmms_eval.models`: model `himap`; nothing heavy is imported."""
    paths = {"chat_class_path": f"{__name__}.model.Himap", "simple_class_path": f"{__name__}.model.SimpleHimap"}
    return harness("models.registry_v2").ModelManifest("himap", **paths)


def harness(module: str) -> Any:
    """A module of lmms-eval; an ImportError says how to install it."""
    try:
        return import_module(f"lmms_eval.{module}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error}; lmms-eval wants an environment of its own and an older protobuf: grep -v '^protobuf==' "
            "constraints.txt > own.txt && pip install -c own.txt -e '.[lmms-eval]'"
        ) from error
