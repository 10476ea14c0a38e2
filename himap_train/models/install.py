"""A stock model in and out of pruning: install a schedule, record what is kept, remove it again.

`install_pruning` puts five functions on the instance and leaves classes, weights and state dict alone: the forward of
the whole model, which knows the answers from the labels; that of the inner model (`model.model`), which fused losses
and other trainers call directly and which knows where the images are; what encodes images, which also tells what the
tower looks at where a method asks; the decoder's (see `decoder`); and `generate`, which knows where the prompt ends.
No hook is used, because Lightning's DeepSpeed strategy takes every hook off every module before each validation. Others
replace forwards too (TRL, accelerate): ours calls the one that it found, and where it was itself wrapped it stays in
place and does nothing once pruning is removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from himap_train.models.attention import register_attention
from himap_train.models.decoder import pruned_forward
from himap_train.models.families import family_of
from himap_train.models.families.base import Family
from himap_train.models.installed import InstalledPruning, PruningTrace
from himap_train.models.own_config import give_back_config, give_own_config
from himap_train.models.own_methods import OwnMethod, generate, image_features, inner_forward, whole_forward
from himap_train.models.stock import base_model, text_decoder
from himap_train.pruning.reading import ScheduleArgument, fitted_schedule
from himap_train.pruning.schedule import PruningSchedule


def pruning_of(model: nn.Module) -> InstalledPruning | None:
    """What is installed on a model, None where it is stock."""
    return getattr(text_decoder(model), "himap_pruning", None)


def reads_tower(model: nn.Module) -> bool:
    """Whether the schedule that is installed reads what the vision tower looks at."""
    pruning = pruning_of(model)
    return pruning is not None and pruning.schedule.uses_tower


def install_pruning(model: nn.Module, schedule: PruningSchedule | ScheduleArgument, cpu_blocks: bool = True) -> Any:
    """Prune image tokens inside the decoder of `model` from now on, in every forward and in `generate`.

    Args:
        model: A stock model of a known family (see `himap_train.models.families`) or a PeftModel around one. A schedule
            that it has is replaced.
        schedule: What to remove where: a schedule, a preset's name (fitted to the decoder's depth), a mapping, or a
            YAML file. Without stages (None) the model computes bit for bit what the stock model does.
        cpu_blocks: Whether SDPA runs in blocks on a CPU, see `cpu_attention`.

    Returns:
        The same object.

    Raises:
        TypeError: If `model` is of no known family.
        ValueError: If its decoder or attention implementation is not supported, a stage lies outside the decoder, or
            the family cannot do what the schedule asks for.
    """
    base, decoder = base_model(model), text_decoder(model)
    family = family_of(base)
    check_decoder(family, decoder)
    require_one_gpu(base)
    if not isinstance(schedule, PruningSchedule):
        schedule = fitted_schedule(schedule, decoder.config.num_hidden_layers)
    check_schedule(family, base, schedule)
    remove_pruning(model)
    register_attention(decoder.config._attn_implementation)
    decoder.himap_pruning = InstalledPruning(
        schedule, family, family.image_token_id(base.config), decoder.config, cpu_blocks=cpu_blocks
    )
    give_own_config(decoder)
    # Objects, not closures: a deep copy of the model then runs on the copy's own weights, and it can be pickled.
    decoder.forward = partial(pruned_forward, decoder)
    base.model.forward = OwnMethod(inner_forward, base.model, "forward", base)
    base.model.get_image_features = OwnMethod(image_features, base.model, "get_image_features", base)
    base.forward = OwnMethod(whole_forward, base, "forward", base)
    base.generate = OwnMethod(generate, base, "generate", base)
    return model


def remove_pruning(model: nn.Module) -> Any:
    """Give the stock model back; nothing happens if it is stock already. Returns the same object."""
    base, decoder = base_model(model), text_decoder(model)
    pruning = pruning_of(model)
    if pruning is not None:
        give_back_config(decoder, pruning.config)
        del decoder.himap_pruning, decoder.forward
        own = ((base.model, "forward"), (base.model, "get_image_features"), (base, "forward"), (base, "generate"))
        for module, name in own:
            ours = module.__dict__.get(name)
            if isinstance(ours, OwnMethod):  # else somebody has put theirs around it since, which is not ours to take
                ours.take_off()
    return model


def put_back(model: nn.Module, pruning: InstalledPruning | None) -> None:
    """Leave a model with what `pruning_of` said before: the same object, and all that watches or learns there."""
    remove_pruning(model)
    if pruning is not None:
        install_pruning(model, pruning.schedule)
        text_decoder(model).himap_pruning = pruning


def require_one_gpu(base: nn.Module) -> None:
    """Raise ValueError where accelerate spreads a model's layers over several GPUs."""
    spread = {str(place) for place in (getattr(base, "hf_device_map", None) or {}).values()} - {"cpu", "disk"}
    if len(spread) > 1:
        raise ValueError(
            f"the model's layers lie on several GPUs ({', '.join(sorted(spread))}, by its device_map), and the layer "
            "loop runs on one: load it onto one (device_map={'': 0}), in 4 bits where it is too large; to train over "
            "several, ZeRO-3 (configs/deepspeed/zero3.yaml)"
        )


