"""Training that goes on from an adapter: its weights and rankings, a new optimizer, and the schedule of the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel

from himap_train.checkpoints.adapter import Adapter, file_name, read_adapter
from himap_train.checkpoints.adapter_parts import adapter_processor
from himap_train.checkpoints.merge import as_saved_here
from himap_train.checkpoints.ranking import give_ranking, require_ranking
from himap_train.checkpoints.same_base import plain, require_same_base
from himap_train.checkpoints.source import adapter_source
from himap_train.models.loading import load_config, load_processor, resolve_model
from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.zero.gather import set_full_value

_SETTINGS = {
    "r": "model.lora_r",
    "lora_alpha": "model.lora_alpha",
    "use_dora": "model.use_dora",
    "use_rslora": "model.use_rslora",
}


def read_start(path: str, base: str) -> Adapter:
    """The adapter at `path`, which was trained on the model at `base`; reads none of that one's weights.

    Args:
        path: Adapter folder, run folder or training checkpoint.
        base: The model that is to be trained.

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: It is damaged, or of another base; says what differs.
    """
    source = adapter_source(path)
    if source is None:
        raise FileNotFoundError(f"model.init_adapter: {path} has no adapter (no adapter_config.json)")
    adapter = read_adapter(source)
    adapter.require_finite(f"model.init_adapter: {source}")
    require_ranking(adapter.ranking, adapter.schedule, f"model.init_adapter: {source}")
    config = load_config(resolve_model(base))
    require_same_base(adapter.base_facts, config, base, adapter.base)
    return as_saved_here(adapter, config, Path(resolve_model(base)))


def rank_from(model: PeftModel, adapter: Adapter, schedule: PruningSchedule, path: str) -> None:
    """Let the rankings that are trained in `model` go on from those of an adapter, at the layers where it has one.

    Raises:
        ValueError: It is of another shape.
    """
    held = {name.partition(".")[0] for name in adapter.ranking}
    stages = tuple(stage for stage in schedule.stages if str(stage.layer) in held)
    give_ranking(model, adapter.ranking, PruningSchedule(stages), f"model.init_adapter: {path}")


def start_from(model: PeftModel, adapter: Adapter, path: str) -> None:
    """Give what is trained in `model` the values of an adapter.

    Raises:
        ValueError: It has another rank, other targets or other parts; says which, and what to set.
    """
    config = model.peft_config["default"].to_dict()
    then = {key: adapter.peft.get(key) or False for key in _SETTINGS}
    differing = [
        f"{name} {then[key]!r}, not {config[key]!r}" for key, name in _SETTINGS.items() if then[key] != config[key]
    ]
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if adapter.peft.get(key)]
    if differing or patterns:
        raise ValueError(
            f"model.init_adapter: {path} was trained with {', '.join([*differing, *patterns])}. Set the same here, or "
            "merge it (recipes/export.py) and train the merged model anew"
        )
    values = adapter.weights
    trained = {file_name(name): weight for name, weight in model.named_parameters() if weight.requires_grad}
    shapes = {name: getattr(weight, "ds_shape", weight.shape) for name, weight in trained.items()}
    wrong = sorted(
        name for name in shapes.keys() | values.keys() if shapes.get(name) != getattr(values.get(name), "shape", None)
    )
    if wrong:
        lacking, further = [n for n in wrong if n not in values], [n for n in wrong if n not in shapes]
        raise ValueError(
            f"model.init_adapter: {path} does not hold what is trained here: {len(lacking)} weights are not in it "
            f"{lacking[:2]}, {len(further)} are not trained here {further[:2]}, "
            f"{len(wrong) - len(lacking) - len(further)} have another shape. It has target_modules "
            f"{plain(adapter.peft.get('target_modules'))!r:.200} and modules_to_save "
            f"{plain(adapter.peft.get('modules_to_save'))}: set model.lora_targets and model.projector alike, or merge "
            "it (recipes/export.py) and give the merged model as model.path"
        )
    for name, weight in trained.items():
        set_full_value(weight, values[name])


def processor_of(path: str, adapter: str | None = None) -> Any:
    """The processor that an adapter was trained with, or the model's own, alone; the weights come later."""
    folder = resolve_model(path)
    config = load_config(folder)
    source = None if adapter is None else adapter_source(adapter)
    return load_processor(folder, config) if source is None else adapter_processor(source, folder, config)
