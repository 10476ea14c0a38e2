"""Whether a model is the one that an adapter was trained on, as far as its config tells.

LoRA fits every matrix of the right shape: merged into another base of the same size it gives a model that talks
nonsense. Configs tell most bases apart (family, shapes, vocabulary, rotary base, norm epsilon, activation, vision tower
and how its features become image tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from himap_train.embedded.model import EMBEDDED_MODELS, embedded_folder
from himap_train.models.families import FAMILIES

_TEXT = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
)
_VISION = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    # InternVL
    "attention_bias",
    "use_qk_norm",
    "norm_type",
    # Qwen-VL
    "depth",
    "embed_dim",
    "num_heads",
    "mlp_ratio",
    "out_hidden_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "window_size",
    "fullatt_block_indexes",
    "num_position_embeddings",
    "deepstack_visual_indexes",
)
_WHOLE = (
    "model_type",
    "image_token_id",
    "image_seq_length",
    "projector_hidden_act",
    "multimodal_projector_bias",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    # VipLLaVA
    "projector_layernorm_eps",
    # LLaVA-NeXT, LLaVA-OneVision
    "image_grid_pinpoints",
    "vision_aspect_ratio",
    # InternVL
    "downsample_ratio",
    # Qwen-VL
    "vision_start_token_id",
    "vision_end_token_id",
)


def base_facts(config: Any) -> dict[str, Any]:
    """What decides a model's shapes and arithmetic, as plain values under dotted keys: those that its config has."""
    parts = (("", config, _WHOLE), ("text_config.", config.text_config, _TEXT))
    facts: dict[str, Any] = {}
    for prefix, part, keys in (*parts, ("vision_config.", config.vision_config, _VISION)):
        facts |= {prefix + key: plain(getattr(part, key)) for key in keys if hasattr(part, key)}
    return facts


def plain(value: Any) -> Any:
    """JSON types: sets and enumerations become lists and strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def require_same_base(trained_on: Mapping[str, Any] | None, config: Any, base: str, trained_name: str) -> None:
    """Raise where a base model differs from the one that an adapter was trained on.

    Args:
        trained_on: `base_facts` of that one; None where nobody wrote them down.
        config: Config of the model at `base`.
        base: Where it is.
        trained_name: What the adapter calls its base.

    Raises:
        ValueError: It is of another family, which is named, or something differs, which is listed.
    """
    if trained_on is None:
        return
    then, now = _family(trained_on.get("model_type")), _family(config.model_type)
    if then != now:
        raise ValueError(
            f"{base} is of family {now}, and the adapter was trained on {trained_name}, a model of family {then}. "
            f"Give a copy of {trained_name} as the base model"
        )
    here = base_facts(config)
    differing = [key for key, value in trained_on.items() if key in here and here[key] != value]
    if differing:
        lines = [f"  {key}: {trained_on[key]!r} then, {here[key]!r} in {base}" for key in differing]
        raise ValueError(
            "\n".join([f"{base} is not the model that the adapter was trained on ({trained_name}):", *lines])
            + f"\nGive a copy of {trained_name} as the base model"
        )


def _family(model_type: Any) -> str:
    """The family of a model type, or the type itself where none has it."""
    return next((family.name for family in FAMILIES if model_type in family.model_types), str(model_type))


def recorded_name(base: str) -> str:
    """The name of a base model as an adapter records it: as another machine understands it, and a folder by its whole
    path, since elsewhere a relative one is another folder or a repository on the hub.
    """
    embedded = next((name for name in EMBEDDED_MODELS if Path(base) == embedded_folder(name)), None)
    return embedded or (str(Path(base).resolve()) if Path(base).is_dir() else base)


def place_of_base(peft: Mapping[str, Any], base: str | None) -> str:
    """Where an adapter's base model is: what is given, or what its `adapter_config.json` names.

    Raises:
        ValueError: It names another revision than the newest, which is not looked for here.
    """
    name, revision = str(peft["base_model_name_or_path"]), peft.get("revision")
    if base is None and revision not in (None, "main"):
        raise ValueError(
            f"the adapter was trained on revision {revision} of {name}, and revisions are not looked for here: "
            f"`hf download {name} --revision {revision} --local-dir DIR`, and give DIR as the base"
        )
    return base or name
