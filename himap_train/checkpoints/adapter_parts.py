"""What an adapter may bring beside LoRA: a tokenizer and a chat template of its own, and embeddings for more tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from himap_train.checkpoints.adapter import Adapter
from himap_train.models.families.processing import load_tokenizer
from himap_train.models.loading import check_tokens, load_processor

_TEMPLATE = "chat_template.jinja"


def adapter_processor(source: Path, base: str | Path, config: Any, tokens: int | None = None) -> Any:
    """The processor that an adapter was trained with: from its folder as far as that brings one, else the base's.

    Args:
        source: Adapter folder, or a training checkpoint, which brings nothing.
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
    return processor


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
