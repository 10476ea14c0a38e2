"""Whether an adapter on disk is the one that the model got, and whether it does anything.

Keys renamed by an upgrade of transformers or PEFT are dropped silently by PEFT, and the model is then the base model.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict

from himap_train.limits import bounded
from himap_train.models.families import family_of
from himap_train.models.stock import base_model
from himap_train.models.weight_headers import opened
from himap_train.structured import named


def check_adapter(model: PeftModel, folder: Path) -> None:
    """Every key of the file is in the model and the other way round, and the adapter does something.

    Raises:
        FileNotFoundError: There are no safetensors.
        ValueError: Keys are missing, unknown or empty.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no adapter_model.safetensors (pickled adapters are not read)")
    with opened(file) as weights:
        # beside LoRA on embeddings PEFT writes a copy of the frozen ones
        names = {name for name in weights.keys() if not name.endswith(".base_layer.weight")}  # noqa: SIM118
        empty = [name for name in names if 0 in weights.get_slice(name).get_shape()]
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    in_place = names & {name for name, _ in model.named_parameters()}  # weights of the base, trained
    missing, unknown = sorted(set(expected) - names), sorted(names - set(expected) - in_place)
    if missing or unknown or empty:
        raise ValueError(
            f"{file}: {len(missing)} keys are missing {missing[:2]}, {len(unknown)} are unknown {unknown[:2]}, "
            f"{len(empty)} are empty {empty[:2]}; the adapter would not act. Was it made with other versions?"
        )
    projectors = family_of(base_model(model)).projector_names
    projector_trained = any(f".{part}." in name and "lora_" not in name for name in names for part in projectors)
    whole = projector_trained or in_place
    if not whole and not any(tensor.any() for name, tensor in expected.items() if "lora_B" in name):
        warnings.warn(f"{folder}: every lora_B is zero, the adapter changes nothing (was it trained?)", stacklevel=3)


_INSIDE = {  # around what an adapter's config says, as PEFT looks modules up
    "rank_pattern": (r"(.*\.)?(", ")$"),
    "alpha_pattern": (r"(.*\.)?(", ")$"),
    "layers_pattern": (r"(?:^|.*?\.)", r"\.(?P<idx>\d+)\."),
    "modules_to_save": (r"(^|.*\.)", r"($|\..*)"),
}


def check_patterns(peft: Mapping[str, Any], names: Iterable[str], source: Path | str) -> None:
    """Look modules up by the regular expressions of an adapter's config, which PEFT does without a bound.

    Raises:
        ValueError: One of them is none, or takes seconds.
    """
    for key in ("target_modules", "exclude_modules", *_INSIDE):
        given = peft.get(key) or []
        before, behind = _INSIDE.get(key, ("", ""))
        if isinstance(given, str) or key in _INSIDE:  # a list of targets holds plain names
            with named(source, f"has a `{key}` that is no regular expression"), bounded(f"{source}: `{key}`"):
                for pattern in [given] if isinstance(given, str) else given:
                    expression = re.compile(before + pattern + behind)
                    for name in names:
                        expression.match(name) if key in _INSIDE else expression.fullmatch(name)
