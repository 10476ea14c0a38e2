"""A learned ranking on disk: in a file and a folder of its own, which no loader of a model or an adapter looks into."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from himap_train.models.families.processing import stock_file
from himap_train.models.foresight import learned_layers
from himap_train.models.installed import give_scorers, scorers_of
from himap_train.models.stock import text_decoder
from himap_train.pruning.schedule import PruningSchedule
from himap_train.structured import named

RANKING_FILE = "himap/ranking.safetensors"
"""Beside the weights: vLLM and others take every `*.safetensors` of a model's folder for weights of it."""


def ranking_of(model: nn.Module, schedule: PruningSchedule) -> dict[str, Tensor]:
    """Weights of what ranks at the learned stages of a schedule, `LAYER.name`, on the CPU."""
    scorers = scorers_of(text_decoder(model))
    return {
        f"{layer}.{name}": tensor.detach().cpu().clone()
        for layer in learned_layers(schedule)
        if layer in scorers
        for name, tensor in scorers[layer].state_dict().items()
    }


def give_ranking(model: nn.Module, weights: Mapping[str, Tensor], schedule: PruningSchedule, where: Path | str) -> None:
    """Let a model rank by these weights, which came from `where`, at the learned stages of a schedule.

    Raises:
        ValueError: They are of another ranking.
    """
    decoder = text_decoder(model)
    scorers = dict(scorers_of(decoder))
    with named(where, "has another ranking than its schedule and its model ask for"):
        for layer, method in learned_layers(schedule).items():
            mine = f"{layer}."
            scorers[layer] = method.scorer(decoder.config.hidden_size)
            scorers[layer].load_state_dict({k.removeprefix(mine): v for k, v in weights.items() if k.startswith(mine)})
    give_scorers(decoder, scorers)


def write_ranking(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the file; none where nothing ranks."""
    if weights:
        (folder / RANKING_FILE).parent.mkdir(exist_ok=True)
        save_file(dict(weights), folder / RANKING_FILE)


def read_ranking(source: Path | str, schedule: PruningSchedule) -> dict[str, Tensor]:
    """The weights for the learned stages of a schedule, of a folder or a model on the hub; none where it has none.

    Raises:
        ValueError: They are damaged.
    """
    file = stock_file(str(source), RANKING_FILE, ours=True) if learned_layers(schedule) else None
    if file is None:
        return {}
    with named(file, "is damaged"):
        return load_file(file)


def require_ranking(weights: Mapping[str, Tensor], schedule: PruningSchedule, source: Path | str) -> None:
    """Raise FileNotFoundError where there is none and a schedule asks for it."""
    if learned_layers(schedule) and not weights:
        raise FileNotFoundError(
            f"{source} has no {RANKING_FILE}, by which its schedule ranks: export it anew from its run with "
            "recipes/export.py, or give another schedule"
        )
