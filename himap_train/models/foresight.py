"""What a learned ranking is to foresee: where the later layers of a dense pass look.

At the layer where tokens leave nothing has read them yet; the layers behind have, each in turn. So a pass without
gradients in which no token leaves shows which of them will matter: the attention that the prompt's last row, from which
the answer starts, pays to each image token, summed over those layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from himap_train.models.install import record_pruning
from himap_train.models.installed import give_scorers, scorers_of
from himap_train.models.stock import text_decoder
from himap_train.pruning.learned.scorer import Asked, Scorer
from himap_train.pruning.methods.base import Members
from himap_train.pruning.methods.learned import Learned, asked
from himap_train.pruning.schedule import PruningSchedule
from himap_train.pruning.stage import PruningStage


@dataclass(frozen=True)
class Lesson:
    """What the scorer of one stage is shown, and what it should answer.

    Attributes:
        asked: As in the stage.
        target: (R, N) fp32, how much later layers look at each image token.
    """

    asked: Asked
    target: Tensor


def learned_layers(schedule: PruningSchedule) -> dict[int, Learned]:
    """The layers of a schedule at which a learned ranking chooses."""
    return {stage.layer: stage.method for stage in schedule.stages if isinstance(stage.method, Learned)}


def make_scorers(model: nn.Module, schedule: PruningSchedule) -> dict[int, Scorer]:
    """Give a model untrained scorers for the layers of a schedule that have none, alike on every rank; all it has."""
    decoder = text_decoder(model)
    scorers = dict(scorers_of(decoder))
    for layer, method in learned_layers(schedule).items():
        if layer not in scorers:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(layer)
                scorers[layer] = method.scorer(decoder.config.hidden_size)
    give_scorers(decoder, scorers)
    return scorers


def lessons(
    model: nn.Module, run: Callable[[PruningSchedule], Any], schedule: PruningSchedule, layers: Sequence[int]
) -> dict[int, Lesson]:
    """What one dense pass teaches the scorers of a schedule, by their layers.

    Args:
        model: Pruned.
        run: Runs a pass of it without gradients, under a schedule, where it is known what is no prompt.
        schedule: What the scorers are for.
        layers: Whose attention is foreseen: layers of the decoder, but not its last; those before a stage are left out
            there.
    """
    stages = learned_layers(schedule)
    watched = {layer + 1 for layer in layers if layer >= min(stages)}  # a stage reads the layer before it
    look = (PruningStage(at, "last_token" if at in watched else "first-k", 1.0) for at in sorted({*stages, *watched}))
    with record_pruning(model, watch=True) as trace:
        run(replace(schedule, stages=tuple(look)))
    found = {}
    for layer in stages:
        shown = trace.shown[layer]
        attention = [seen.scores for at, seen in trace.shown.items() if at in watched and at > layer]
        total = torch.stack([scores for scores in attention if scores is not None]).sum(0)
        found[layer] = Lesson(asked(shown), Members.of(shown.layout, shown.counts).gather(total))
    return found
