"""What a learned ranking is to foresee: on which of the tokens that stay the loss depends.

The gradient that a training step has anyway tells it. If a token's state x is scaled by 1 + e, the loss changes by
e x . dL/dx, summed over all layers that read it: how much the answer owes to the token, to first order. What has left
has no such gradient; the scorer, which sees what a token shows and what is asked, carries over to it, and the half of
what stays that is then chosen by difference, whatever its scores, shows it what it does not look for yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from himap_train.models.installed import give_scorers, scorers_of
from himap_train.models.stock import text_decoder
from himap_train.pruning.layout import TokenCounts, TokenLayout
from himap_train.pruning.learned.scorer import Lesson, Scorer
from himap_train.pruning.methods.base import Members, Seen
from himap_train.pruning.methods.learned import Learned, asked
from himap_train.pruning.schedule import PruningSchedule


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


@contextmanager
def untrained(model: nn.Module, schedule: PruningSchedule) -> Iterator[None]:
    """Inside the block a model ranks as before training."""
    decoder = text_decoder(model)
    trained = scorers_of(decoder)
    give_scorers(decoder, {})
    make_scorers(model, schedule)
    try:
        yield
    finally:
        give_scorers(decoder, trained)


def taught(
    hidden: Tensor, learn: Callable[[Lesson], None], shown: Seen, layout: TokenLayout, counts: TokenCounts
) -> Tensor:
    """The states behind a stage, whose backward pass will give its scorer a lesson.

    Args:
        hidden: (B, L', D), of the tokens that stay.
        learn: Takes the lesson, within the backward pass.
        shown: What the stage's method was shown.
        layout: Of the tokens that stay.
        counts: Their numbers.

    Returns:
        `hidden`, which has a gradient even where nothing before it is trained.
    """
    hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
    states, image = hidden.detach(), Members.of(layout, counts)
    question = asked(image, states, shown)

    def lesson(gradient: Tensor) -> None:
        owed = (states.float() * gradient.float()).sum(2).abs().nan_to_num(0.0, 0.0, 0.0)
        learn(Lesson(question, image.gather(owed)))

    hidden.register_hook(lesson)
    return hidden
