"""Learnable keep ratios: at which layer each share of the image tokens leaves, under a budget on the whole prefill.

One weight per layer from the first on, and one for the tokens that never leave. Their softmax p says which share of
the image tokens leaves where; a layer keeps what has not left, `1 - (p_first + ... + p_layer)`, so ratios never grow
with depth and every p has the same standing. A step follows the gradient of the loss by p (exponentiated gradient),
and then the weights are tilted by what leaving at a layer costs, `p_i ~ w_i exp(-t c_i)`, with the one t at which the
prefill costs what the budget says. That tilt is the exact projection in the Kullback-Leibler sense, t is the multiplier
of the constraint: there is no penalty to tune, and the budget holds after every step.

The weights live on the host, in double precision, outside the model: every rank computes the same from the same
gradient, whatever the strategy does with parameters. Numbers in the end are a plain `PruningSchedule`: see `freeze`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from himap_train.pruning.budget import check_budget
from himap_train.pruning.cost import choosing_flops, image_tokens_per_layer, layer_flops
from himap_train.pruning.learned.freezing import frozen_schedule, share_left
from himap_train.pruning.methods.base import Method
from himap_train.pruning.schedule import PruningSchedule
from himap_train.pruning.stage import PruningStage

_HALVINGS, _STEEPEST = 60, 1e4
_ELSEWHERE = 0.1
"""Share of the tokens that a start spreads over all layers: what is zero would never grow."""
_MEAN_DECAY, _SQUARE_DECAY = 0.9, 0.99


class KeepRatios:
    """The keep ratio of every layer of one decoder.

    Args:
        config: Configuration of a LLaVA or a Llama-like text decoder.
        budget: `flops_ratio` of the whole prefill, text included, that the ratios end at.
        first_layer: First layer at whose input tokens may leave.
        switch_layer: From this layer on the deep criterion ranks.
        shallow: Criterion before the switch layer.
        deep: Criterion from there on.
        image_tokens: Image tokens of the sample that the budget is for.
        text_tokens: Its other tokens.
        step_size: How far the log weights move in a step.
        start: A schedule whose ratios the shares start from, with a little of everything else; None: all alike. What
            leaves before `first_layer`, by any method, is not learned: shares are of what that leaves.

    Raises:
        ValueError: A layer outside the decoder, an unknown criterion, or a budget that no ratios can meet.
    """

    def __init__(
        self,
        config: Any,
        budget: float,
        first_layer: int,
        switch_layer: int,
        shallow: str | Method = "instruction",
        deep: str | Method = "image",
        image_tokens: int = 576,
        text_tokens: int = 115,
        step_size: float = 0.05,
        start: PruningSchedule | None = None,
    ) -> None:
        self.config = getattr(config, "text_config", config)
        self.layers: int = self.config.num_hidden_layers
        for name, layer in (("first_layer", first_layer), ("switch_layer", switch_layer)):
            if not 1 <= layer < self.layers:
                raise ValueError(
                    f"{name} is {layer}; expected a layer of the decoder, 1 to {self.layers - 1} "
                    "(learned ratios need the attention of the layer before)"
                )
        if switch_layer < first_layer:
            raise ValueError(f"switch_layer {switch_layer} lies before first_layer {first_layer}")
        self.budget, self.target = budget, 1.0
        self.first_layer, self.switch_layer = first_layer, switch_layer
        self.criteria = (shallow, deep)
        self.image_tokens, self.text_tokens = image_tokens, text_tokens
        self.step_size = step_size
        self._check_criteria()
        if image_tokens == 0:
            raise ValueError("no record has an image: there is nothing to prune")
        self._form = self._given_form(start)
        self._given_choosing = self._choosing(self._form)
        check_budget(budget, least=self._flops_ratio(self._kept(self._everything_leaves())), first_layer=first_layer)
        most = self._flops_ratio(self._kept(self._nothing_leaves()))
        if budget > most:
            raise ValueError(
                f"the budget {budget} is above {most:.3f}, what the stages of start before first_layer {first_layer} "
                "leave: give them higher ratios, or a lower budget"
            )
        self._weights = self._start(start)
        self._mean, self._square, self._steps = torch.zeros_like(self._weights), 0.0, 0

    def _start(self, schedule: PruningSchedule | None) -> Tensor:
        number = self.layers - self.first_layer + 1
        if schedule is None:
            return torch.zeros(number, dtype=torch.float64)
        kept = torch.ones(number, dtype=torch.float64)
        for stage in schedule.stages[len(self._form.stages) :]:
            kept[stage.layer - self.first_layer :] = (stage.keep_ratio or 0.0) / self._entering
        kept[-1] = 0.0  # the last share is that of all that is left
        before = torch.cat([kept.new_ones(1), kept[:-1]])
        return ((1 - _ELSEWHERE) * (before - kept) + _ELSEWHERE / number).log()

    def _given_form(self, schedule: PruningSchedule | None) -> PruningSchedule:
        """What is not learned: the stages before the first layer that learns, and how positions are counted."""
        if schedule is None:
            return PruningSchedule()
        schedule.validate_for(self.layers)
        if schedule.enter:
            raise ValueError(f"start has image tokens enter at layer {schedule.enter}; leave `enter` out of it")
        given = schedule.before(self.first_layer)
        unfit = any(stage.keep_ratio is None or stage.waits for stage in schedule.stages)
        unfit = unfit or any(stage.method.learns for stage in schedule.stages[len(given.stages) :])
        if unfit or any(stage.removes_all for stage in given.stages):
            raise ValueError(
                f"start has the stages {schedule.to_dict()['stages']}; expected a keep_ratio in each, above 0 before "
                f"first_layer {self.first_layer}, none that waits, and no learned ranking from there on"
            )
        return given

    @property
    def _entering(self) -> float:
        """Share of the image tokens that the first layer that learns is given."""
        return share_left(self._form)

    def _check_criteria(self) -> None:
        for criterion in self.criteria:
            method = PruningStage(self.first_layer, criterion, 1.0).method  # refuses unknown ones
            if method.merges or not method.ranks:
                raise ValueError(
                    f"criterion {str(method)!r} chooses a set whose members depend on its size, so a keep ratio has no "
                    "gradient under it; give one that ranks, such as instruction or image"
                )

    def ratios(self) -> Tensor:
        """Keep ratio of each layer, (layers,) fp64; their `flops_ratio` is the target."""
        return self._kept(self._shares())

    def schedule(self, ratios: Tensor) -> PruningSchedule:
        """As `ratios()` run while they are learned: a stage at every layer from the first on."""
        layers = range(self.first_layer, self.layers)
        kept = ratios.tolist()
        learned = (PruningStage(layer, self._criterion(layer), kept[layer]) for layer in layers)
        return replace(self._form, stages=(*self._form.stages, *learned))

    def step(self, gradient: Tensor) -> None:
        """Move the shares against a gradient of the loss; one that is not finite moves nothing.

        Args:
            gradient: (layers,) of the loss by the ratios.
        """
        if not bool(torch.isfinite(gradient).all()):
            return
        behind = gradient.double().cpu()[self.first_layer :].flip(0).cumsum(0).flip(0)
        by_share = torch.cat([-behind, behind.new_zeros(1)])  # a share that leaves lowers this ratio and all behind it
        # Only differences between shares matter: they add up to one.
        by_share = by_share - by_share.mean()
        self._steps += 1
        self._mean = _MEAN_DECAY * self._mean + (1 - _MEAN_DECAY) * by_share
        self._square = _SQUARE_DECAY * self._square + (1 - _SQUARE_DECAY) * float(by_share.square().mean())
        mean = self._mean / (1 - _MEAN_DECAY**self._steps)
        scale = (self._square / (1 - _SQUARE_DECAY**self._steps)) ** 0.5  # one for all: noise must not be evened out
        if scale > 0:
            self._weights = self._weights - self.step_size * mean / scale

    def freeze(self, tolerance: float = 0.02) -> PruningSchedule:
        """A plain schedule with few stages that meets the target, see `freezing`."""
        stages = [
            PruningStage(layer, self._criterion(layer), ratio)
            for layer, ratio in enumerate(self.ratios().tolist()[self.first_layer :], self.first_layer)
        ]
        sample = (self.image_tokens, self.text_tokens)
        return frozen_schedule(self._form, stages, self.config, self.target, sample, tolerance)

    def cost(self, schedule: PruningSchedule) -> float:
        """`flops_ratio` of the sample that the budget is for."""
        return schedule.cost(self.config, self.image_tokens, self.text_tokens).flops_ratio

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers."""
        return {"weights": self._weights, "mean": self._mean, "square": self._square, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        self._weights, self._mean = state["weights"].clone(), state["mean"].clone()
        self._square, self._steps = float(state["square"]), int(state["steps"])

    def _criterion(self, layer: int) -> str | Method:
        return self.criteria[layer >= self.switch_layer]

    def _shares(self) -> Tensor:
        """Which share leaves at each layer, the last one never: the weights tilted to the target."""
        if self.target >= 1.0:
            return self._nothing_leaves()
        lived = torch.arange(len(self._weights), dtype=torch.float64) / (len(self._weights) - 1)
        low, high = -_STEEPEST, _STEEPEST
        for _ in range(_HALVINGS):
            tilt = (low + high) / 2
            shares = torch.softmax(self._weights - tilt * lived, 0)
            low, high = (tilt, high) if self._flops_ratio(self._kept(shares)) > self.target else (low, tilt)
        return torch.softmax(self._weights - high * lived, 0)

    def _everything_leaves(self) -> Tensor:
        """All tokens leave at the first layer."""
        return self._nothing_leaves().flip(0)

    def _nothing_leaves(self) -> Tensor:
        """All tokens stay to the end."""
        number = self.layers - self.first_layer + 1
        return torch.nn.functional.one_hot(torch.tensor(number - 1), number).double()

    def _kept(self, shares: Tensor) -> Tensor:
        kept = torch.ones(self.layers, dtype=torch.float64)
        for stage in self._form.stages:
            kept[stage.layer :] = stage.keep_ratio or 0.0
        kept[self.first_layer :] *= (1 - shares[:-1].cumsum(0)).clamp(0, 1)
        return kept

    def _flops_ratio(self, ratios: Tensor) -> float:
        """Smooth in the ratios; ranking at every learned layer, of which few are left then, is left to `freeze`."""
        lengths = self.text_tokens + self.image_tokens * ratios
        flops = [layer_flops(self.config, length) for length in lengths.tolist()]
        dense = self.layers * layer_flops(self.config, self.text_tokens + self.image_tokens)
        return (sum(flops) + self._given_choosing) / dense

    def _choosing(self, schedule: PruningSchedule) -> float:
        layers = image_tokens_per_layer(schedule, self.layers, self.image_tokens)
        return choosing_flops(schedule, self.config, layers, self.image_tokens, self.text_tokens)
