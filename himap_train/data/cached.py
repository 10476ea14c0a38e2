"""Features of images on disk, in place of pixels: a safetensors file for each image.

Images are known by their content: the bytes of a file, wherever it lies, or the pixels of an image that has no file.
So the same picture in several records or data sets is computed once, and one that has changed is computed again.

Several processes and machines may write to one folder side by side: a file gets its name once it is whole on the disk,
and two that write the same image write the same. A checksum stands in its metadata.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from himap_train.data.encode import Encoder, Sample
from himap_train.data.images import content_digest, open_image
from himap_train.data.records import Conversation, RecordError, Source, changes_with_epoch
from himap_train.models.families import family_of_processor
from himap_train.models.families.base import AspectRatio, Background
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


_FEATURES = "image_features"
Place = tuple[str, int, int]
"""An image: its digest, the index of a record that shows it, its number among the images of that record."""


def check_same_images(source: Source, name: str) -> None:
    """Raises ValueError where the images of a source are others in each epoch, varied at random."""
    if changes_with_epoch(source):
        raise ValueError(
            f"data.cache_image_features does not go with data.train {name}: its images are drawn and varied anew in "
            f"each epoch. Keep those of the first ({name}{'&' if '?' in name else '?'}fixed=1), or set "
            "data.cache_image_features to null"
        )


class CachedEncoder(Encoder):
    """Encodes conversations with `image_features` in place of `images`; no image is decoded.

    Arguments are those of `Encoder`.
    """

    _store: FeatureStore | None = None

    def read_from(self, store: FeatureStore) -> None:
        """Take features from here, once they are there: loaders are made before the model can compute them."""
        self._store = store

    def encode(self, conversation: Conversation) -> Sample:
        """As `Encoder.encode`. A conversation without images has features of none, (0, T, W)."""
        sample = super().encode(conversation)
        features = [image[_FEATURES] for image in sample["images"]]
        return {**sample, "images": [], "image_features": torch.stack(features) if features else self._filled().none()}

    def _images(self, conversation: Conversation) -> tuple[list[dict[str, torch.Tensor]], list[list[int]]]:
        store, where = self._filled(), conversation.where
        found: list[dict[str, torch.Tensor]] = []
        for image in conversation.images:
            digest = content_digest(image, where)
            try:
                found.append({_FEATURES: store.read(digest)})
            except KeyError:
                super()._images(conversation)  # raises RecordError where it is broken, which is why it is not there
                raise RuntimeError(
                    f"{where}: an image has no features in {store.folder}; it has changed since the run started, or "
                    "files were deleted there. Resume the run (--resume): it computes what is missing"
                ) from None
        # features of one shape stand for images of any size
        return found, [self._place(store.shape[0], (0, 0)) for _ in found]

    def _filled(self) -> FeatureStore:
        if self._store is None:
            raise RuntimeError("there are no cached features yet: `fill_feature_cache` must come before training")
        return self._store


def images_in(source: Source, indices: Sequence[int]) -> list[Place]:
    """The images of some records, without those that cannot be read: training reports them."""
    found: list[Place] = []
    for index in indices:
        try:
            conversation = source[index]
        except RecordError:
            continue
        for position, image in enumerate(conversation.images):
            with suppress(RecordError):
                found.append((content_digest(image, conversation.where), index, position))
    return found


def read_image(
    source: Source, place: Place, processor: Any, aspect_ratio: AspectRatio, background: Background = "white"
) -> dict[str, torch.Tensor] | None:
    """An image as the model takes it; None for one that cannot be decoded.

    Args:
        source: the records.
        place: which image.
        processor: the checkpoint's.
        aspect_ratio: as in training.
        background: as in training.
    """
    _, index, position = place
    try:
        image = open_image(source[index].images[position], f"record {index}", background)
        return family_of_processor(processor).encode_image(processor, image, aspect_ratio)
    except (ValueError, ArithmeticError, MemoryError):  # broken, or too long for the transform: training reports it
        return None
