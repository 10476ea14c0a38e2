"""Weights on disk, one tensor at a time: read from the shards of a Hugging Face folder, written as new shards.

The safetensors format is a length, a JSON header with names, dtypes, shapes and offsets, and the bytes. All of the
header follows from names, dtypes and shapes, so shards are planned first and then filled tensor by tensor: memory holds
one tensor, however large the model and its shards are.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from himap_train.models.weight_headers import INDEX, SINGLE, opened, promised_tensors, weight_files

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
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


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


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB" or "200MB" (powers of ten, as on the hub).

    Raises:
        ValueError: It is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B|)", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size < 1:
        raise ValueError(f"max_shard_size={text!r} is no size; write a number with KB, MB or GB, such as 5GB")
    return size


def plan_shards(infos: list[TensorInfo], max_bytes: int) -> list[list[TensorInfo]]:
    """Fill shards in order; a tensor that is larger than a shard gets one of its own."""
    shards: list[list[TensorInfo]] = []
    size = 0
    for info in infos:
        if not shards or size + info.bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.bytes
    return shards


def write_shards(folder: Path, shards: list[list[TensorInfo]], value: Callable[[TensorInfo], Tensor]) -> None:
    """Write `model.safetensors`, or numbered shards with their index.

    Args:
        folder: Is there.
        shards: Names, shapes and dtypes of what is written.
        value: Called once a tensor, in order; must return what its info says.
    """
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard, value)
        weight_map |= {info.name: name for info in shard}
    if len(shards) > 1:
        total = sum(info.bytes for shard in shards for info in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
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
