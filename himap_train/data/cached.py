"""Encoding with features from a store in place of pixels, and reading what a store lacks.

Images are known by their content: the bytes of a file, wherever it lies, or the pixels of an image that has no file.
So the same picture in several records or data sets is computed once, and one that has changed is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from himap_train.data.encode import Encoder, Sample
from himap_train.data.feature_store import FeatureStore
from himap_train.data.images import content_digest, open_image
from himap_train.data.pixel_modes import Background
from himap_train.data.records import Conversation, RecordError, Source, changes_with_epoch
from himap_train.models.families import family_of_processor
from himap_train.models.families.base import AspectRatio

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

    def _images(self, conversation: Conversation) -> tuple[list[dict[str, torch.Tensor]], list[int]]:
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
        return found, [store.shape[0]] * len(found)

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
