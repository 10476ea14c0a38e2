"""The stock model itself, also from inside a PeftModel, and its decoder."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn

from himap_train.models.families import family_of


def base_model(model: nn.Module) -> Any:
    """The stock vision-language model.

    Raises:
        TypeError: If there is none.
    """
    given: Any = getattr(model, "_orig_mod", model)  # compiled: attributes belong on what it calls
    base: Any = given.get_base_model() if isinstance(given, PeftModel) else given
    base = getattr(base, "_orig_mod", base)
    family_of(base)
    return base


def text_decoder(model: nn.Module) -> Any:
    """Its text decoder, which the layer loop runs.

    Raises:
        TypeError: As `base_model`.
    """
    base = base_model(model)
    return family_of(base).decoder(base)
