"""Features of images on disk, a safetensors file for each, named by the image's content.

Several processes and machines may write to one folder side by side: a file gets its name once it is whole on the disk,
and two that write the same image write the same. A checksum stands in its metadata.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from himap_train.storage import atomic_file

_NAME, _CHECKSUM = "features", "crc32"


class DamagedFeaturesError(OSError):
    """Features on the disk are not those that were written."""


class FeatureStore:
    """Reads and writes features (T, W) of images.

    Args:
        folder: Made when something is written. Holds features of one vision tower and one way of preprocessing.
        tokens: T, of each image.
        width: W.
        dtype: Dtype of the features.
    """

    def __init__(self, folder: Path, tokens: int, width: int, dtype: torch.dtype) -> None:
        self.folder, self.shape, self.dtype = folder, (tokens, width), dtype

    @property
    def image_bytes(self) -> int:
        """Bytes of one image's features."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def file(self, digest: str) -> Path:
        """Where the features of an image are, or would be."""
        return self.folder / f"{digest}.safetensors"

    def __contains__(self, digest: str) -> bool:
        """Whether they are there; what a full disk or a crash has cut off is not."""
        try:
            return self.file(digest).stat().st_size > self.image_bytes
        except FileNotFoundError:
            return False

    def none(self) -> torch.Tensor:
        """Features (0, T, W) of no image."""
        return torch.empty(0, *self.shape, dtype=self.dtype)

    def read(self, digest: str) -> torch.Tensor:
        """Features (T, W) of an image.

        Raises:
            KeyError: They are not there.
            DamagedFeaturesError: They are not as they were written. The file is deleted where it is this user's, so
                that a resumed run computes them again.
            OSError: The file cannot be read now, for want of permission or by a failure of the file system.
        """
        path = self.file(digest)
        try:
            with path.open("rb"), safe_open(path, "pt") as file:  # safetensors has one error for much
                features: torch.Tensor = file.get_tensor(_NAME)
                intact = (file.metadata() or {}).get(_CHECKSUM) == _checksum(features)
        except FileNotFoundError:
            raise KeyError(digest) from None
        except OSError as error:
            raise OSError(
                f"cannot read the image features {path}: {error.strerror or error}. Nothing was deleted; make the file "
                "readable, or give data.cache_image_features another folder"
            ) from error
        except SafetensorError:
            intact = False
        if not intact or tuple(features.shape) != self.shape or features.dtype != self.dtype:
            raise DamagedFeaturesError(
                f"{path} is damaged{_clear_away(path)}: the features in it are not those that were written. Resume the "
                "run (--resume): it computes them again"
            )
        return features.clone()

    def write(self, digest: str, features: torch.Tensor) -> None:
        """Write features (T, W).

        Raises:
            OSError: They could not be written, as on a full disk; nothing is left of them.
        """
        values = features.detach().cpu().contiguous()
        with atomic_file(self.file(digest)) as temporary:
            save_file({_NAME: values}, temporary, {_CHECKSUM: _checksum(values)})


def _clear_away(path: Path) -> str:
    """Delete a damaged file, but only one's own: what to say of it."""
    try:
        if (owner := path.stat().st_uid) != os.geteuid():
            return f" and belongs to another user ({owner}), who must delete it"
        path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        return f" and cannot be deleted ({error.strerror})"
    return " and was deleted"


def _checksum(values: torch.Tensor) -> str:
    return f"{zlib.crc32(values.view(torch.uint8).numpy().data):08x}"
