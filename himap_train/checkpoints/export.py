"""Export: an adapter folder or a merged model from whatever a run left."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from himap_train.checkpoints.adapter import CONFIG_FILE, Adapter, read_adapter
from himap_train.checkpoints.adapter_parts import adapter_processor, resized_tokens
from himap_train.checkpoints.card import adapter_card, merged_card
from himap_train.checkpoints.load import adapter_source
from himap_train.checkpoints.merged import ExportDtype, write_merged
from himap_train.checkpoints.run_facts import run_facts
from himap_train.checkpoints.same_base import require_same_base
from himap_train.models.loading import load_config, local_folder


def _empty(folder: Path) -> Path:
    """`folder`, if nothing is in it."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; choose another folder or remove it")
    return folder


def _base_folder(source: Path | str, adapter: Adapter, base: str | None) -> Path:
    """Where the base model's files are on this machine."""
    try:
        return local_folder(base or adapter.base)
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
    card = adapter_card(adapter.base, adapter.schedule, config, run_facts(source))
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
    """Merge an adapter into its base model, tensor by tensor, and write a stock Hugging Face folder.

    `config.json` gets the schedule under `himap`. A whole model is written anew, in another dtype or other shards.

    Args:
        path: As for `load_checkpoint`.
        folder: Not there yet, or empty.
        base: The base model of an adapter, where it is not at the place that the adapter recorded.
        dtype: Dtype of the weights; "as-base" is that of the base model.
        max_shard_size: Such as "5GB".

    Raises:
        FileExistsError: `folder` is there and not empty.
        FileNotFoundError: The checkpoint or its base is not there or not complete.
        ValueError: The adapter was trained on another base, or cannot be merged; `base` is given for a whole model.
        OSError: The disk is full; nothing is left behind.
    """
    target, source = _empty(Path(folder)), adapter_source(path)
    adapter = None if source is None else read_adapter(source)
    if adapter is None and base is not None:
        raise ValueError(f"{path} is a whole model, which has no base; leave out --base {base}")
    name, place = (str(path), str(path)) if adapter is None else (adapter.base, _base_folder(path, adapter, base))
    card = partial(merged_card, name, run=run_facts(source or Path(path)))
    processor = None
    if adapter is not None and source is not None:
        processor = adapter_processor(source, place, load_config(place))
    write_merged(target, str(place), adapter, card, dtype, max_shard_size, processor)
    return target
