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
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    family_of(base)
    return base


def text_decoder(model: nn.Module) -> Any:
    """Its text decoder, which the layer loop runs.

    Raises:
        TypeError: As `base_model`.
    """
    base = base_model(model)
    return family_of(base).decoder(base)
