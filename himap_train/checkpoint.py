"""Adapters and merged models on disk, each with its pruning schedule beside it.

Two forms. An *adapter* is a PEFT folder (the projector in `modules_to_save` when it was trained) with `pruning.yaml`
and the processor. A *merged* model is a stock Hugging Face LLaVA folder whose `config.json` carries the schedule under
`himap`; stock transformers load it as an ordinary LLaVA and run it dense.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from himap_train.adapter_check import check_adapter
from himap_train.model_card import adapter_card, merged_card
from himap_train.models.embedded import embedded_model_path
from himap_train.models.llava import install_pruning, pruning_of, remove_pruning
from himap_train.models.loading import EMBEDDED, load_llava
from himap_train.pruning.schedule import PruningSchedule
from himap_train.storage import atomic_folder

SCHEDULE_FILE = "pruning.yaml"


class _Saved(Enum):
    AS_SAVED = "as saved"


AS_SAVED: Final = _Saved.AS_SAVED
"""`schedule=AS_SAVED`: prune as the checkpoint was trained."""


def read_schedule(value: str | Path | Mapping[str, Any] | PruningSchedule | None) -> PruningSchedule:
    """A schedule from a preset's name, a mapping, a YAML file, or None for dense.

    Raises:
        ValueError: Unknown preset or key (the nearest is named), or a schedule that cannot be.
        FileNotFoundError: A YAML file that is not there.
    """
    if value is None or isinstance(value, PruningSchedule):
        return value or PruningSchedule()
    if isinstance(value, Mapping):
        return PruningSchedule.from_dict(value)
    if Path(value).suffix in (".yaml", ".yml"):
        return PruningSchedule.from_dict(yaml.safe_load(Path(value).read_text(encoding="utf-8")) or {})
    return PruningSchedule.from_preset(str(value))


def save_adapter(
    model: PeftModel,
    folder: Path | str,
    schedule: PruningSchedule,
    processor: LlavaProcessor | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a PEFT folder with the schedule and the processor in it; what was there before stays until all is written.

    Args:
        model: Whose adapter is written.
        folder: Made, or replaced.
        schedule: Goes into `pruning.yaml`.
        processor: Written too where it is given.
        weights: The trained weights under the model's parameter names, where they are spread over processes and the
            model itself does not have them; see `himap_train.training.gather`.

    Raises:
        ValueError: A tensor to be saved is empty (sharded parameters that nobody gathered).
        OSError: Nothing could be written; an older folder is untouched.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path = base = _portable(str(config.base_model_name_or_path))
    state = {
        name: tensor.detach().cpu()
        for name, tensor in get_peft_model_state_dict(model, weights, save_embedding_layers=False).items()
    }
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    if empty:
        raise ValueError(
            f"{len(empty)} tensors to save are empty, the first is {empty[0]}: gather sharded weights first"
        )
    with atomic_folder(Path(folder)) as temporary:
        # "auto" would ask the hub whether the embeddings were resized
        model.save_pretrained(str(temporary), save_embedding_layers=False, state_dict=weights)
        (temporary / SCHEDULE_FILE).write_text(yaml.safe_dump(schedule.to_dict(), sort_keys=False), encoding="utf-8")
        (temporary / "README.md").write_text(adapter_card(base, schedule), "utf-8")
        if processor is not None:
            processor.save_pretrained(str(temporary))
    return Path(folder)


def _portable(base: str) -> str:
    """The name of a base model as another machine understands it."""
    try:
        return EMBEDDED if Path(base) == embedded_model_path() else base
    except FileNotFoundError:  # installed without the embedded model
        return base


def load_checkpoint(
    path: Path | str,
    schedule: PruningSchedule | None | _Saved = AS_SAVED,
    *,
    base: str | None = None,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
) -> tuple[LlavaForConditionalGeneration | PeftModel, LlavaProcessor]:
    """Load what `finetune` or `export` wrote, a run folder, or any stock LLaVA, with its pruner installed.

    Args:
        path: Adapter folder, run folder (its `adapter/`), merged folder, hub id, or "embedded".
        schedule: Overrides the saved one; None is dense.
        base: The base model of an adapter, where it is not at the place that the adapter recorded.
        dtype: Of the base weights. attn_implementation: as in `load_llava`.
        attn_implementation: "sdpa", "eager", "flash_attention_2" or None.

    Returns:
        The model in evaluation mode and the processor.

    Raises:
        FileNotFoundError: No such checkpoint, or the adapter's base model cannot be found.
        ValueError: Keys of the adapter are missing, renamed or empty.
    """
    folder = Path(path)
    if folder.is_file():
        raise ValueError(
            f"{folder} is a training checkpoint; give the run's `adapter` folder, or resume training from it"
        )
    adapter = _adapter_folder(folder)
    if adapter is None:
        model, processor = load_llava(str(path), dtype=dtype, attn_implementation=attn_implementation)
        saved = PruningSchedule.from_dict(getattr(model.config, "himap", None) or {})
        return install_pruning(
            model, saved if isinstance(schedule, _Saved) else schedule or PruningSchedule()
        ), processor
    folder = adapter
    base = base or str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
    try:
        model, processor = load_llava(base, dtype=dtype, attn_implementation=attn_implementation)
    except OSError as error:
        raise FileNotFoundError(
            f"the adapter {folder} was trained on {base!r}, which cannot be loaded here: {error}. "
            "Pass base=<local folder>"
        ) from error
    peft_model = PeftModel.from_pretrained(model, str(folder))
    check_adapter(peft_model, folder)
    file = folder / SCHEDULE_FILE
    saved = read_schedule(file) if file.is_file() else PruningSchedule()
    install_pruning(peft_model, saved if isinstance(schedule, _Saved) else schedule or PruningSchedule())
    return peft_model.eval(), processor


def _adapter_folder(path: Path) -> Path | None:
    """`path` itself or the adapter of the run in it; None where there is none."""
    return next((folder for folder in (path, path / "adapter") if (folder / "adapter_config.json").is_file()), None)


def _empty(folder: Path) -> Path:
    """`folder`, if nothing is in it."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; choose another folder or remove it")
    return folder


def copy_adapter(path: Path | str, folder: Path | str) -> Path:
    """Copy the adapter of a run, with its schedule and processor, to a folder of its own.

    Raises:
        FileNotFoundError: `path` has no adapter.
        FileExistsError: `folder` is there and not empty.
    """
    source = _adapter_folder(Path(path))
    if source is None:
        raise FileNotFoundError(f"{path} has no adapter (no adapter_config.json)")
    with atomic_folder(_empty(Path(folder))) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
    return Path(folder)


def export_merged(path: Path | str, folder: Path | str, *, base: str | None = None) -> Path:
    """Merge an adapter into its base model and write a stock Hugging Face folder.

    Reads `path` from disk, so that what is exported is what was saved. `config.json` gets the schedule under `himap`.

    Raises:
        FileExistsError: `folder` is there and not empty.
    """
    folder = _empty(Path(folder))
    model, processor = load_checkpoint(path, base=base)
    installed = pruning_of(model)
    schedule = installed.schedule if installed else PruningSchedule()
    remove_pruning(model)
    merged = model.merge_and_unload(safe_merge=True) if isinstance(model, PeftModel) else model
    merged.config.himap = schedule.to_dict()
    with atomic_folder(folder) as temporary:
        merged.save_pretrained(str(temporary))
        processor.save_pretrained(str(temporary))
        (temporary / "README.md").write_text(merged_card(str(path), schedule), encoding="utf-8")
    return folder
