"""The small files of a model's folder that somebody else wrote: what each has to be before a library reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.activations import ACT2FN

from himap_train.structured import Rule, read_json, read_text


def _whole(ids: list[Any]) -> bool:
    return all(type(number) is int for number in ids)


def _up_to(most: int) -> Rule:
    return Rule(f"a whole number from 1 to {most}", int, lambda number: 0 < number <= most)


_IDS = Rule("a token's number, or a list of such", int | list, lambda ids: isinstance(ids, int) or _whole(ids))
_WIDTH = _up_to(2**20)
_PART = {
    "num_hidden_layers?": _up_to(1024),
    "hidden_size?": _WIDTH,
    "intermediate_size?": _WIDTH,
    "num_attention_heads?": _WIDTH,
    "num_key_value_heads?": _WIDTH,
    "vocab_size?": _up_to(2**22),
    "hidden_act?": Rule("an activation that transformers has", str, lambda name: name in ACT2FN),
}
"""Of a decoder or a vision tower; what is larger is no model, and building it would take all memory."""
_SHAPES: dict[str, Any] = {
    "config.json": {
        "model_type": str,
        "architectures?": [str],
        "text_config?": _PART,
        "vision_config?": _PART,
        "image_token_id?": int,
        "image_token_index?": int,
        "quantization_config?": dict,
        "himap?": dict,
    },
    "generation_config.json": {
        "eos_token_id?": _IDS,
        "bos_token_id?": _IDS,
        "pad_token_id?": int,
        "max_length?": int,
        "max_new_tokens?": int,
        "num_beams?": int,
        "suppress_tokens?": [int],
    },
    "tokenizer.json": {"model": dict},
    "tokenizer_config.json": {"chat_template?": Rule("text, or a list of named texts", str | list, lambda _: True)},
    "special_tokens_map.json": dict,
    "added_tokens.json": dict,
    "preprocessor_config.json": {"patch_size?": _WIDTH},
    "processor_config.json": {
        "chat_template?": str,
        "patch_size?": _WIDTH,
        "num_additional_image_tokens?": Rule("a whole number of 0 or more", int, lambda number: number >= 0),
    },
    "chat_template.json": {"chat_template": str},
}


def check_files(folder: Path) -> None:
    """Raise ValueError where a file of a model's folder is not what it has to be, before a library reads it.

    Texts are copied into what is exported, so links must not lead to those of somebody else; the hub's own cache
    links into its `blobs`.
    """
    if not folder.is_dir():
        return
    inside = folder.resolve()
    blobs = inside.parent.parent / "blobs" if inside.parent.name == "snapshots" else inside
    for name in (*_SHAPES, "chat_template.jinja"):
        file = folder / name
        if not file.exists():
            continue
        if not file.resolve().is_relative_to(inside) and not file.resolve().is_relative_to(blobs):
            raise ValueError(f"{file} is a link out of its folder, to {file.resolve()}; copy what it leads to instead")
        if name in _SHAPES:
            read_json(file, _SHAPES[name])
        else:
            read_text(file)
