"""W + scale * B A, or DoRA's form of it, for one tensor of the base model at a time.

Names. Hugging Face files call the same weight by the name that was published (`language_model.model.layers.0...` of a
LLaVA, `model.layers.0...` of a Qwen2-VL) or by that of the module tree (`model.language_model.layers.0...`). Adapters
follow the module tree of the transformers that trained them. Both sides are brought to the module tree's present names,
by the family's `weight_renames`, before they are compared.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from himap_train.checkpoints.adapter import PEFT_SHAPE, Adapter
from himap_train.checkpoints.adapter_parts import check_patterns
from himap_train.checkpoints.ranking import read_ranking
from himap_train.checkpoints.weight_files import TensorInfo
from himap_train.models.families import family_of_config
from himap_train.models.families.base import Family
from himap_train.pruning.reading import schedule_in
from himap_train.structured import check_shape

# Entries of a PEFT config that are understood here or change nothing about the merged weights.
_UNDERSTOOD = {key.removesuffix("?") for key in PEFT_SHAPE} | {
    "auto_mapping",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
    "megatron_core",
}

_PREFIX = "base_model.model."
_WITH_PEFT = (
    "merge it with PEFT itself, schedule included: model, processor = load_checkpoint(ADAPTER); "
    "model.merge_and_unload().save_pretrained(FOLDER); processor.save_pretrained(FOLDER); "
    "then copy ADAPTER/himap into FOLDER"
)


def parameter_name(name: str, family: Family) -> str:
    """Name of a weight of decoder or projector in the module tree of a family's model, from any layout of files."""
    for pattern, replacement in family.weight_renames:
        name, changed = re.subn(pattern, replacement, name)
        if changed:
            return name
    return name


def as_saved_here(adapter: Adapter, config: Any, base: Path) -> Adapter:
    """An adapter under the present names of its weights; where PEFT alone wrote it, with the schedule and the ranking
    that its base was merged with, if it was.

    Args:
        adapter: As it was read.
        config: The base model's.
        base: The base model's folder.
    """
    family = family_of_config(config)
    weights = {_PREFIX + parameter_name(key.removeprefix(_PREFIX), family): t for key, t in adapter.weights.items()}
    if adapter.says_schedule:
        return replace(adapter, weights=weights)
    schedule = schedule_in(getattr(config, "himap", None), f"{base}, `himap` of config.json")
    return replace(adapter, weights=weights, schedule=schedule, ranking=read_ranking(base, schedule))


def embeddings_name(family: Family) -> str:
    """Name of the decoder's embeddings, as `parameter_name` gives it."""
    return f"{family.decoder_name}.embed_tokens.weight"


def require_mergeable(peft: dict[str, Any]) -> None:
    """Raise for kinds of adapter that are not W + scale * B A.

    Raises:
        ValueError: Names the settings.
    """
    if peft.get("peft_type") != "LORA":
        raise ValueError(f"the adapter is of kind {peft.get('peft_type')!r}, only LORA is merged here; {_WITH_PEFT}")
    check_shape(peft, {"r": int, "lora_alpha": float}, "adapter_config.json")
    plain = {**LoraConfig().to_dict(), "peft_type": "LORA"}
    harmless = (True, False, "gaussian", "orthogonal")  # other ways to start LoRA change the base model's weights too
    others = {
        key: value
        for key, value in peft.items()
        if key not in _UNDERSTOOD and value and value != plain.get(key)
        if not (key == "init_lora_weights" and value in harmless)
    }
    if others:
        named = ", ".join(f"{key}={value!r}" for key, value in sorted(others.items()))
        raise ValueError(f"the adapter uses settings that the streaming merge does not know: {named}; {_WITH_PEFT}")


