"""Adapters and merged models on disk, each with its pruning schedule beside it.

Two forms. An *adapter* is a PEFT folder (the projector in `modules_to_save` when it was trained) with `pruning.yaml`
and the processor. A *merged* model is a stock Hugging Face folder whose `config.json` carries the schedule under
`himap`; stock transformers load it as an ordinary model of its family and run it dense.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from himap_train.checkpoints.adapter import CONFIG_FILE, adapter_of, read_adapter
from himap_train.checkpoints.adapter_parts import adapter_processor, check_adapter, check_patterns, resized_tokens
from himap_train.checkpoints.card import model_card
from himap_train.checkpoints.merge import as_saved_here
from himap_train.checkpoints.ranking import give_ranking, read_ranking, require_ranking
from himap_train.checkpoints.run_facts import run_facts
from himap_train.checkpoints.same_base import place_of_base, require_same_base
from himap_train.checkpoints.source import adapter_source
from himap_train.data.end_of_answer import end_token_ids
from himap_train.models.install import install_pruning, pruning_of
from himap_train.models.loading import load_config, load_llava, resolve_model
from himap_train.models.stock import base_model
from himap_train.models.whole import remember_in_place
from himap_train.pruning.reading import ScheduleArgument, read_schedule, schedule_in
from himap_train.pruning.schedule import PruningSchedule
from himap_train.storage import atomic_file
from himap_train.structured import named, read_json

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
AS_SAVED: Final = "as-saved"
"""`schedule=AS_SAVED`: prune as the checkpoint was trained."""
Wanted = PruningSchedule | ScheduleArgument
"""A schedule, or what names one; `AS_SAVED` among the names."""


def save_adapter(
    model: PeftModel,
    folder: Path | str,
    schedule: PruningSchedule,
    processor: Any = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a PEFT folder with the schedule and the processor in it; what was there before stays until all is written.

    Args:
        model: Whose adapter is written.
        folder: Made, or replaced.
        schedule: Goes into `pruning.yaml`.
        processor: Written too where it is given.
        weights: The trained weights under the model's parameter names, where they are spread over processes and the
            model itself does not have them; see `himap_train.training.zero.gather`.

    Raises:
        ValueError: A tensor to be saved is empty (sharded parameters that nobody gathered).
        OSError: Nothing could be written; an older folder is untouched.
    """
    adapter, target = adapter_of(model, schedule, weights), Path(folder)
    card = model_card(adapter.base, schedule, base_model(model).config, run_facts(target.parent))
    adapter.write(target, card, processor)
    return target


def write_card(folder: Path, config: Any) -> None:
    """Write an adapter folder's README.md anew, with the scores that its run has measured since.

    Args:
        folder: Of the adapter, in the folder of its run.
        config: Configuration of the base model.
    """
    adapter = read_adapter(folder)
    with atomic_file(folder / "README.md") as file:
        file.write_text(model_card(adapter.base, adapter.schedule, config, run_facts(folder)), encoding="utf-8")


