"""Which weight files a Hugging Face folder has, and what stands in their headers; no values are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from himap_train.structured import Rule, named, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHARD = Rule("the name of a *.safetensors file in the same folder", str, lambda name: _is_shard(name))
_INDEX_SHAPE = {"weight_map": {str: _SHARD}}


def promised_tensors(folder: Path) -> dict[str, str]:
    """Tensor name to file name, from the index; empty for a folder with a single file.

    Raises:
        FileNotFoundError: There are no safetensors, or a shard is gone.
        ValueError: The index is malformed, or names files outside.
    """
    if (folder / SINGLE).is_file():  # which transformers takes where there are both
        return {}
    if (folder / INDEX).is_file():
        promised: dict[str, str] = read_json(folder / INDEX, _INDEX_SHAPE)["weight_map"]
        gone = sorted({name for name in promised.values() if not (folder / name).is_file()})
        if gone:
            raise FileNotFoundError(f"{folder} lacks {len(gone)} of its weight files, the first is {gone[0]}")
        return promised
    pickled = sorted(folder.glob("*.bin"))
    way_out = (
        f"its weights are pickled ({pickled[0].name}), which are not read here. Convert them once, with a "
        "transformers that reads them: AutoModelForImageTextToText.from_pretrained(A).save_pretrained(B)"
        if pickled
        else "fetch the whole model: hf download owner/name --local-dir FOLDER"
    )
    raise FileNotFoundError(f"{folder} has no {SINGLE} and no {INDEX}: {way_out}")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights; raises as `promised_tensors` does."""
    return sorted({folder / name for name in promised_tensors(folder).values()} or {folder / SINGLE})


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or what is read of it cannot be.
    """
    with named(file, "is damaged or incomplete", "fetch it again"), safe_open(str(file), framework="pt") as weights:
        yield weights


def _is_shard(name: str) -> bool:
    return name.endswith(".safetensors") and not {"/", "\\", "\0"} & set(name)
