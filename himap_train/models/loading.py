"""Load a stock Hugging Face model of a known family and its processor from a folder, the hub or this package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_session, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig

from himap_train.embedded.model import EMBEDDED_MODELS, embedded_model_path
from himap_train.models.families import family_of_config
from himap_train.models.families.image_form import read_form
from himap_train.models.model_files import check_files
from himap_train.models.quantize import Quantize, quantization_config
from himap_train.models.templates import check_template
from himap_train.models.versions import feature_layers
from himap_train.models.weight_headers import opened, weight_files
from himap_train.structured import named

EMBEDDED = "embedded"
_WRONG = ("missing_keys", "unexpected_keys", "mismatched_keys")


def load_llava(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    quantize: Quantize | None = None,
    processor: Any = None,
) -> tuple[Any, Any]:
    """Load a model of a known family (LLaVA and its like) as it is, in evaluation mode.

    Args:
        path: A local folder, a model id on the Hugging Face hub, or "embedded" or "embedded-fine" for
            a small LLaVA in this package.
        dtype: As stored ("auto"), or a torch dtype or its name.
        attn_implementation: "sdpa", "eager" or "flash_attention_2"; None lets transformers choose.
        quantize: "4bit" stores the decoder's linear layers in 4 bits (see `quantize`).
        processor: Its processor, where that is loaded already.

    Returns:
        The model and its processor.

    Raises:
        FileNotFoundError: If the weights cannot be reached; the message names the ways out.
        ValueError: If the checkpoint is of no known family or lacks weights, or it cannot be quantised here.
    """
    folder = resolve_model(path)
    config = load_config(folder)
    quantization = None if quantize is None else quantization_config(family_of_config(config), dtype)
    if processor is None:
        processor = load_processor(folder, config)
    for file in weight_files(Path(folder)) if Path(folder).is_dir() else ():
        with opened(file):
            pass
    with named(folder, "holds a model that transformers cannot load"):
        model, wrong = stock_model(
            folder, dtype=dtype, attn_implementation=attn_implementation, quantization_config=quantization
        )
    if wrong["mismatched_keys"]:
        raise ValueError(
            f"{path} has {len(wrong['mismatched_keys'])} weights of other shapes than its config.json asks for, the "
            f"first is {wrong['mismatched_keys'][0]}; fetch the model again"
        )
    missing = wrong["missing_keys"]
    if missing:  # transformers would leave them random
        raise ValueError(
            f"{path} has no weights for {len(missing)} parameters, the first is {missing[0]}; fetch the model again"
        )
    return model.eval(), processor


def load_config(folder: str | Path) -> Any:
    """The configuration of a model of a known family, from what `resolve_model` returned.

    Raises:
        ValueError: If it is of no known family, or in the original LLaVA layout.
    """
    check_files(Path(folder))
    written, _ = PretrainedConfig.get_config_dict(folder)
    _refuse_original_layout(folder, written)
    with named(Path(folder) / "config.json", "is no configuration of a model"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    try:
        family_of_config(config)
    except ValueError as error:
        raise ValueError(f"{folder} holds {error}") from error
    layers, depth = feature_layers(config), getattr(config.vision_config, "num_hidden_layers", None)
    chosen = [layers] if isinstance(layers, int) else layers
    if depth is not None and not all(-depth - 1 <= layer <= depth for layer in chosen):
        raise ValueError(
            f"{Path(folder) / 'config.json'}: `vision_feature_layer` is {layers}, but the tower's layers are {depth}"
        )
    return config


def _refuse_original_layout(folder: str | Path, written: dict[str, Any]) -> None:
    """Raise ValueError for a checkpoint as LLaVA's own code writes it: it says llava too, but has no `text_config`."""
    original = [name for name in written.get("architectures") or () if name.startswith("Llava") and "Llama" in name]
    if original or (str(written.get("model_type", "")).startswith("llava") and "text_config" not in written):
        raise ValueError(
            f"{folder} is in the original LLaVA layout ({', '.join(original) or 'no text_config'}), which Hugging "
            "Face's classes do not read; give its converted twin on the hub, such as llava-hf/llava-1.5-7b-hf for "
            "liuhaotian/llava-v1.5-7b"
        )


def stock_model(folder: str | Path, **options: Any) -> tuple[Any, dict[str, list[str]]]:
    """A model as transformers alone loads it, and the names that do not fit.

    Args:
        folder: What `from_pretrained` takes.
        **options: Those of `from_pretrained`.

    Returns:
        The model, and sorted names under `missing_keys`, `unexpected_keys` and `mismatched_keys`.
    """
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # reported by name instead
    loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, **options)
    model, found = loaded
    return model, {kind: sorted(map(str, found[kind])) for kind in _WRONG}


