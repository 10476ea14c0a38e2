"""`--rehearse`: any config, end to end, in about a minute on the embedded model and its data.

Only what decides size is replaced; targets, projector mode, rates, criteria, checkpointing, metrics stay as the config
has them, so that a mistake in one of them shows before a GPU is rented. With `--data mine` the first of the user's own
records go through it.
"""

from __future__ import annotations

import math
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from transformers import AutoConfig

from himap_train.models.loading import EMBEDDED, resolve_model
from himap_train.models.training_cost import tokens_of_image
from himap_train.pruning.budget import at_strength
from himap_train.pruning.reading import fit_preset, read_schedule
from himap_train.pruning.schedule import PRESET_LAYERS, PruningSchedule
from himap_train.pruning.stage import PruningStage
from himap_train.training.run.launch import say
from himap_train.training.run.strategy_names import strategy_name

_MARK = "REHEARSAL"
STEPS = 4
RECORDS = 24
_MOST_TEXT = {"embedded": 24, "mine": 4096}
"""Text tokens that no question of the embedded data reaches, and few of the user's records on average."""


def rehearse(config: Namespace) -> None:
    """Replace model, data and sizes of a parsed config in place."""
    small: Any = AutoConfig.from_pretrained(resolve_model(EMBEDDED))
    real = config.model.path != EMBEDDED
    if real:
        layers = small.text_config.num_hidden_layers
        for group in (config.model, config.evaluation):
            if group.schedule is not None:
                group.schedule = _scaled(group.schedule, layers)
        curriculum = config.pruning.curriculum
        if curriculum is not None and isinstance(curriculum.phases, list):
            curriculum.phases = [_scaled(phase, layers) for phase in curriculum.phases]
    config.model.path = EMBEDDED
    config.data.max_image_tokens = None  # its images are of one size
    if config.model.quantize is not None and not torch.cuda.is_available():
        say(f"no CUDA device: rehearsing without model.quantize={config.model.quantize}")
        config.model.quantize = None
    text = _MOST_TEXT[config.rehearse]
    _learnable(config, small, text, scaled=real)
    config.loggers = [name for name in config.loggers if name in ("csv", "tensorboard")]
    if config.model.init_adapter is not None and real:
        say(f"rehearsing without model.init_adapter={config.model.init_adapter}: it is of another model")
        config.model.init_adapter = None
    config.output = f"{config.output.rstrip('/')}-rehearsal"
    _possible_budgets(config, small, text)
    if config.rehearse == "embedded":
        _embedded_data(config.data)
    else:  # the small model's tokens are shorter: what fits the real one need not fit here
        config.data.max_length = None
    _small_data(config.data)
    _short_training(config.trainer)
    config.save_every = None if config.save_every is None else 2
    config.evaluation.limit = min(config.evaluation.limit or RECORDS, RECORDS)
    config.evaluation.during = min(config.evaluation.during, 8)


def _scaled(schedule: Any, layers: int) -> dict[str, Any]:
    """What a config names, at the same relative depth: of 32 layers, or of as many as it needs."""
    found = read_schedule(schedule)
    depth = max(PRESET_LAYERS, found.enter + 1, *(stage.layer + 1 for stage in found.stages))
    return found.scaled_to(layers, depth).to_dict()


def _possible_budgets(config: Namespace, small: Any, text: int) -> None:
    """Raise budgets that the embedded model's layers cannot meet; the sample that they are for is one of its own."""
    config.pruning.image_tokens = config.pruning.text_tokens = None
    layers, tokens = small.text_config.num_hidden_layers, (tokens_of_image(small), text)

    def possible(budgets: Any, value: Any) -> list[float]:
        schedule = fit_preset(read_schedule(value), layers)
        if not schedule.stages or any(stage.keep_ratio is None for stage in schedule.stages):
            return budgets  # refused later, with a message
        least = math.ceil(100 * at_strength(schedule, 2.0).cost(small, *tokens).flops_ratio) / 100
        raised = [max(budget, least) if 0.0 < budget < 1.0 else budget for budget in budgets]
        if raised != list(budgets):
            say(f"the small model cannot go below a budget of {least}: rehearsing {list(budgets)} as {raised}")
        return raised

    elastic = config.pruning.elastic
    if elastic is not None:
        elastic.budgets = possible(elastic.budgets, config.model.schedule)
    if config.evaluation.budgets:
        evaluated = config.evaluation.schedule or config.model.schedule
        config.evaluation.budgets = possible(config.evaluation.budgets, evaluated)


