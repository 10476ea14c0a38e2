"""Export: an adapter folder or a merged model from whatever a run left; no model is loaded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from himap_train.checkpoints.adapter import CONFIG_FILE, Adapter, read_adapter
from himap_train.checkpoints.adapter_parts import adapter_processor, resized_tokens
from himap_train.checkpoints.card import model_card
from himap_train.checkpoints.finite import NonFiniteError, not_finite, require_finite
from himap_train.checkpoints.merge import Merger, as_saved_here, embeddings_name, parameter_name
from himap_train.checkpoints.ranking import read_ranking, require_ranking, write_ranking
from himap_train.checkpoints.run_facts import run_facts
from himap_train.checkpoints.same_base import place_of_base, recorded_name, require_same_base
from himap_train.checkpoints.source import adapter_source
from himap_train.checkpoints.weight_files import TensorInfo, plan_shards, read_infos, write_shards
from himap_train.data.end_of_answer import write_end_tokens
from himap_train.models.families import family_of_config
from himap_train.models.families.image_form import write_form
from himap_train.models.loading import load_config, load_processor, local_folder
from himap_train.pruning.reading import schedule_in
from himap_train.storage import atomic_folder

ExportDtype = Literal["as-base", "float32", "bfloat16", "float16"]


def _empty(folder: Path) -> Path:
    """`folder`, if nothing is in it."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; choose another folder or remove it")
    return folder


def _base_folder(source: Path | str, adapter: Adapter, base: str | None) -> Path:
    """Where the base model's files are on this machine."""
    try:
        return local_folder(place_of_base(adapter.peft, base))
    except OSError as error:
        raise FileNotFoundError(
            f"{source} was trained on {adapter.base!r}, and that is not here: {error}. Give its folder with --base"
        ) from error


def export_adapter(path: Path | str, folder: Path | str, *, base: str | None = None) -> Path:
    """Write the adapter of a run or of a training checkpoint to a folder of its own, with schedule and processor.

    Raises:
        FileNotFoundError: `path` has no adapter, or its base model's processor cannot be found.
        FileExistsError: `folder` is there and not empty.
    """
    target, source = _empty(Path(folder)), adapter_source(path)
    if source is None:
        raise FileNotFoundError(f"{path} has no adapter (no {CONFIG_FILE}); a whole model is exported as merged")
    adapter = read_adapter(source)
    place = _base_folder(source, adapter, base)
    config = load_config(place)
    require_same_base(adapter.base_facts, config, str(place), adapter.base)
    adapter = as_saved_here(adapter, config, place)
    adapter = replace(adapter, peft=adapter.peft | {"base_model_name_or_path": recorded_name(adapter.base)})
    card = model_card(adapter.base, adapter.schedule, config, run_facts(source))
    adapter.write(target, card, adapter_processor(source, place, config, resized_tokens(adapter, config)))
    return target


