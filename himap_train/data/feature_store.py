"""Features of images on disk, by the images' content: shards that several processes and machines write side by side.

A shard is a safetensors file of some hundred images, so that a data set makes thousands of files, not a million, and
each is on the disk for sure (one fsync) before it gets its name. Names of its tensors are the digests of the images; a
checksum of each stands in the metadata. Reading maps the file and copies one image's features.

safetensors carries shapes, dtypes (bfloat16 too, which numpy's memmap lacks) and mapping; what stands here is what it
and `datasets` leave open: checksums, and finding an image in files that others go on adding to.
"""

from __future__ import annotations

import os
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from himap_train.storage import atomic_file

_SHARD_BYTES, _SHARD_IMAGES = 256 * 2**20, 1024
_SUFFIX = ".safetensors"


class DamagedShardError(OSError):
    """Features on the disk are not those that were written."""


class FeatureStore:
    """Reads and writes features (T, W) of images; several may work on one folder.

    Args:
        folder: Made when something is written. Holds features of one vision tower and one way of preprocessing.
        tokens: T, of each image.
        width: W.
        dtype: Dtype of the features.
    """

    def __init__(self, folder: Path, tokens: int, width: int, dtype: torch.dtype) -> None:
        self.folder, self.shape, self.dtype = folder, (tokens, width), dtype
        # Sorted halves of digests and where they are: a dictionary of a million texts would be copied into each of the
        # loader's workers.
        self._halves = np.empty(0, dtype=np.uint64)
        self._places = np.empty(0, dtype=np.int32)
        self._shards: list[Path] = []

    @property
    def image_bytes(self) -> int:
        """Bytes of one image's features."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def shard_images(self) -> int:
        """Images that make up a shard."""
        return max(1, min(_SHARD_IMAGES, _SHARD_BYTES // self.image_bytes))

    def __contains__(self, digest: str) -> bool:
        return self._shard_of(digest) is not None

    def refresh(self) -> list[Path]:
        """Take note of the shards that are in the folder now, also from other processes.

        Returns:
            Those whose header is damaged or that are too short; their images are not among those that are there.

        Raises:
            OSError: One cannot be read now, for want of permission or by a failure of the file system.
        """
        damaged: list[Path] = []
        for path in sorted(set(self.folder.glob(f"*{_SUFFIX}")) - set(self._shards)):
            try:
                with _opened(path) as shard:
                    self._add(list(shard.keys()), path)
            except SafetensorError:
                damaged.append(path)
            except FileNotFoundError:  # another run has cleared it away
                continue
        return damaged

    def _add(self, digests: Iterable[str], path: Path) -> None:
        halves = np.array([_half(digest) for digest in digests], dtype=np.uint64)
        places = np.full(len(halves), len(self._shards), dtype=np.int32)
        self._shards.append(path)
        self._halves, first = np.unique(np.concatenate([halves, self._halves]), return_index=True)
        self._places = np.concatenate([places, self._places])[first]

    def _shard_of(self, digest: str) -> Path | None:
        half = np.uint64(_half(digest))
        at = int(np.searchsorted(self._halves, half))
        return self._shards[self._places[at]] if at < len(self._halves) and self._halves[at] == half else None

    def none(self) -> torch.Tensor:
        """Features (0, T, W) of no image."""
        return torch.empty(0, *self.shape, dtype=self.dtype)

    def read(self, digest: str) -> torch.Tensor:
        """Features (T, W) of an image.

        Raises:
            KeyError: They are not there.
            DamagedShardError: They are not as they were written. The shard is deleted where it is this user's, so that
                a resumed run computes its images again.
            OSError: The shard cannot be read now, for want of permission or by a failure of the file system.
        """
        path = self._shard_of(digest)
        if path is None:
            raise KeyError(digest)
        try:
            with _opened(path) as shard:
                features = shard.get_tensor(digest)
                intact = (shard.metadata() or {}).get(digest) == _checksum(features)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path} was there when the run started and is gone. Resume the run (--resume): it computes its images "
                "again"
            ) from None
        except SafetensorError:
            intact = False
        if not intact or tuple(features.shape) != self.shape or features.dtype != self.dtype:
            raise DamagedShardError(
                f"{path} is damaged{clear_away(path)}: the features of image {digest[:12]} in it are not those that "
                "were written. Resume the run (--resume): it computes them again"
            )
        return features.clone()

    def write(self, features: Mapping[str, torch.Tensor]) -> str:
        """Write one shard: digest -> (T, W); the name of its file.

        Raises:
            OSError: It could not be written, as on a full disk; nothing is left of it.
        """
        path = self.folder / f"{uuid.uuid4().hex}{_SUFFIX}"
        content = {digest: values.detach().cpu().contiguous() for digest, values in features.items()}
        with atomic_file(path) as temporary:
            save_file(content, temporary, {digest: _checksum(values) for digest, values in content.items()})
        self._add(content, path)
        return path.name


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A shard; what the file system refuses is told apart from damage, which is a SafetensorError."""
    try:
        with path.open("rb"), safe_open(path, "pt") as shard:  # safetensors has one error for much
            yield shard
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(
            f"cannot read the image features {path}: {error.strerror or error}. Nothing was deleted; make the file "
            "readable, or give data.cache_image_features another folder"
        ) from error


def clear_away(path: Path) -> str:
    """Delete a damaged shard, but only one's own: what to say of it."""
    try:
        if (owner := path.stat().st_uid) != os.geteuid():
            return f" and belongs to another user ({owner}), who must delete it"
        path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        return f" and cannot be deleted ({error.strerror})"
    return " and was deleted"


def _half(digest: str) -> int:
    """The first 64 bits: two of a million images share them once in 40 million data sets."""
    return int(digest[:16], 16)


def _checksum(values: torch.Tensor) -> str:
    return f"{zlib.crc32(values.view(torch.uint8).numpy().data):08x}"