class Merger:
    """Gives the merged value of each tensor of a base model; `finish` checks that all of the adapter went in.

    Args:
        adapter: What is merged.
        family: Family of the base.
        tied_head: The base's `lm_head` is its embeddings.
        base: Where the base is, for messages.

    Raises:
        ValueError: The adapter is no plain LoRA, is incomplete, or changes an `lm_head` that is tied.
    """

    def __init__(self, adapter: Adapter, family: Family, tied_head: bool, base: str) -> None:
        require_mergeable(adapter.peft)
        self.adapter, self.family, self.base = adapter, family, base
        self.tied_head = tied_head
        self.low_rank: dict[str, dict[str, Tensor]] = {}
        self.magnitudes: dict[str, Tensor] = {}
        self.whole: dict[str, Tensor] = {}
        for key, tensor in adapter.weights.items():
            name = self._name(key.removeprefix(_PREFIX))
            module, _, end = name.rpartition(".lora_")
            if end in ("A.weight", "B.weight"):
                self.low_rank.setdefault(f"{module}.weight", {})[end[0]] = tensor
            elif end == "magnitude_vector":
                self.magnitudes[f"{module}.weight"] = tensor
            elif "lora_embedding_" in name or ".base_layer." in name:
                raise ValueError(
                    f"the adapter has LoRA on embeddings ({key}), not merged tensor by tensor; {_WITH_PEFT}"
                )
            elif module or "lora_" in name:
                raise ValueError(f"the adapter has {key!r}, which is neither a LoRA matrix nor a whole weight")
            else:
                self.whole[name] = tensor
        halves = sorted(name for name, pair in self.low_rank.items() if pair.keys() != {"A", "B"})
        if halves:
            raise ValueError(f"the adapter has only one of lora_A and lora_B for {halves[0]!r} ({len(halves)} such)")
        if self.magnitudes.keys() != (self.low_rank.keys() if adapter.peft.get("use_dora") else set()):
            raise ValueError("the adapter's magnitude vectors are not those of its LoRA matrices (`use_dora`)")
        if tied_head and "lm_head.weight" in self.low_rank.keys() | self.whole.keys():
            raise ValueError(
                f"the adapter changes lm_head, which is tied to the embeddings in {base}: merging would change them "
                "too. Use the adapter unmerged, or train without lm_head among model.lora_targets"
            )
        copied = any(name.endswith("embed_tokens") for name in adapter.peft.get("modules_to_save") or ())
        if tied_head and copied and embeddings_name(family) in self.whole:
            raise ValueError(
                f"the adapter has a copy of the embeddings, to which lm_head is tied in {base}: PEFT leaves it on the "
                "old ones, and a tied model cannot. Use the adapter unmerged, or leave embed_tokens out of "
                "`modules_to_save`"
            )
        check_patterns(adapter.peft, [name.removesuffix(".weight") for name in self.low_rank], "the adapter")
        self.unused = self.low_rank.keys() | self.whole.keys()

    def check_shapes(self, infos: list[TensorInfo]) -> None:
        """Before anything is written: every tensor of the adapter has its weight in the base, of the right shape.

        Raises:
            ValueError: Lists what does not fit.
        """
        shapes = {self._name(info.name): info.shape for info in infos}
        wanted = {name: tuple(tensor.shape) for name, tensor in self.whole.items()}
        wanted |= {name: (pair["B"].shape[0], pair["A"].shape[1]) for name, pair in self.low_rank.items()}
        wrong = [name for name in sorted(wanted) if shapes.get(name) != wanted[name]]
        if wrong:
            found = [f"{name}: {wanted[name]} here, {shapes.get(name, 'none')} in the base" for name in wrong[:5]]
            more = [f"and {len(wrong) - 5} more"] if len(wrong) > 5 else []
            resized = [name for name in wrong if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
            way_out = [f"Its embeddings were resized; {_WITH_PEFT}"] if resized == wrong else []
            way_out += [_WITH_PEFT] if not any(name in shapes for name in wrong) else []  # names of another layout
            raise ValueError(f"the adapter does not fit {self.base}: {'; '.join([*found, *more, *way_out])}")

    def value(self, info: TensorInfo) -> Tensor:
        """The merged value of one tensor, in the dtype of the base's file or fp32 where it was computed."""
        name = self._name(info.name)
        if name in self.unused:
            self.unused = self.unused - {name}
            if name in self.whole:
                return self.whole[name]
            merged = self._update(name).add_(info.read())  # in place: the sum is fp32
            if name in self.magnitudes:
                merged *= (self.magnitudes[name].float() / torch.linalg.norm(merged, dim=1))[:, None]
            return merged
        embeddings = embeddings_name(self.family)
        if self.tied_head and name == "lm_head.weight" and embeddings in self.whole:
            return self.whole[embeddings]
        if name in self.low_rank or name in self.whole:
            raise ValueError(f"{self.base} holds {name} twice, under two names")
        return info.read()

    def finish(self) -> None:
        """Raise unless every tensor of the adapter was used.

        Raises:
            ValueError: Names those that were not.
        """
        if self.unused:
            raise ValueError(f"{len(self.unused)} weights of the adapter are left over, first {min(self.unused)}")

    def _name(self, name: str) -> str:
        return parameter_name(name, self.family)

    def _update(self, name: str) -> Tensor:
        """Scale * B A in fp32."""
        a, b = self.low_rank[name]["A"].float(), self.low_rank[name]["B"].float()
        peft, module = self.adapter.peft, name.removesuffix(".weight")
        ranks, alphas = peft.get("rank_pattern") or {}, peft.get("alpha_pattern") or {}
        rank = ranks.get(get_pattern_key(list(ranks), module), peft["r"])
        alpha = alphas.get(get_pattern_key(list(alphas), module), peft["lora_alpha"])
        if a.shape[0] != rank:
            raise ValueError(f"{name}: LoRA matrices have rank {a.shape[0]}, {rank} is in adapter_config.json")
        return (b @ a).mul_(alpha / (math.sqrt(rank) if peft.get("use_rslora") else rank))
