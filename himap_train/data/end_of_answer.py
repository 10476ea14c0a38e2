"""The tokens at which an answer ends: what a checkpoint's own generation config says, and what closes a turn in its
chat template, which is what training teaches it to write (Llama-3's `<|eot_id|>` is not its `eos`).
"""

from __future__ import annotations

import json
from pathlib import Path
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


def write_end_tokens(folder: Path, processor: Any) -> None:
    """Add the token that closes an answer to the folder's generation config; one without it gets eos and that."""
    file = folder / "generation_config.json"
    content = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    own = content.get("eos_token_id") if content else processor.tokenizer.eos_token_id
    ends = end_token_ids(processor, own)
    if not content or ends not in (own, [own], []):
        file.write_text(json.dumps({**content, "eos_token_id": ends}, indent=2, sort_keys=True) + "\n", "utf-8")
