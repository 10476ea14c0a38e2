"""The tokens at which an answer ends: what a checkpoint's own generation config says, and what closes a turn in its
chat template, which is what training teaches it to write (Llama-3's `<|eot_id|>` is not its `eos`).
"""

from __future__ import annotations

from typing import Any

from himap_train.data.segments import Template


def end_token_ids(processor: Any, own: int | list[int] | None) -> list[int]:
    """All token ids that end an answer, for `generate(eos_token_id=...)` and generation configs.

    Args:
        processor: The checkpoint's. Without a usable chat template nothing is added.
        own: `eos_token_id` of the model's generation config.
    """
    ends = own if isinstance(own, list) else [] if own is None else [own]
    try:
        token = Template(processor).end_of_answer()
    except ValueError:
        return ends
    added = processor.tokenizer.convert_tokens_to_ids(token)
    return ends if added in ends else [*ends, added]
