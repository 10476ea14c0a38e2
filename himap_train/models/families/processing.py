"""Image processor, tokenizer and chat template as one processor.

Stock processors of families that also take videos cannot be constructed without torchvision, while their image
processors for PIL and their tokenizers work. So these families encode with the parts, whether torchvision is there or
not. Files of the stock processor are handed on as they are, so that what is exported opens in stock classes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils.hub import cached_file

from himap_train.structured import read_json

FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a stock processor, beside those of its tokenizer."""


class PartsProcessor:
    """What a family encodes with.

    Args:
        family: Name of the family.
        source: Folder or hub id that it came from.
        tokenizer: The checkpoint's.
        image_processor: The checkpoint's, for PIL images.
        image_token: What the chat template writes where an image belongs.
        settings: Further numbers of the stock processor that the family needs.

    Attributes:
        chat_template: The checkpoint's, None where it has none.
        image_token_id: Id of the image token.
    """

    def __init__(
        self,
        family: str,
        source: str,
        tokenizer: Any,
        image_processor: Any,
        image_token: str,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.family, self.source = family, source
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self._as_read = _settings_of(image_processor)
        self.image_token, self.settings = image_token, settings or {}
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(image_token)
        self.chat_template: str | None = _template(source) or tokenizer.chat_template

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool = False) -> str:
        """The conversation as text."""
        text: str = self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, add_generation_prompt=add_generation_prompt, tokenize=False
        )
        return text

    def save_pretrained(self, folder: Path | str) -> None:
        """Write tokenizer and processor files, as stock classes read them."""
        self.tokenizer.save_pretrained(str(folder))
        for name in FILES:
            found = stock_file(self.source, name)
            if found is not None:
                shutil.copyfile(found, Path(folder) / name)
        now = _settings_of(self.image_processor)
        _write_changed(Path(folder), {key: now[key] for key in now if now[key] != self._as_read.get(key)})
        if self.chat_template:  # over the tokenizer's own, which everyone would read first
            (Path(folder) / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


def _settings_of(image_processor: Any) -> dict[str, Any]:
    """As they are written."""
    found: dict[str, Any] = json.loads(image_processor.to_json_string())
    return found


def _write_changed(folder: Path, changed: dict[str, Any]) -> None:
    """Into the files of a stock processor, what was set anew since they were read: the size of pictures, say."""
    for name in ("processor_config.json", "preprocessor_config.json") if changed else ():
        if (file := folder / name).exists():
            written = read_json(file)
            part_is_all = name == "preprocessor_config.json"
            part = written if part_is_all else written.get("image_processor")
            if isinstance(part, dict):
                if "size" in changed:  # older names of the same, which would overrule it
                    part = {key: value for key, value in part.items() if key not in ("min_pixels", "max_pixels")}
                part |= changed
                written = part if part_is_all else {**written, "image_processor": part}
                file.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(source: str) -> Any:
    """The checkpoint's tokenizer."""
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def mark_id(tokenizer: Any, token: str, around: str) -> int:
    """Id of a token that stands around an image; ValueError where the tokenizer has none."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found in (None, tokenizer.unk_token_id):
        raise ValueError(f"its tokenizer has no {token}, which stands around {around}")
    return int(found)


def stock_file(source: str, name: str, ours: bool = False) -> str | None:
    """A file of a folder or a hub repository, None where it has none; of ours also where the hub cannot be asked."""
    asked = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": not ours}
    found: str | None = cached_file(source, name, **asked)
    return found


def _template(source: str) -> str | None:
    """The stock processor's chat template, None where it has none."""
    found = stock_file(source, "chat_template.jinja")
    if found is not None:
        return Path(found).read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        found = stock_file(source, name)
        template = read_json(Path(found)).get("chat_template") if found else None
        if isinstance(template, str):
            return template
    return None
