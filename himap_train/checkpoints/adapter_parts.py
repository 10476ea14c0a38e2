"""What an adapter may bring beside LoRA (a tokenizer and a chat template of its own, embeddings for more tokens), and
whether it is the one that the model got.

Keys renamed by an upgrade of transformers or PEFT are dropped silently by PEFT, and the model is then the base model.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict

from himap_train.checkpoints.adapter import BASE_FILE, Adapter, training_file
from himap_train.limits import bounded
from himap_train.models.families import family_of
from himap_train.models.families.image_form import ImageForm, read_form, take_form
from himap_train.models.families.processing import load_tokenizer
from himap_train.models.loading import check_tokens, load_processor
from himap_train.models.stock import base_model
from himap_train.models.weight_headers import opened
from himap_train.pruning.names import field_names
from himap_train.structured import named

_TEMPLATE = "chat_template.jinja"


def adapter_processor(source: Path, base: str | Path, config: Any, tokens: int | None = None) -> Any:
    """The processor that an adapter was trained with: from its folder as far as that brings one, else the base's.

    Args:
        source: Adapter folder, or a training checkpoint, which brings nothing but what its data said of pictures.
        base: Where the base model is.
        config: The base model's.
        tokens: Rows of the embeddings; None for those of the base.

    Raises:
        ValueError: The folder's tokenizer does not go with the model; says why and the way out.
    """

    def brings(*names: str) -> bool:
        return any((source / name).is_file() for name in names)

    tokenizer_here = brings("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    if tokenizer_here and brings("processor_config.json", "preprocessor_config.json"):
        processor = load_processor(source, config, tokens)
        if not processor.chat_template and not brings(_TEMPLATE):
            processor.chat_template = load_processor(base, config).chat_template
    else:
        processor = load_processor(base, config)
        if tokenizer_here:
            processor.tokenizer = load_tokenizer(str(source))
            check_tokens(processor, source, config, tokens)
            processor.chat_template = processor.tokenizer.chat_template or processor.chat_template
    if brings(_TEMPLATE):
        processor.chat_template = (source / _TEMPLATE).read_text("utf-8")
    take_trained_form(processor, source)
    return processor


def take_trained_form(processor: Any, source: Path) -> None:
    """Let a processor make pictures ready as those of an adapter folder or a training checkpoint were."""
    if source.is_file():
        data = training_file(source).get("LlavaDataModule") or {}
        take_form(processor, ImageForm(**{name: data[name] for name in field_names(ImageForm) if name in data}))
    else:
        if (source / BASE_FILE).is_file():  # one of ours, which says it where it is not as the processor does
            take_form(processor, ImageForm())
        read_form(processor, str(source))


def resized_tokens(adapter: Adapter, config: Any) -> int | None:
    """Rows of the embeddings that an adapter brings, where the base has another number.

    Raises:
        ValueError: It brings embeddings without the head that belongs to them, or the other way round.
    """
    kinds = ("embed_tokens", "lm_head")
    rows = {
        kind: tensor.shape[0]
        for name, tensor in adapter.weights.items()
        for kind in kinds
        if name.endswith((f".{kind}.weight", f".{kind}.base_layer.weight"))
    }
    vocabulary = config.text_config.vocab_size
    if not rows or set(rows.values()) == {vocabulary}:
        return None
    tied = config.text_config.tie_word_embeddings or config.tie_word_embeddings
    if len(set(rows.values())) > 1 or not (tied or rows.keys() == set(kinds)):
        raise ValueError(
            f"the adapter holds {' and '.join(f'{n} rows of {kind}' for kind, n in rows.items())}, and the base has "
            f"{vocabulary} tokens: resized embeddings are loaded with a head of as many rows. Save the adapter with "
            "both (PEFT: save_pretrained(..., save_embedding_layers=True)), or give the resized base model as base"
        )
    return next(iter(rows.values()))


def check_adapter(model: PeftModel, folder: Path) -> None:
    """Every key of the file is in the model and the other way round, and the adapter does something.

    Raises:
        FileNotFoundError: There are no safetensors.
        ValueError: Keys are missing, unknown or empty.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no adapter_model.safetensors (pickled adapters are not read)")
    with opened(file) as weights:
        # beside LoRA on embeddings PEFT writes a copy of the frozen ones
        names = {name for name in weights.keys() if not name.endswith(".base_layer.weight")}  # noqa: SIM118
        empty = [name for name in names if 0 in weights.get_slice(name).get_shape()]
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    in_place = names & {name for name, _ in model.named_parameters()}  # weights of the base, trained
    missing, unknown = sorted(set(expected) - names), sorted(names - set(expected) - in_place)
    if missing or unknown or empty:
        raise ValueError(
            f"{file}: {len(missing)} keys are missing {missing[:2]}, {len(unknown)} are unknown {unknown[:2]}, "
            f"{len(empty)} are empty {empty[:2]}; the adapter would not act. Was it made with other versions?"
        )
    projectors = family_of(base_model(model)).projector_names
    projector_trained = any(f".{part}." in name and "lora_" not in name for name in names for part in projectors)
    whole = projector_trained or in_place
    if not whole and not any(tensor.any() for name, tensor in expected.items() if "lora_B" in name):
        warnings.warn(f"{folder}: every lora_B is zero, the adapter changes nothing (was it trained?)", stacklevel=3)


_INSIDE = {  # around what an adapter's config says, as PEFT looks modules up
    "rank_pattern": (r"(.*\.)?(", ")$"),
    "alpha_pattern": (r"(.*\.)?(", ")$"),
    "layers_pattern": (r"(?:^|.*?\.)", r"\.(?P<idx>\d+)\."),
    "modules_to_save": (r"(^|.*\.)", r"($|\..*)"),
}


def check_patterns(peft: Mapping[str, Any], names: Iterable[str], source: Path | str) -> None:
    """Look modules up by the regular expressions of an adapter's config, which PEFT does without a bound.

    Raises:
        ValueError: One of them is none, or takes seconds.
    """
    for key in ("target_modules", "exclude_modules", *_INSIDE):
        given = peft.get(key) or []
        before, behind = _INSIDE.get(key, ("", ""))
        if isinstance(given, str) or key in _INSIDE:  # a list of targets holds plain names
            with named(source, f"has a `{key}` that is no regular expression"), bounded(f"{source}: `{key}`"):
                for pattern in [given] if isinstance(given, str) else given:
                    expression = re.compile(before + pattern + behind)
                    for name in names:
                        expression.match(name) if key in _INSIDE else expression.fullmatch(name)
