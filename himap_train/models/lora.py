"""LoRA on the text decoder, and what happens to projector and vision tower beside it.

PEFT matches a *string* target against whole module names and a *list* against their endings. CLIP's projections end in
`q_proj` too, so a list (or PEFT's own "all-linear") would train the vision tower as well. Here every choice becomes one
regular expression that is anchored in the decoder's layers, and what it would hit is checked before PEFT sees it.

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685; the decoder-only targets are those of LLaVA-1.5's LoRA recipe.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Literal, get_args

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from himap_train.limits import bounded
from himap_train.models.families import family_of
from himap_train.models.families.base import Family
from himap_train.models.stock import base_model
from himap_train.models.whole import train_decoder, used_in_tower

Projector = Literal["train", "lora", "freeze"]
Part = Projector

DECODER_LINEAR = "decoder-linear"


def attach_lora(
    model: nn.Module,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str | list[str] = DECODER_LINEAR,
    projector: Projector = "train",
    dora: bool = False,
    rslora: bool = False,
    vision: Part = "freeze",
    decoder: Part = "lora",
) -> PeftModel:
    """Wrap `model` with LoRA; everything else is frozen.

    Args:
        model: A stock model of a known family, pruned or not. Its decoder layers get LoRA in place.
        r: Rank. alpha: The update is scaled by `alpha / r`.
        alpha: See `r`.
        dropout: Dropout on the input of each LoRA branch, active in `train()` only.
        targets: `"decoder-linear"` is every linear layer of the decoder's layers; a list holds endings such as
            `["q_proj", "v_proj"]`, looked for in the decoder's layers only; another string is a regular expression
            over whole module names.
        projector: `"train"` trains a full copy (PEFT `modules_to_save`), `"lora"` gives it LoRA of the same rank,
            `"freeze"` leaves it.
        dora: Train magnitude and direction of each weight apart (Liu et al. 2024, https://arxiv.org/abs/2402.09353).
        rslora: Scale by `alpha / sqrt(r)` (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
        vision: The same for the vision tower without the projector, as far as image features depend on it; `"train"`
            trains the weights in place.
        decoder: `"lora"` as the targets say; `"train"` trains it, embeddings and head in place; or `"freeze"`.

    Raises:
        ValueError: The targets match nothing (lists what there is) or reach outside the decoder, or a number is out of
            range.
    """
    if r < 1 or alpha <= 0 or not 0.0 <= dropout < 1.0:
        raise ValueError(
            f"LoRA needs r >= 1, alpha > 0 and 0 <= dropout < 1; got r={r}, alpha={alpha}, dropout={dropout}"
        )
    for name, choice in (("projector", projector), ("vision", vision), ("decoder", decoder)):
        if choice not in get_args(Part):
            raise ValueError(f"{name}={choice!r} is not one of {', '.join(map(repr, get_args(Part)))}")
    patterns = [_target_pattern(model, targets)] if decoder == "lora" else []
    patterns += [_projector_pattern(model)] if projector == "lora" else []
    tower = used_in_tower(model) if vision != "freeze" else {}
    patterns += [_vision_pattern(model, tower)] if vision == "lora" else []
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT annotates int and divides by r
        lora_dropout=dropout,
        target_modules="|".join(f"(?:{p})" for p in patterns) if patterns[1:] else (*patterns, DUMMY_TARGET_MODULES)[0],
        modules_to_save=saved_names(family_of(model)) if projector == "train" else None,
        bias="none",
        use_dora=dora,
        use_rslora=rslora,
    )
    peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    if vision == "train":
        for weight in tower.values():
            weight.requires_grad_(True)
        family_of(model).vision(base_model(peft_model)).float()  # also its layers behind the one that is read
    if decoder == "train":
        train_decoder(base_model(peft_model))
    if family_of(model).casts_features and "train" in (vision, decoder):  # what meets there is of one dtype
        family_of(model).vision(base_model(peft_model)).float()
        base_model(peft_model).get_input_embeddings().float()
    # PEFT casts LoRA weights of a half-precision model to fp32 by itself, but not the projector's copy: with weights in
    # bfloat16 a step of 2e-5 would be rounded away.
    for parameter in peft_model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    return peft_model


def _target_pattern(model: nn.Module, targets: str | list[str]) -> str:
    """One regular expression over whole module names, checked against the model."""
    decoder = family_of(model).decoder_name.rsplit(".", 1)[-1]
    inside = rf"(?:.*\.)?{decoder}\.layers\.\d+\."
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    in_decoder = [name for name in linear if re.match(inside, name)]
    if isinstance(targets, str) and targets != DECODER_LINEAR:
        pattern = targets
    else:
        endings = {name.rsplit(".", 1)[-1] for name in in_decoder} if targets == DECODER_LINEAR else set(targets)
        pattern = _ending_pattern(inside, endings)
        unmatched = [
            ending for ending in endings if not any(re.fullmatch(_ending_pattern(inside, {ending}), n) for n in linear)
        ]
        if unmatched:
            raise ValueError(f"LoRA targets {sorted(unmatched)} match nothing; {_available(in_decoder)}")
    try:
        with bounded(f"looking for the LoRA targets {targets!r:.60}"):
            hits = [name for name in linear if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ValueError(f"LoRA targets {targets!r} are not a valid regular expression: {error}") from error
    if not hits:
        raise ValueError(f"LoRA targets {targets!r} match nothing; {_available(in_decoder)}")
    outside = [name for name in hits if not re.match(inside, name) and not name.endswith("lm_head")]
    if outside:
        raise ValueError(
            f"LoRA targets {targets!r} reach {len(outside)} layers outside the decoder, the first is {outside[0]!r}; "
            f"start the expression with `.*{decoder}.*`. For the projector use projector='lora'."
        )
    return pattern


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, quantised ones included: some are no subclass of `nn.Linear`."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return isinstance(module, nn.Linear) or (all(type(size) is int for size in sizes) and not any(module.children()))


def _ending_pattern(inside: str, endings: Iterable[str]) -> str:
    """Modules below the decoder's layers whose name ends with one of `endings`."""
    return rf"{inside}(?:[\w.]+\.)?(?:{'|'.join(re.escape(ending) for ending in sorted(endings))})"


def _available(in_decoder: list[str]) -> str:
    """What a user may choose from, e.g. `the decoder has the linear layers down_proj, k_proj, ...`."""
    endings = sorted({name.rsplit(".", 1)[-1] for name in in_decoder})
    return f"the decoder has the linear layers {', '.join(endings)}"


def saved_names(family: Family) -> list[str]:
    """The projector as PEFT's `modules_to_save` finds it: by the end of a module's name."""
    return [name.removeprefix("model.") for name in family.projector_names]


def _projector_pattern(model: nn.Module) -> str:
    """The projector's linear layers."""
    below = "|".join(re.escape(name) for name in family_of(model).projector_names)
    linear = [name for name, module in model.named_modules() if is_linear(module) and re.match(rf"(?:{below})\.", name)]
    return rf"(?:.*\.)?(?:{'|'.join(re.escape(name) for name in linear)})"


def _vision_pattern(model: nn.Module, used: Iterable[str]) -> str:
    """The vision tower's linear layers among the weights that are used."""
    weights = set(used)
    linear = [name for name, module in model.named_modules() if is_linear(module) and f"{name}.weight" in weights]
    return rf"(?:.*\.)?(?:{'|'.join(re.escape(name) for name in linear)})"


def parameter_group(name: str, family: Family) -> str:
    """The part of the model that a parameter name belongs to: lora, projector, vision tower, decoder or other."""
    if any(f"{projector}." in name for projector in family.projector_names):
        return "projector"
    if f"{family.vision_name}." in name:
        return "vision tower"
    if "lora_" in name:
        return "lora"
    return "decoder" if f"{family.decoder_name}." in name or ".lm_head." in name else "other"


def _elements(parameter: nn.Parameter) -> int:
    """Numbers in the whole parameter: bitsandbytes holds two weights in a byte, ZeRO-3 only a share of them."""
    packed = getattr(parameter, "quant_state", None)
    return int(getattr(parameter, "ds_numel", parameter.numel()) if packed is None else packed.shape.numel())


def trainable_report(model: nn.Module) -> str:
    """One line a part: how many of its parameters are trained. The frozen original of a trained copy is not counted."""
    family = family_of(base_model(model))
    total: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        group, elements = parameter_group(name, family), _elements(parameter)
        total[group] += elements
        trained[group] += elements if parameter.requires_grad else 0
    lines = [f"  {group:<13}{trained[group]:>15,} of {count:>15,}" for group, count in sorted(total.items())]
    share = 100 * trained.total() / max(total.total(), 1)
    return "\n".join(
        ["trained parameters", *lines, f"  {'all':<13}{trained.total():>15,} of {total.total():>15,} ({share:.2f} %)"]
    )
