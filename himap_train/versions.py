"""Versions of the packages that decide numbers."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("himap-train", "torch", "transformers", "peft", "lightning", "tokenizers", "datasets", "numpy", "pillow")


def package_versions() -> dict[str, str]:
    """The version of Python and of each package that is installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