def load_checkpoint(
    path: Path | str,
    schedule: Wanted = AS_SAVED,
    *,
    base: str | None = None,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel | PeftModel, Any]:
    """Load what `finetune` or `export` wrote, or any stock model of a known family, with its pruner installed.

    Args:
        path: Adapter folder, run folder (its `adapter/`), training checkpoint, merged folder, hub id, or "embedded".
        schedule: Overrides the saved one, as in `install_pruning`; None is dense.
        base: The base model of an adapter, where it is not at the place that the adapter recorded.
        dtype: Dtype of the base weights. attn_implementation: as in `load_llava`.
        attn_implementation: "sdpa", "eager", "flash_attention_2" or None.

    Returns:
        The model in evaluation mode and the processor.

    Raises:
        FileNotFoundError: No such checkpoint, a file of it is gone, or the adapter's base model cannot be found.
        ValueError: Keys of the adapter are missing, renamed, empty or no numbers, its tokenizer does not fit, or it was
            trained on another base; where that is of another family both are named.
    """
    if schedule != AS_SAVED:
        read_schedule(schedule)  # a misspelt name fails before weights are read
    how: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    source = adapter_source(path)
    if source is None:
        model, processor = load_llava(str(path), **how)
        saved = schedule_in(getattr(model.config, "himap", None), f"{path}, `himap` of config.json")
        return _pruned(model, saved, read_ranking(path, saved), schedule, path), processor
    adapter = read_adapter(source)
    adapter.require_finite(str(source))
    place = place_of_base(adapter.peft, base)
    try:
        # before weights are read: another family has other modules, and minutes may be lost
        config = load_config(resolve_model(place))
        require_same_base(adapter.base_facts, config, place, adapter.base)
        read, adapter = adapter, as_saved_here(adapter, config, Path(resolve_model(place)))
        tokens = resized_tokens(adapter, config)
        processor = adapter_processor(source, resolve_model(place), config, tokens)
        model, _ = load_llava(place, processor=processor, **how)
    except OSError as error:
        place_named = ", which" if base is None else f", and base={base!r}"
        raise FileNotFoundError(
            f"the adapter {source} was trained on {adapter.base!r}{place_named} cannot be loaded here: {error}. "
            "Pass base=<local folder>, or write where it is into its adapter_config.json as `base_model_name_or_path`"
        ) from error
    if schedule == AS_SAVED and not adapter.says_schedule and adapter.schedule.dense:
        warnings.warn(f"{source} has no pruning.yaml, as PEFT alone writes it: it runs dense", stacklevel=2)
    if tokens is not None:  # every new row is in the adapter
        model.resize_token_embeddings(tokens, mean_resizing=False)
    model.config.himap = adapter.schedule.to_dict()  # so that it stays where the adapter is merged and saved by PEFT
    if source.is_file() or read.weights.keys() != adapter.weights.keys():
        with tempfile.TemporaryDirectory() as folder:
            adapter.write(Path(folder) / "adapter", card="")
            peft_model = _with_adapter(model, Path(folder) / "adapter", source)
    else:
        peft_model = _with_adapter(model, source, source)
    remember_in_place(peft_model, adapter.weights.keys())
    generation: Any = model.generation_config  # training taught it to end there
    generation.eos_token_id = end_token_ids(processor, generation.eos_token_id)
    return _pruned(peft_model, adapter.schedule, adapter.ranking, schedule, source).eval(), processor


def load_with_schedule(
    checkpoint: str = "embedded", schedule: ScheduleArgument = AS_SAVED, dtype: Dtype = "auto", device: str = "auto"
) -> tuple[Any, Any]:
    """As `load_checkpoint`, under the schedule that a command line asks for, on a device.

    Args:
        checkpoint: "embedded", a run or adapter folder, a merged folder, or any stock LLaVA (folder or hub name).
        schedule: as-saved, none, a preset (himap, fastv, ...), a pruning.yaml, or the stages inline.
        dtype: Dtype of the weights; "auto" as they are stored.
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", ...

    Raises:
        FileNotFoundError: The checkpoint or the schedule's file is not there.
        ValueError: The schedule is unknown or does not fit the decoder.
    """
    place = usable_device(device)
    model: Any
    model, processor = load_checkpoint(checkpoint, schedule, dtype=dtype)
    return model.to(place).eval(), processor


def usable_device(device: str) -> str:
    """A device that this machine has; "auto" is the GPU where there is one.

    Raises:
        ValueError: It has no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {device!r} cannot be used here ({str(error).splitlines()[0]}): give auto or cpu"
        ) from error
    return device


def installed_schedule(model: nn.Module) -> PruningSchedule:
    """The schedule that is installed on a model, without stages where there is none."""
    pruning = pruning_of(model)
    return pruning.schedule if pruning else PruningSchedule()


def _pruned(
    model: Any, saved: PruningSchedule, ranking: Mapping[str, torch.Tensor], wanted: Wanted, path: Path | str
) -> Any:
    """The model under the schedule that is wanted; it keeps the ranking that it was saved with, whatever runs."""
    if wanted == AS_SAVED:
        require_ranking(ranking, saved, path)
    if ranking:
        give_ranking(model, ranking, saved, path)
    if wanted != AS_SAVED:
        return install_pruning(model, wanted)
    with named(path, "was saved with a schedule that does not fit its model"):
        return install_pruning(model, saved)


def _with_adapter(model: PreTrainedModel, folder: Path, source: Path) -> PeftModel:
    """The model with the adapter in a folder, which came from `source`."""
    with named(source, "is no adapter of its base model"):
        check_patterns(read_json(folder / CONFIG_FILE), [name for name, _ in model.named_modules()], source)
        peft_model = PeftModel.from_pretrained(model, str(folder))
    check_adapter(peft_model, folder)
    return peft_model
