"""Features of images on disk, in place of pixels: a safetensors file for each image, with its size and what else a
model is told of it.

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
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from himap_train.data.encode import Encoder, Sample
from himap_train.data.images import content_digest, image_size, open_image
from himap_train.data.records import Conversation, RecordError, Source, changes_with_epoch
from himap_train.storage import atomic_file

SIZE = "size"
"""Under which name the (width, height) of an image stands beside its features."""
_NAME, _CHECKSUM = "features", "crc32"


class DamagedFeaturesError(OSError):
    """Features on the disk are not those that were written."""


class FeatureStore:
    """Reads and writes features (T, W) of images.

    Args:
        folder: Made when something is written. Holds features of one vision tower and one way of preprocessing.
        width: W.
        dtype: Dtype of the features.
    """

    def __init__(self, folder: Path, width: int, dtype: torch.dtype) -> None:
        self.folder, self.width, self.dtype = folder, width, dtype

    def file(self, digest: str) -> Path:
        """Where the features of an image are, or would be."""
        return self.folder / f"{digest}.safetensors"

    def image_bytes(self, tokens: int) -> int:
        """Bytes of the features of an image of so many image tokens."""
        return tokens * self.width * self.dtype.itemsize

    def holds(self, digest: str, tokens: int) -> bool:
        """Whether those of an image of so many tokens are there; what a full disk or a crash has cut off is not."""
        try:
            return self.file(digest).stat().st_size > self.image_bytes(tokens)
        except FileNotFoundError:
            return False

    def none(self) -> torch.Tensor:
        """Features (0, W) of no image."""
        return torch.empty(0, self.width, dtype=self.dtype)

    def read(self, digest: str) -> dict[str, torch.Tensor]:
        """What was written of an image: `features` (T, W), and all else by its name.

        Raises:
            KeyError: They are not there.
            DamagedFeaturesError: They are not as they were written. The file is deleted where it is this user's, so
                that a resumed run computes them again.
            OSError: The file cannot be read now, for want of permission or by a failure of the file system.
        """
        path = self.file(digest)
        try:
            with path.open("rb"), safe_open(path, "pt") as file:  # safetensors has one error for much
                image = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, not a dict
                intact = (file.metadata() or {}).get(_CHECKSUM) == _checksum(image)
        except FileNotFoundError:
            raise KeyError(digest) from None
        except OSError as error:
            raise OSError(
                f"cannot read the image features {path}: {error.strerror or error}. Nothing was deleted; make the file "
                "readable, or give data.cache_image_features another folder"
            ) from error
        except SafetensorError:
            intact = False
        if not intact or image[_NAME].shape[1:] != (self.width,) or image[_NAME].dtype != self.dtype:
            raise DamagedFeaturesError(
                f"{path} is damaged{_clear_away(path)}: the features in it are not those that were written. Resume the "
                "run (--resume): it computes them again"
            )
        return image

    def write(self, digest: str, features: torch.Tensor, **more: torch.Tensor) -> None:
        """Write features (T, W), and `more` of the same image by name.

        Raises:
            OSError: They could not be written, as on a full disk; nothing is left of them.
        """
        image = {name: values.detach().cpu().contiguous() for name, values in {_NAME: features, **more}.items()}
        with atomic_file(self.file(digest)) as temporary:
            save_file(image, temporary, {_CHECKSUM: _checksum(image)})


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


def _checksum(image: dict[str, torch.Tensor]) -> str:
    """Of all values, in the order of their names."""
    found = 0
    for name in sorted(image):
        found = zlib.crc32(image[name].view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


class Place(NamedTuple):
    """Where an image is found.

    Attributes:
        digest: What it is known by.
        record: Index of a record that shows it.
        number: Its number among the images of that record.
        tokens: How many image tokens it has.
    """

    digest: str
    record: int
    number: int
    tokens: int


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
        """As `Encoder.encode`. A conversation without images has features of none, (0, W)."""
        sample = super().encode(conversation)
        images = [dict(image) for image in sample["images"]]
        features = torch.cat([self._filled().none(), *(image.pop(_NAME) for image in images)])
        return {**sample, "images": [image for image in images if image], "image_features": features}

    def _images(self, conversation: Conversation) -> tuple[list[dict[str, torch.Tensor]], list[list[int]]]:
        store, where = self._filled(), conversation.where
        found, places = list[dict[str, torch.Tensor]](), list[list[int]]()
        for image in conversation.images:
            digest = content_digest(image, where)
            try:
                stored = store.read(digest)
            except KeyError:
                super()._images(conversation)  # raises RecordError where it is broken, which is why it is not there
                raise RuntimeError(
                    f"{where}: an image has no features in {store.folder}; it has changed since the run started, or "
                    "files were deleted there. Resume the run (--resume): it computes what is missing"
                ) from None
            width, height = stored.pop(
                SIZE, torch.zeros(2, dtype=torch.int64)
            ).tolist()  # not in files of earlier versions
            places.append(self._place(len(stored[_NAME]), (width, height)))
            found.append(stored)
        return found, places

    def _filled(self) -> FeatureStore:
        if self._store is None:
            raise RuntimeError("there are no cached features yet: `fill_feature_cache` must come before training")
        return self._store


def images_in(source: Source, encoder: Encoder, indices: Sequence[int]) -> list[Place]:
    """The images of some records, without those that cannot be used: training reports them."""
    found: list[Place] = []
    for index in indices:
        try:
            conversation = source[index]
        except RecordError:
            continue
        for position, image in enumerate(conversation.images):
            with suppress(RecordError):
                (tokens,) = encoder.image_tokens(image_size(image, conversation.where))
                found.append(Place(content_digest(image, conversation.where), index, position, tokens))
    return found


def read_image(source: Source, place: Place, encoder: Encoder) -> dict[str, torch.Tensor] | None:
    """An image as the model takes it, and its `size`, (width, height); None for one that cannot be decoded."""
    try:
        image = source[place.record].images[place.number]
        image = open_image(image, f"record {place.record}", encoder.image_background)
        made = encoder.family.encode_image(encoder.processor, image, encoder.image_aspect_ratio)
        return {**made, SIZE: torch.tensor(image.size)}
    except (ValueError, ArithmeticError, MemoryError):  # broken, or too long for the transform: training reports it
        return None