def check_decoder(family: Family, decoder: nn.Module) -> None:
    """Raise ValueError where the layer loop does not run a decoder of this kind."""
    config: Any = decoder.config
    if config.model_type not in family.decoder_types:
        raise ValueError(
            f"the text decoder is a {type(decoder).__name__} ({config.model_type}); pruning works in family "
            f"{family.name} with {', '.join(family.decoder_types)}"
        )


def check_schedule(family: Family, base: Any, schedule: PruningSchedule) -> None:
    """Raise ValueError where a schedule does not fit a model's decoder, or its family cannot do what it asks for."""
    schedule.validate_for(family.decoder(base).config.num_hidden_layers)
    tower = base.config.vision_config.model_type
    if schedule.uses_tower and tower not in family.towers:
        raise ValueError(
            f"a stage reads what the vision tower looks at, which family {family.name} with the tower {tower} does not "
            "tell; choose a criterion that looks at something else, such as coverage, divprune or instruction"
        )
    if schedule.positions == "renumber" and not family.renumbers:
        raise ValueError(
            f"positions 'renumber' is not defined for family {family.name}, whose position numbers have three axes: "
            "give positions 'keep'"
        )


def change_schedule(model: nn.Module, schedule: PruningSchedule) -> None:
    """Run another schedule from the next forward on, where one is installed; nothing is installed anew.

    Raises:
        ValueError: Nothing is installed, or the schedule does not fit.
    """
    _changeable(model, schedule).schedule = schedule


@contextmanager
def running(model: nn.Module, schedule: PruningSchedule, ratios: Tensor | None = None) -> Iterator[None]:
    """Run another schedule inside the block; afterwards the model has its own back. A backward may come after it.

    Args:
        model: As in `install_pruning`.
        schedule: What runs.
        ratios: Its keep ratio of each layer, (layers,) fp32, where these get a gradient; see `pruning.learned`. The
            schedule then has a stage at each layer from its first on.

    Raises:
        ValueError: Nothing is installed, or the schedule does not fit.
    """
    pruning = _changeable(model, schedule)
    own = pruning.schedule, pruning.ratios
    # No counts: a dense schedule leaves none, and would seem to keep what the last one did.
    pruning.schedule, pruning.ratios, pruning.last = schedule, ratios, None
    try:
        yield
    finally:
        pruning.schedule, pruning.ratios = own


def _changeable(model: nn.Module, schedule: PruningSchedule) -> InstalledPruning:
    """What is installed, and can run a schedule; errors as `change_schedule` says."""
    pruning = pruning_of(model)
    if pruning is None:
        raise ValueError("no schedule to change: call install_pruning(model, schedule) first")
    check_schedule(pruning.family, base_model(model), schedule)
    return pruning


@contextmanager
def record_pruning(model: nn.Module, watch: bool = False) -> Iterator[PruningTrace]:
    """Record what the last prefill or training forward inside the block keeps.

    Args:
        model: What is recorded.
        watch: Record too what each stage was shown, also where nothing leaves.

    Raises:
        ValueError: If no schedule is installed.
    """
    pruning = pruning_of(model)
    if pruning is None:
        raise ValueError("nothing to record: call install_pruning(model, schedule) first")
    trace = PruningTrace(watches=watch)
    pruning.traces.append(trace)
    try:
        yield trace
    finally:
        # By identity: two traces that have recorded nothing yet are equal.
        pruning.traces[:] = [other for other in pruning.traces if other is not trace]
