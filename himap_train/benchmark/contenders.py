"""What can be measured by name: no pruning, every schedule, and how others do it. Each says why it costs that."""

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
        why: Why it costs what it costs.
        active: Makes a model run it inside the block.
        measures: What can be measured of it.
        peer: Whether it takes the place of the decoder's forward, and must be told where image and answer are.
    """

    name: str
    schedule: PruningSchedule
    why: str
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


@dataclass(frozen=True)
class _Peer:
    """A peer, the preset that it stands for, and its attention implementation."""

    layers: PeerLayers
    preset: str
    attention: Callable[[], str]
    why: str


_PEERS = {
    "fastv-attention-maps": _Peer(
        fastv_attention_maps,
        "fastv",
        lambda: "eager",
        "asks for attention maps, so every layer runs eager attention and writes its whole (heads, L, L) map",
    ),
    "pyramiddrop-ranking": _Peer(
        pyramiddrop_ranking,
        "pyramiddrop",
        lambda: "sdpa",
        "norm, query and key projections of the next layer run once more at each stage, in a loop over the samples",
    ),
    "masking": _Peer(
        masking,
        "himap",
        lambda: register_attention("sdpa"),
        "removes nothing: every layer runs on all tokens, and a (B, 1, S, S) mask takes the causal kernel's place",
    ),
}
_WHY = {
    DENSE: "every layer runs on all tokens, with the attention kernel and the loss that pruning has",
    STOCK: "dense, with the stock forward: what is not 1 here is the layer loop and, on a CPU, attention in blocks",
    EVERY_LAYER: "tokens leave at every layer but the first; ranked by the layer before each",
    LEARNING: "the same schedule while its keep ratios get a gradient: every key has a bias, heads are 8 wider",
}
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
        return Method(name, KEEPS_ALL, _WHY[name], partial(_pruned, KEEPS_ALL))
    if name == STOCK:
        return Method(name, PruningSchedule(), _WHY[name], lambda model: nullcontext())
    if name in (EVERY_LAYER, LEARNING):
        schedule = _every_layer(layers)
        if name == LEARNING:
            return Method(name, schedule, _WHY[name], partial(_learning, schedule), MEASURES[:1])
        return Method(name, schedule, _WHY[name], partial(_pruned, schedule))
    if name in _PEERS:
        peer = _PEERS[name]
        schedule = fit_preset(PruningSchedule.from_preset(peer.preset), layers)

        def active(model: nn.Module) -> AbstractContextManager[None]:
            return peer_decoder(model, peer.layers, schedule, peer.attention())

        return Method(name, schedule, peer.why, active, MEASURES[:2], peer=True)
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
    return Method(name, schedule, _why(schedule), partial(_pruned, schedule))


def without_choice(method: Method) -> Method | None:
    """What keeps as many tokens at the same layers, the first ones; None where nothing is chosen anyway."""
    if method.peer or not any(stage.method.reads is not Reads.NOTHING for stage in method.schedule.stages):
        return None
    stages = tuple(PruningStage(stage.layer, "first-k", keep=stage.keep) for stage in method.schedule.stages)
    schedule = replace(method.schedule, stages=stages)
    return replace(method, schedule=schedule, active=partial(_pruned, schedule))


def _why(schedule: PruningSchedule) -> str:
    ranked = [stage.criterion for stage in schedule.stages if stage.reads_before]
    places = ", ".join(str(stage.layer) for stage in schedule.stages)
    how = f"ranked by {' and '.join(dict.fromkeys(ranked))} rows of the layer before" if ranked else "nothing is ranked"
    return f"tokens leave at layer {places}; {how}"
