"""`generation_config.json` of what is written: whoever loads it stops where an answer ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from himap_train.data.end_of_answer import end_token_ids


def write_end_tokens(folder: Path, processor: Any) -> None:
    """Add the token that closes an answer to the folder's generation config; one without it gets eos and that."""
    file = folder / "generation_config.json"
    content = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    own = content.get("eos_token_id") if content else processor.tokenizer.eos_token_id
    ends = end_token_ids(processor, own)
    if not content or ends not in (own, [own], []):
        file.write_text(json.dumps({**content, "eos_token_id": ends}, indent=2, sort_keys=True) + "\n", "utf-8")
