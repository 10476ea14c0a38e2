"""Model families by the `model_type` of their config; see `base.Family`. A new one is its file and a line here."""

from __future__ import annotations

from typing import Any

from torch import nn

from himap_train.models.families.base import Family
from himap_train.models.families.internvl import InternVL
from himap_train.models.families.llava import Llava
from himap_train.models.families.llava_next import LlavaNext
from himap_train.models.families.llava_onevision import LlavaOnevision
from himap_train.models.families.qwen2_vl import Qwen2VL
from himap_train.models.families.qwen3_vl import Qwen3VL
from himap_train.models.families.smolvlm import SmolVLM

FAMILIES: tuple[Family, ...] = (Llava(), LlavaNext(), LlavaOnevision(), InternVL(), Qwen2VL(), Qwen3VL(), SmolVLM())


def family_of_config(config: Any) -> Family:
    """The family that opens a checkpoint.

    Raises:
        ValueError: There is none; lists those that are.
    """
    found = getattr(config, "model_type", None)
    for family in FAMILIES:
        if found in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise ValueError(f"a {found!r} model, which is of no family that can be pruned here; known: {known}")


def family_of_processor(processor: Any) -> Family:
    """The family that a processor from `load_processor` is of.

    Raises:
        TypeError: It is of no known family.
    """
    for family in FAMILIES:
        if isinstance(processor, family.processor_class) and getattr(processor, "family", family.name) == family.name:
            return family
    raise TypeError(f"a {type(processor).__name__} is the processor of no family; load it with load_llava")


def family_of(model: nn.Module) -> Family:
    """The family of a loaded model.

    Raises:
        TypeError: It is no vision-language model of a known family.
    """
    config = getattr(model, "config", None)
    for family in FAMILIES:
        if getattr(config, "model_type", None) in family.model_types and hasattr(model, "model"):
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise TypeError(
        f"expected a vision-language model of one of the families {known} (or a PeftModel around one), "
        f"got {type(model).__name__}"
    )
