"""Weights on disk, one tensor at a time: read from the shards of a Hugging Face folder, written as new shards.

The safetensors format is a length, a JSON header with names, dtypes, shapes and offsets, and the bytes. All of the
header follows from names, dtypes and shapes, so shards are planned first and then filled tensor by tensor: memory holds
one tensor, however large the model and its shards are.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from himap_train.models.weight_headers import INDEX, opened, promised_tensors, weight_files

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's name, shape and dtype, and the file that it is in."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    @property
    def bytes(self) -> int:
        """Size of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Its values. The file is closed again, so that its pages do not stay in memory."""
        with opened(self.file) as weights:
            tensor: Tensor = weights.get_tensor(self.name)
            return tensor


def read_infos(folder: Path) -> list[TensorInfo]:
    """What the weight files of a Hugging Face folder hold, without reading values.

    Raises:
        FileNotFoundError: There are no safetensors, or a shard is gone.
        ValueError: A shard is damaged, or lacks a tensor that the index promises.
    """
    infos: list[TensorInfo] = []
    for file in weight_files(folder):
        with opened(file) as weights:
            for name in weights.keys():  # noqa: SIM118  safe_open is no mapping
                part = weights.get_slice(name)
                infos.append(TensorInfo(name, tuple(part.get_shape()), _dtype(part.get_dtype(), name, file), file))
    gone = sorted(promised_tensors(folder).keys() - {info.name for info in infos})
    if gone:
        raise ValueError(f"{folder / INDEX} promises {len(gone)} tensors that no shard has, the first is {gone[0]}")
    return infos


def _dtype(name: str, tensor: str, file: Path) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"{file}: {tensor} is stored as {name}; expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def plan_shards(infos: list[TensorInfo], max_size: str) -> dict[str, list[TensorInfo]]:
    """File names and what goes into each, in order; a tensor that is larger than a shard gets one of its own.

    Raises:
        ValueError: `max_size` is no size such as "5GB" or "200MB" (powers of ten, as on the hub).
    """
    named = {info.name: info for info in infos}
    values = {info.name: torch.empty(info.shape, dtype=info.dtype, device="meta") for info in infos}
    try:
        if max_size.strip().startswith("-"):
            raise ValueError("it is negative")
        split = split_torch_state_dict_into_shards(values, max_shard_size=max_size)
    except ValueError as error:
        raise ValueError(
            f"max_shard_size={max_size!r} is no size ({error}); write a number with KB, MB or GB, such as 5GB"
        ) from error
    return {file: [named[name] for name in names] for file, names in split.filename_to_tensors.items()}


def write_shards(folder: Path, shards: dict[str, list[TensorInfo]], value: Callable[[TensorInfo], Tensor]) -> None:
    """Write `model.safetensors`, or numbered shards with their index.

    Args:
        folder: Is there.
        shards: From `plan_shards`.
        value: Called once a tensor, in order; must return what its info says.
    """
    for name, infos in shards.items():
        _write_file(folder / name, infos, value)
    if len(shards) > 1:
        files = {info.name: name for name, infos in shards.items() for info in infos}
        total = sum(info.bytes for infos in shards.values() for info in infos)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(file: Path, infos: list[TensorInfo], value: Callable[[TensorInfo], Tensor]) -> None:
    """One file in the safetensors format; the offsets are known before the values are."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Readers map the file into memory and want values at multiples of their size: the widest go first.
    infos = sorted(infos, key=lambda info: -info.dtype.itemsize)
    for info in infos:
        place = [offset, offset + info.bytes]
        header[info.name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": place}
        offset += info.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for info in infos:
            tensor = value(info)
            if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
                raise RuntimeError(f"{info.name} became {tensor.dtype} {tuple(tensor.shape)}; planned was {info}")
            out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
