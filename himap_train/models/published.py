"""A model's configuration, without its weights: where no hub can be reached, this package knows the architectures in
`assets/configs`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from himap_train.models.loading import load_config, resolve_model

_BUILT_IN = Path(__file__).parents[1] / "assets/configs"


def find_config(path: str) -> tuple[Any, str]:
    """The configuration of a model, and where it was found.

    Args:
        path: As `model.path`.

    Raises:
        FileNotFoundError: It is neither a folder nor on the hub nor one of the architectures in this package.
        ValueError: It is of no known family.
    """
    try:
        folder = resolve_model(path)
    except FileNotFoundError as error:
        written = (json.loads(file.read_text(encoding="utf-8")) for file in sorted(_BUILT_IN.glob("*.json")))
        known = {config.pop("_name_or_path"): config for config in written}
        if path not in known:
            raise FileNotFoundError(
                f"{error}. Planning needs its config.json alone; without the hub it knows {', '.join(known)}"
            ) from error
        return AutoConfig.for_model(**known[path]), f"{path} cannot be reached: its published architecture"
    return load_config(folder), f"config.json of {path}"