def load_processor(folder: str | Path, config: Any, rows: int | None = None) -> Any:
    """The checkpoint's processor, as its family gives it.

    Args:
        folder: Where it is.
        config: The model's.
        rows: As in `check_tokens`.

    Raises:
        ValueError: The folder has no processor, or one that does not go with the model.
    """
    try:
        with named(folder):
            processor = family_of_config(config).load_processor(str(folder), config)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no usable processor ({error}); copy processor_config.json, tokenizer.json and "
            "chat_template.jinja of the original checkpoint into it"
        ) from error
    check_tokens(processor, folder, config, rows)
    check_template(processor, str(folder))
    read_form(processor, str(folder))
    return processor


def check_tokens(processor: Any, folder: str | Path, config: Any, rows: int | None = None) -> None:
    """Raise ValueError where ids of a processor's tokenizer mean something else to the model, or nothing.

    Args:
        processor: What is checked.
        folder: Where its tokenizer is from, for the message.
        config: The model's.
        rows: Of embeddings that an adapter brings; None for the model's own.
    """
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    if image != config.image_token_id:
        raise ValueError(
            f"the processor in {folder} writes images as token {image}, and `image_token_id` in config.json is "
            f"{config.image_token_id}; give the processor that belongs to the model"
        )
    own = config.text_config.vocab_size
    there = f"text_config.vocab_size in config.json is {own}" if rows is None else f"the adapter's have {rows} rows"
    vocabulary = processor.tokenizer.get_vocab()
    ids = {token: number for token, number in vocabulary.items() if number >= (rows or own)}
    ids.pop(processor.image_token, None)  # images have embeddings of their own
    if ids:
        token, number = min(ids.items(), key=lambda item: item[1])
        raise ValueError(
            f"the tokenizer in {folder} has {len(ids)} tokens without an embedding, the first is {token!r:.40} "
            f"({number}; {there}); give the tokenizer that belongs to the model, or the embeddings with the adapter "
            "(PEFT: save_pretrained(..., save_embedding_layers=True))"
        )


def resolve_model(path: str | Path) -> str:
    """What `from_pretrained` is given for `path`, once it is known that something is there.

    Raises:
        FileNotFoundError: If it is no folder with a config.json and the hub does not give one within seconds.
    """
    if str(path) in EMBEDDED_MODELS:
        return str(embedded_model_path(str(path)))
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            found = sorted(entry.name for entry in Path(path).iterdir())[:8]
            raise FileNotFoundError(
                f"{path} has no config.json (it holds {', '.join(found) or 'nothing'}); {_ways_out()}"
            )
        return str(path)
    if str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
        raise FileNotFoundError(f"there is no folder {path}, and it is no hub id of the form owner/name; {_ways_out()}")
    try:
        fetch_file(str(path), "config.json")
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"the hub does not give {path} ({type(error).__name__}); check the name, or log in with "
            f"`hf auth login` if it is gated; {_ways_out(path)}"
        ) from error
    except Exception as error:  # huggingface_hub raises many kinds for "no network"; all mean the same here
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise FileNotFoundError(
            f"{path} is neither in the local cache nor reachable{offline}; {_ways_out(path)}"
        ) from error
    return str(path)


def fetch_file(repository: str, name: str) -> None:
    """Bring a file of a hub repository into the cache; raises within seconds what the client raises."""
    if not isinstance(try_to_load_from_cache(repository, name), str):
        # One attempt: the client itself tries again for half a minute where there is no network.
        get_session().head(constants.ENDPOINT, timeout=5)
    hf_hub_download(repository, name, etag_timeout=5)


def local_folder(path: str | Path) -> Path:
    """The folder on this machine that holds a model's files; a model on the hub is downloaded into the cache.

    Raises:
        FileNotFoundError: As in `resolve_model`.
    """
    found = resolve_model(path)
    if Path(found).is_dir():
        return Path(found)
    return Path(snapshot_download(found, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx"]))


def _ways_out(wanted: str | Path = "llava-hf/llava-1.5-7b-hf") -> str:
    return (
        f"give a local folder with the weights (download it elsewhere with `hf download {wanted} --local-dir DIR`), or "
        "try the model in this package: python recipes/finetune.py --config configs/quickstart.yaml"
    )
