"""Methods of the literature, one file each; see `base.Method`. A new one is its file, a line here, and its test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from himap_train.pruning.methods.average_pool import AveragePool
from himap_train.pruning.methods.base import Method
from himap_train.pruning.methods.coverage import Coverage
from himap_train.pruning.methods.dart import Dart
from himap_train.pruning.methods.divprune import DivPrune
from himap_train.pruning.methods.first_k import FirstK
from himap_train.pruning.methods.image import ByImage
from himap_train.pruning.methods.image_debiased import ImageDebiased
from himap_train.pruning.methods.image_stratified import ImageStratified
from himap_train.pruning.methods.instruction import Instruction
from himap_train.pruning.methods.last_token import LastToken
from himap_train.pruning.methods.learned import Learned
from himap_train.pruning.methods.random import Random
from himap_train.pruning.methods.sparsevlm import SparseVLM
from himap_train.pruning.methods.stride import Stride
from himap_train.pruning.methods.uniform import Uniform
from himap_train.pruning.methods.visionzip import VisionZip
from himap_train.pruning.names import check_keys, field_names, nearest

__all__ = ["METHODS", "Method", "read_method"]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Instruction,
        ByImage,
        ImageDebiased,
        ImageStratified,
        LastToken,
        SparseVLM,
        Random,
        Uniform,
        Stride,
        FirstK,
        DivPrune,
        Coverage,
        Dart,
        AveragePool,
        VisionZip,
        Learned,
    )
}
"""By the name under which a schedule asks for them."""


def read_method(given: str | Mapping[str, Any] | Method, where: str = "criterion") -> Method:
    """A method from its name, or from a mapping with its name and parameters.

    Args:
        given: `instruction`, or `{name: coverage, text_weight: 0.5}`.
        where: Names it in messages.

    Raises:
        ValueError: Unknown name or parameter (the nearest is named), or a wrong value.
    """
    if isinstance(given, Method):
        return given
    if isinstance(given, Mapping) and "name" not in given:
        raise ValueError(f"{where} has no 'name'; found {sorted(map(str, given))}; valid: {', '.join(METHODS)}")
    name, parameters = (given.get("name"), dict(given)) if isinstance(given, Mapping) else (given, {})
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"{where} {name!r} is unknown{nearest(str(name), tuple(METHODS))}")
    parameters.pop("name", None)
    check_keys(f"{where} {name}", parameters, field_names(METHODS[name]))
    return METHODS[name](**parameters)
