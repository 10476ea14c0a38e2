"""A stock Hugging Face folder from a base model's files and, where there is one, an adapter; no model is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from himap_train.checkpoints.adapter import Adapter
from himap_train.checkpoints.finite import NonFiniteError, not_finite, require_finite
from himap_train.checkpoints.generation_file import write_end_tokens
from himap_train.checkpoints.merge import Merger, parameter_name
from himap_train.checkpoints.ranking import read_ranking, write_ranking
from himap_train.checkpoints.same_base import require_same_base
from himap_train.checkpoints.weight_files import TensorInfo, parse_size, plan_shards, read_infos, write_shards
from himap_train.models.families import family_of_config
from himap_train.models.loading import load_config, load_processor, local_folder
from himap_train.pruning.reading import schedule_in
from himap_train.pruning.schedule import PruningSchedule
from himap_train.storage import atomic_folder

ExportDtype = Literal["as-base", "float32", "bfloat16", "float16"]
CardWriter = Callable[[PruningSchedule, Any], str]


def write_merged(
    folder: Path,
    base: str,
    adapter: Adapter | None,
    write_card: CardWriter,
    dtype: ExportDtype = "as-base",
    max_shard_size: str = "5GB",
    processor: Any = None,
) -> None:
    """Write a merged model; memory holds one tensor at a time.

    Args:
        folder: Replaced when all is written.
        base: The base model, or, without an adapter, the model to write anew.
        adapter: What is merged into it.
        write_card: The README.md for a schedule and a config.
        dtype: Dtype of the weights; "as-base" leaves each as it is in the base. Sums are formed in fp32 before.
        max_shard_size: Weights beyond it go into several files.
        processor: What is written in place of the base's.

    Raises:
        FileNotFoundError: The base or one of its files is not there.
        ValueError: The adapter was trained on another base, is no plain LoRA, or is not used up.
        NonFiniteError: A weight is nan or inf, or becomes so in `dtype`.
        OSError: No room; nothing is left behind.
    """
    max_bytes = parse_size(max_shard_size)
    source = local_folder(base)
    config = _config(source)
    infos = read_infos(source)
    merger = None
    if adapter is not None:
        require_same_base(adapter.base_facts, config, base, adapter.base)
        merger = Merger(adapter, family_of_config(config), _tied(config, infos), base)
        merger.check_shapes(infos)
        config.himap = adapter.schedule.to_dict()
    shards = plan_shards([replace(info, dtype=_target(info, dtype)) for info in infos], max_bytes)
    _require_room(folder, sum(info.bytes for shard in shards for info in shard))
    originals = {info.name: info for info in infos}

    def value(planned: TensorInfo) -> Tensor:
        original = originals[planned.name]
        whole = merger.value(original) if merger else original.read()
        cast = whole.to(planned.dtype)
        if not_finite([(planned.name, cast)]):
            require_finite([(planned.name, original.read())], str(original.file), "Fetch the model again")
            require_finite(
                [(planned.name, whole)], "the merged model", "The adapter is broken: take another checkpoint"
            )
            raise NonFiniteError(
                f"{planned.name} holds values up to {float(whole.abs().max()):.4g}, which {planned.dtype} cannot (its "
                f"largest is {torch.finfo(planned.dtype).max:.4g}); nothing was written. Export with --dtype bfloat16 "
                "or float32"
            )
        return cast

    with atomic_folder(folder) as temporary:
        write_shards(temporary, shards, value)
        if merger:
            merger.finish()
        _write_rest(temporary, source, config, dtype, processor)
        schedule = schedule_in(getattr(config, "himap", None), source / "config.json")
        write_ranking(temporary, adapter.ranking if adapter else read_ranking(source, schedule))
        (temporary / "README.md").write_text(write_card(schedule, config), encoding="utf-8")


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
    head, embeddings = held.get("lm_head.weight"), held.get("model.language_model.embed_tokens.weight")
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
    write_end_tokens(folder, processor)