def export_merged(
    path: Path | str,
    folder: Path | str,
    *,
    base: str | None = None,
    dtype: ExportDtype = "as-base",
    max_shard_size: str = "5GB",
) -> Path:
    """Merge an adapter into its base model and write a stock Hugging Face folder; memory holds one tensor at a time.

    `config.json` gets the schedule under `himap`. A whole model is written anew, in another dtype or other shards.

    Args:
        path: As for `load_checkpoint`.
        folder: Not there yet, or empty.
        base: The base model of an adapter, where it is not at the place that the adapter recorded.
        dtype: Dtype of the weights; "as-base" leaves each as it is in the base. Sums are formed in fp32 before.
        max_shard_size: Weights beyond it, such as "5GB", go into several files.

    Raises:
        FileExistsError: `folder` is there and not empty.
        FileNotFoundError: The checkpoint or its base is not there or not complete.
        ValueError: The adapter was trained on another base, cannot be merged or is not used up; `base` is given for a
            whole model.
        NonFiniteError: A weight is nan or inf, or becomes so in `dtype`.
        OSError: No room; nothing is left behind.
    """
    target, found = _empty(Path(folder)), adapter_source(path)
    adapter = None if found is None else read_adapter(found)
    if adapter is None and base is not None:
        raise ValueError(f"{path} is a whole model, which has no base; leave out --base {base}")
    name = str(path) if adapter is None else adapter.base
    source = local_folder(path) if adapter is None else _base_folder(path, adapter, base)
    run = run_facts(found or Path(path))
    processor = None if found is None else adapter_processor(found, source, load_config(source))
    config = _config(source)
    infos = read_infos(source)
    merger = None
    if adapter is not None:
        require_same_base(adapter.base_facts, config, str(source), adapter.base)
        adapter = as_saved_here(adapter, config, source)
        merger = Merger(adapter, family_of_config(config), _tied(config, infos), str(source))
        merger.check_shapes(infos)
        config.himap = adapter.schedule.to_dict()
    shards = plan_shards([replace(info, dtype=_target(info, dtype)) for info in infos], max_shard_size)
    _require_room(target.resolve(), sum(info.bytes for shard in shards.values() for info in shard))
    originals = {info.name: info for info in infos}

    def value(planned: TensorInfo) -> Tensor:
        original = originals[planned.name]
        return _cast(original, merger.value(original) if merger else original.read(), planned.dtype)

    with atomic_folder(target) as temporary:
        write_shards(temporary, shards, value)
        if merger:
            merger.finish()
        _write_rest(temporary, source, config, dtype, processor)
        schedule = schedule_in(getattr(config, "himap", None), source / "config.json")
        ranking = adapter.ranking if adapter else read_ranking(source, schedule)
        require_ranking(ranking, schedule, path)
        write_ranking(temporary, ranking)
        (temporary / "README.md").write_text(model_card(name, schedule, config, run, merged=True), encoding="utf-8")
        if adapter is None and (source / "README.md").is_file():  # the same model in another form
            shutil.copyfile(source / "README.md", temporary / "README.md")
        _empty(target)  # hours may have passed
    return target


def _cast(original: TensorInfo, whole: Tensor, dtype: torch.dtype) -> Tensor:
    """A merged tensor in the dtype that is written.

    Raises:
        NonFiniteError: It holds nan or inf; says since when.
    """
    cast = whole.to(dtype)
    if not_finite([(original.name, cast)]):
        require_finite([(original.name, original.read())], str(original.file), "Fetch the model again")
        require_finite([(original.name, whole)], "the merged model", "The adapter is broken: take another checkpoint")
        raise NonFiniteError(
            f"{original.name} holds values up to {float(whole.abs().max()):.4g}, which {dtype} cannot (its largest is "
            f"{torch.finfo(dtype).max:.4g}); nothing was written. Export with --dtype bfloat16 or float32"
        )
    return cast


def _config(source: Path) -> Any:
    config = load_config(source)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"the weights in {source} are quantised, and LoRA cannot be added to those without loss. Give the original "
            "model with --base"
        )
    return config


def _tied(config: Any, infos: list[TensorInfo]) -> bool:
    """Whether transformers makes `lm_head` of the embeddings: not where the files hold a head that differs from them,
    whatever the config says (some leave the entry out, and their class has True in its place).
    """
    if not any(getattr(part, "tie_word_embeddings", False) for part in (config, config.text_config)):
        return False
    family = family_of_config(config)
    held = {parameter_name(info.name, family): info for info in infos}
    head, embeddings = held.get("lm_head.weight"), held.get(embeddings_name(family))
    return head is None or embeddings is None or torch.equal(head.read(), embeddings.read())


def _target(info: TensorInfo, dtype: ExportDtype) -> torch.dtype:
    """Integers stay integers."""
    return info.dtype if dtype == "as-base" or not info.dtype.is_floating_point else getattr(torch, dtype)


def _require_room(folder: Path, wanted: int) -> None:
    """Hours of copying should not end at the last shard.

    Raises:
        OSError: The disk has less room than the weights need.
    """
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if wanted > free:
        raise OSError(
            f"{folder} needs {wanted / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB free; free some space or "
            "choose another --output"
        )


def _write_rest(folder: Path, source: Path, config: Any, dtype: ExportDtype, processor: Any) -> None:
    """Config, generation config and processor."""
    stock: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    config.architectures = [stock.__name__]
    if dtype != "as-base":
        for part in (config, config.text_config, config.vision_config):
            part.dtype = getattr(torch, dtype)
    config.save_pretrained(str(folder))
    generation = source / "generation_config.json"
    if generation.is_file():  # copied: transformers refuses to write some that it reads
        shutil.copyfile(generation, folder / generation.name)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(str(folder))
    processor = processor or load_processor(source, config)
    processor.save_pretrained(str(folder))
    write_form(folder, processor)
    write_end_tokens(folder, processor)