def _learnable(config: Namespace, small: Any, text: int, scaled: bool) -> None:
    """Layers at the same relative depth, and a budget that the embedded model can meet."""
    learnable, layers = config.pruning.learnable, small.text_config.num_hidden_layers
    if learnable is None:
        return
    if scaled:
        _scale_learnable(learnable, layers)
    if 1 <= learnable.first_layer < layers and 0.0 < learnable.budget < 1.0:  # else refused later, with a message
        start = PruningSchedule() if learnable.start is None else read_schedule(learnable.start)
        given = (stage for stage in start.before(learnable.first_layer).stages if stage.keep_ratio)
        nothing = PruningSchedule((*given, PruningStage(learnable.first_layer, "uniform", 0.0)))
        least = nothing.cost(small, tokens_of_image(small), text).flops_ratio
        if learnable.budget < least:
            learnable.budget = math.ceil(100 * least) / 100
            say(f"the small model cannot go below a budget of {learnable.budget}: rehearsing that")


def _scale_learnable(learnable: Any, layers: int) -> None:
    """One scale for all of it, and what is given stays before what learns, whatever rounding does."""
    start = PruningSchedule() if learnable.start is None else read_schedule(learnable.start)
    depth = max(PRESET_LAYERS, learnable.first_layer + 1, *(stage.layer + 1 for stage in start.stages))
    given = sum(stage.layer < learnable.first_layer for stage in start.stages)
    found = start.scaled_to(layers, depth).stages
    least = found[given - 1].layer + 1 if given else 1
    first = min(max(least, round(learnable.first_layer * layers / depth)), layers - 1)
    if learnable.start is not None:
        moved = (stage.at(max(stage.layer, first + later)) for later, stage in enumerate(found[given:]))
        inside = (stage for stage in moved if stage.layer < layers)
        learnable.start = PruningSchedule((*found[:given], *inside), start.positions, start.enter).to_dict()
    if learnable.switch_layer is not None:
        learnable.switch_layer = min(max(first, round(learnable.switch_layer * layers / depth)), layers - 1)
    learnable.first_layer = first


def _embedded_data(data: Any) -> None:
    data.train = "embedded:train?fixed=1" if data.cache_image_features else "embedded:train"
    data.validation = None if data.validation is None else "embedded:validation"
    data.test = None if data.test is None else "embedded:test"
    data.image_folder = None


def _small_data(data: Any) -> None:
    data.cache_image_features = True if data.cache_image_features else None  # in the rehearsal's own folder
    data.batch_size = min(data.batch_size, 2)
    data.eval_batch_size = 4
    data.num_workers = min(data.num_workers, 1)
    data.train_limit, data.validation_limit, data.test_limit = 64, 8, RECORDS


def _short_training(trainer: Any) -> None:
    trainer.max_steps = STEPS if trainer.max_steps < 0 else min(trainer.max_steps, STEPS)
    trainer.max_epochs, trainer.max_time = None, None
    trainer.accumulate_grad_batches = min(trainer.accumulate_grad_batches, 2)
    trainer.val_check_interval = 2 * trainer.accumulate_grad_batches
    trainer.check_val_every_n_epoch = None
    trainer.limit_train_batches, trainer.limit_val_batches = None, 2
    trainer.log_every_n_steps = 1
    name = strategy_name(trainer.strategy)
    if name.startswith("deepspeed") and find_spec("deepspeed") is None:
        say(f"not rehearsed: {name} needs DeepSpeed (`pip install -e .[deepspeed]`); ddp takes its place")
        trainer.strategy = "ddp"
    if not torch.cuda.is_available():
        trainer.accelerator, trainer.precision = "cpu", "32-true"
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun has started as many processes as there will be
        trainer.devices = int(os.environ["LOCAL_WORLD_SIZE"])
        trainer.num_nodes = int(os.environ["WORLD_SIZE"]) // trainer.devices
    elif not SLURMEnvironment.detect():  # nor can this be changed
        several = _processes(trainer)
        trainer.devices = min(several, torch.cuda.device_count()) if torch.cuda.is_available() else several
        trainer.num_nodes = 1


def _processes(trainer: Any) -> int:
    """2 where the config trains on several devices, else 1."""
    if isinstance(trainer.strategy, str) and trainer.strategy.startswith("auto"):
        return 2 if trainer.num_nodes > 1 or str(trainer.devices) not in ("1", "auto") else 1
    return 2


def rehearsal_folder(folder: Path) -> None:
    """Take the place of an earlier rehearsal, and of nothing else.

    Raises:
        FileExistsError: The folder holds something else.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / _MARK).exists():
        raise FileExistsError(f"{folder} is in the way of the rehearsal and was not made by one; move it")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _MARK).write_text("Made by finetune.py --rehearse; the next rehearsal replaces this folder.\n", "utf-8")
