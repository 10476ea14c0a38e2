"""Which strategy a config asks for, by name or as a class with options, and what does not go with it."""

from __future__ import annotations

import difflib
from contextlib import suppress
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ProgressBar, WeightAveraging
from lightning.pytorch.strategies import StrategyRegistry

from himap_train.models.families import family_of_config
from himap_train.models.published import find_config
from himap_train.models.tower import check_caches
from himap_train.training.precision import full_precision
from himap_train.training.zero.strategy import ZeroStrategy

_CLASSES = {"DDPStrategy": "ddp", "SingleDeviceStrategy": "single_device"}


def register_strategies() -> None:
    """Make `deepspeed_stage_1`, `_2`, `_3` and `_3_offload` mean `ZeroStrategy`."""
    for name, stage, offload in (("1", 1, False), ("2", 2, False), ("3", 3, False), ("3_offload", 3, True)):
        StrategyRegistry.register(f"deepspeed_stage_{name}", ZeroStrategy, override=True, stage=stage, offload=offload)


def strategy_name(strategy: Any) -> str:
    """The registered name of a strategy; of a class with options (`class_path`, `init_args`) the one that means it."""
    if isinstance(strategy, str):
        return strategy
    name = str(strategy["class_path"]).rsplit(".", 1)[-1]
    options = strategy.get("init_args") or {}
    if name in ("ZeroStrategy", "DeepSpeedStrategy"):
        offload = options.get("offload") or options.get("offload_parameters")
        return f"deepspeed_stage_{options.get('stage', 2)}{'_offload' if offload else ''}"
    return _CLASSES.get(name, name)


def require_known(strategy: Any) -> None:
    """Raises ValueError naming the nearest strategy where an unknown one is given."""
    known = ["auto", *StrategyRegistry.available_strategies()]
    if isinstance(strategy, str) and strategy not in known:
        near = difflib.get_close_matches(strategy, known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        usual = "auto, ddp, deepspeed_stage_1, deepspeed_stage_2, deepspeed_stage_3, deepspeed_stage_3_offload"
        raise ValueError(f"trainer.strategy={strategy!r} is unknown{hint} Usual ones: {usual}")
    if any(way in strategy_name(strategy) for way in ("spawn", "fork", "notebook")):
        raise ValueError(
            f"trainer.strategy={strategy_name(strategy)!r} starts processes by copying this one, which its objects do "
            "not survive: give ddp"
        )


def as_list(given: Any) -> list[Any]:
    """`trainer.callbacks` or `trainer.plugins`, of which Lightning takes one alone too."""
    return list(given) if isinstance(given, list | tuple) else [] if given is None else [given]


def own_callbacks(given: Any, terminal: bool) -> list[Callback]:
    """The user's `trainer.callbacks`; without a terminal no progress bars, which Lightning would refuse.

    Raises:
        ValueError: One changes how many micro-batches make a step, which the loader must know ahead, or trains other
            weights than those that are validated and saved.
    """
    callbacks = as_list(given)
    for callback in callbacks:
        if isinstance(callback, GradientAccumulationScheduler):
            raise ValueError(
                "trainer.callbacks: GradientAccumulationScheduler changes the global batch within a run, over whose "
                "tokens losses are averaged: set trainer.accumulate_grad_batches, and start another run with "
                "--model.init_adapter where it is to change"
            )
        if isinstance(callback, WeightAveraging):
            raise ValueError(
                f"trainer.callbacks: {type(callback).__name__} keeps a second model, base weights and all, in every "
                "checkpoint, from which no run could go on: leave it out; a lower model.lora_lr steadies training too"
            )
    return [callback for callback in callbacks if terminal or not isinstance(callback, ProgressBar)]


def settle_trainer(trainer: Any) -> None:
    """Give `trainer.precision` its full name, and refuse what a run here cannot do without.

    Raises:
        ValueError: Names the key and the way out.
    """
    trainer.precision = full_precision(trainer.precision)
    if trainer.fast_dev_run:
        raise ValueError("trainer.fast_dev_run trains a run that nobody wants to keep: give --rehearse in its place")
    if trainer.enable_checkpointing is False:
        raise ValueError("trainer.enable_checkpointing=false: a run keeps last.ckpt to go on from; leave it out")


def refuse_together(config: Any) -> None:
    """Raises ValueError where settings of a parsed config do not go together, before weights are loaded."""
    model, cached, precision = config.model, config.data.cache_image_features, config.trainer.precision
    name, quantize = strategy_name(config.trainer.strategy), model.quantize
    if precision in ("bf16-true", "16-true"):
        raise ValueError(
            f"trainer.precision={precision} would train in half precision, where small updates are rounded away: give "
            "bf16-mixed, which holds frozen weights in bfloat16 too and trained ones in fp32, or 32-true"
        )
    if model.vision_tower != "freeze" and cached:
        raise ValueError(
            f"model.vision_tower={model.vision_tower} changes image features, and data.cache_image_features "
            "keeps them as they were: set data.cache_image_features to null, or model.vision_tower to freeze"
        )
    if cached:
        with suppress(FileNotFoundError):  # told where the model is looked for
            check_caches(family_of_config(find_config(model.path)[0]), model.projector != "freeze")
    if quantize is not None and model.decoder == "train":
        raise ValueError(
            f"model.quantize={quantize} does not go with model.decoder=train: quantised weights cannot be trained. "
            "--model.decoder lora, or --model.quantize null"
        )
    if quantize is not None and name.startswith("deepspeed_stage_3"):
        raise ValueError(
            f"model.quantize={quantize} does not go with ZeRO-3 (trainer.strategy {name}): bitsandbytes weights cannot "
            "be spread over processes. They are small enough for each GPU to hold all of them: --trainer.strategy "
            "deepspeed_stage_2 or ddp; or spread the weights as they are: --model.quantize null"
        )
