"""What can be measured by name: no pruning, every schedule, and how others do it.

`dense` has the layer loop, the attention kernel and the loss of pruned rows; `stock` the stock forward, so that what is
not 1 there is the layer loop and, on a CPU, attention in blocks. `every-layer` drops tokens at every layer but the
first, `learning` is the same while its keep ratios get a gradient: every key has a bias, heads are 8 wider. What the
others pay for is in `peers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from himap_train.benchmark.peers import (
    PeerLayers,
    fastv_attention_maps,
    masking,
    peer_decoder,
    pyramiddrop_ranking,
)
from himap_train.models.attention import register_attention
from himap_train.models.foresight import make_scorers
from himap_train.models.install import install_pruning, remove_pruning, running
from himap_train.models.stock import base_model
from himap_train.pruning.methods.base import Reads
from himap_train.pruning.names import nearest
from himap_train.pruning.presets import PRESETS
from himap_train.pruning.reading import fit_preset, fitted_schedule
from himap_train.pruning.schedule import PruningSchedule
from himap_train.pruning.stage import PruningStage

DENSE = "dense"
KEEPS_ALL = PruningSchedule((PruningStage(1, "first-k", 1.0),))
"""What dense is here: layer loop, attention kernel and loss as under pruning, and nothing is removed."""
STOCK = "stock"
EVERY_LAYER = "every-layer"
LEARNING = "learning"
MEASURES = ("training_step", "prefill", "decode", "generate")


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        name: How it is asked for.
        schedule: What it removes where; the bound follows from it.
        active: Makes a model run it inside the block.
        measures: What can be measured of it.
        peer: Whether it takes the place of the decoder's forward, and must be told where image and answer are.
    """

    name: str
    schedule: PruningSchedule
    active: Callable[[nn.Module], AbstractContextManager[Any]]
    measures: tuple[str, ...] = MEASURES
    peer: bool = False


@contextmanager
def _pruned(schedule: PruningSchedule, model: nn.Module) -> Iterator[None]:
    install_pruning(model, schedule)
    make_scorers(model, schedule)
    try:
        yield
    finally:
        remove_pruning(model)


@contextmanager
def _learning(schedule: PruningSchedule, model: nn.Module) -> Iterator[None]:
    """As `_pruned`, with ratios that get a gradient."""
    with _pruned(schedule, model):
        kept = [1.0, *(stage.keep_ratio or 0.0 for stage in schedule.stages)]
        with running(model, schedule, torch.tensor(kept, device=base_model(model).device, requires_grad=True)):
            yield


def _every_layer(layers: int) -> PruningSchedule:
    """As ratios are learned: a stage at every layer but the first, evenly falling."""
    return PruningSchedule(
        tuple(
            PruningStage(layer, "instruction" if layer < layers // 4 else "image", 1 - layer / layers)
            for layer in range(1, layers)
        )
    )


_PEERS: dict[str, tuple[PeerLayers, str, Callable[[], str]]] = {
    "fastv-attention-maps": (fastv_attention_maps, "fastv", lambda: "eager"),
    "pyramiddrop-ranking": (pyramiddrop_ranking, "pyramiddrop", lambda: "sdpa"),
    "masking": (masking, "himap", lambda: register_attention("sdpa")),
}
"""How a peer runs all layers, the preset that it stands for, and its attention implementation."""
METHODS = (DENSE, STOCK, EVERY_LAYER, LEARNING, *(name for name in PRESETS if name != "none"), *_PEERS)


def find_method(name: str, layers: int) -> Method:
    """A method by its name, for a decoder of so many layers.

    Args:
        name: One of `METHODS`, or a YAML file with a schedule.
        layers: Presets that are too deep are taken at the same relative depth.

    Raises:
        ValueError: There is no such method, or it keeps by attention mass.
    """
    if name == DENSE:
        return scheduled(name, KEEPS_ALL)
    if name == STOCK:
        return Method(name, PruningSchedule(), lambda model: nullcontext())
    if name == EVERY_LAYER:
        return scheduled(name, _every_layer(layers))
    if name == LEARNING:
        return Method(name, _every_layer(layers), partial(_learning, _every_layer(layers)), MEASURES[:1])
    if name in _PEERS:
        runs, preset, attention = _PEERS[name]
        schedule = fit_preset(PruningSchedule.from_preset(preset), layers)

        def active(model: nn.Module) -> AbstractContextManager[None]:
            return peer_decoder(model, runs, schedule, attention())

        return Method(name, schedule, active, MEASURES[:2], peer=True)
    if name not in METHODS and not name.endswith((".yaml", ".yml")):
        raise ValueError(f"method {name!r} is unknown{nearest(name, METHODS)}; or a YAML file with a schedule")
    schedule = fitted_schedule(name, layers)
    if schedule.by_sample:
        raise ValueError(
            f"{name} keeps by attention mass or waits, and a benchmark runs random weights, whose attention says "
            "nothing of the tokens that stay: give keep_ratio of about what recipes/evaluate.py reports as kept"
        )
    return scheduled(name, schedule)


def scheduled(name: str, schedule: PruningSchedule) -> Method:
    """A schedule as a method."""
    return Method(name, schedule, partial(_pruned, schedule))


def without_choice(method: Method) -> Method | None:
    """What keeps as many tokens at the same layers, the first ones; None where nothing is chosen anyway."""
    if method.peer or not any(stage.method.reads is not Reads.NOTHING for stage in method.schedule.stages):
        return None
    stages = tuple(PruningStage(stage.layer, "first-k", keep=stage.keep) for stage in method.schedule.stages)
    schedule = replace(method.schedule, stages=stages)
    return replace(method, schedule=schedule, active=partial(_pruned, schedule))
