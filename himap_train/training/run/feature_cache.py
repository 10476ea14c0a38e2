"""Before training: what the frozen vision tower makes of each image to train and validate on goes to disk, once. Where
images have features of many shapes it is what the projector makes of that, which must then be frozen too.

A pass of its own rather than as training goes: then no step of any epoch runs the tower, every rank calls the same
modules in every step, and what does not fit on the disk is known before the first. The processes of a run share the
work; the folder may be shared by runs and machines, and what a killed run has written is not computed again.

The features are those of one tower and one way of preprocessing: each has a subfolder, named by a digest of the tensors
that make them, the image processor's settings, `image_aspect_ratio`, `image_background`, precision, feature layers and
selection.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from himap_train.bar import progress_bar
from himap_train.data.cached import SIZE, FeatureStore, Place, check_same_images, images_in, read_image
from himap_train.data.encode import Encoder
from himap_train.data.module import LlavaDataModule
from himap_train.data.records import Source
from himap_train.data.skips import skip_limit
from himap_train.models.families import family_of
from himap_train.models.features import features_to_cache
from himap_train.models.install import reads_tower
from himap_train.models.stock import base_model
from himap_train.models.tower import check_frozen, facts_key, images_at_once, tower_facts
from himap_train.processes import from_all
from himap_train.storage import atomic_file, remove_leftovers
from himap_train.training.run.launch import say, together

FOLDER, FACTS = "image_features", "tower.json"
_BATCH = 32
_GB = 1e9


def fill_feature_cache(trainer: Trainer, model: nn.Module, data: LlavaDataModule) -> None:
    """Compute what is missing and let the data read it; nothing where `data.cache_image_features` is off.

    All processes of the run must call it, with the model set up for training and the data for fitting.

    Args:
        trainer: For precision, processes and the run's folder.
        model: LLaVA or PeftModel around one.
        data: Trains on what is filled, and validates on it where its validation images stay the same.

    Raises:
        ValueError: What makes the features is trained, the images change with the epoch, or the features do not fit on
            the disk.
        OSError: They could not be written, or this machine does not see what another has written.
    """
    train = data.source("train")
    if not data.cache_image_features or train is None:
        return
    base = base_model(model)
    check_frozen(base)
    check_same_images(train, data.spec("train"))
    family_of(base).vision(base).eval()  # where a frozen tower belongs in training too
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        store, sources, found = _store(trainer, base, data), data.cached_sources(), dict[str, list[Place]]()
        for split, source in sources.items():
            say(f"caching image features: looking through the images of data.{split}")
            known = {place.digest for places in found.values() for place in places}
            seen = _images(trainer, source, data, _used(trainer, source, data, split))
            found[split] = [place for place in seen if place.digest not in known]
        missing = _announced(trainer, store, [place for places in found.values() for place in places])
        for split, source in sources.items():
            wanted = [place for place in found[split] if place.digest in missing]
            with together():
                last = _compute(trainer, base, source, data, store, wanted)
            with together():
                _require_seen(store, last)
    data.read_features(store)


def _store(trainer: Trainer, base: Any, data: LlavaDataModule) -> FeatureStore:
    """The store of this tower."""
    read = reads_tower(base)
    blank = features_to_cache(base, family_of(base).empty_images(base), read)[0]
    facts = tower_facts(base, data.processor.image_processor, data.image_aspect_ratio, str(trainer.precision))
    facts |= {"dtype": str(blank.dtype), "image_background": data.image_background}
    facts |= {"readings": True} if read else {}
    wanted = data.cache_image_features
    root = Path(trainer.default_root_dir) / FOLDER if wanted is True else Path(str(wanted))
    store = FeatureStore(root / facts_key(facts), blank.shape[1], blank.dtype)
    with together():
        if trainer.is_global_zero:
            _prepare(store, facts)
    return store


def _prepare(store: FeatureStore, facts: dict[str, Any]) -> None:
    """Say of which tower the features are, and clear away what killed processes have left."""
    try:
        remove_leftovers(store.folder)
        if not (store.folder / FACTS).exists():  # else it is somebody's already, and says the same
            with atomic_file(store.folder / FACTS) as file:
                file.write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")
    except OSError as error:
        raise OSError(f"cannot use {store.folder} (data.cache_image_features): {error}") from error


def _used(trainer: Trainer, source: Source, data: LlavaDataModule, split: str) -> int:
    """How many records of a split are looked at in a run, from the first on, also in the place of a broken one."""
    size = min(len(source), data.limits[split] or len(source))
    limit = trainer.limit_val_batches if split == "validation" else None
    if limit is None:
        return size
    together = data.eval_batch_size * trainer.world_size
    batches = limit if isinstance(limit, int) else math.ceil(limit * size / together)
    return min(size, batches * together + skip_limit(size, data.max_skipped) + 1) if batches else 0


def _images(trainer: Trainer, source: Source, data: LlavaDataModule, size: int) -> list[Place]:
    """Every distinct image of the first `size` records once, in the order of digests; each process looks through its
    share of them.
    """
    share = range(trainer.global_rank, size, trainer.world_size)
    found: list[Place] = []
    with progress_bar("looking through images", len(share), trainer.is_global_zero) as advance:
        for places in _loader(share, partial(images_in, source, Encoder(data.processor)), data):
            found += places
            advance(_BATCH)
    distinct: dict[str, Place] = {}
    for part in from_all(found):
        for place in part:
            distinct[place.digest] = min(place, distinct.get(place.digest, place))
    return [distinct[digest] for digest in sorted(distinct)]


def _announced(trainer: Trainer, store: FeatureStore, places: list[Place]) -> set[str]:
    """Digests of what is missing, after saying how much it is; ValueError in all processes where it does not fit."""
    missing = [place for place in places if not store.holds(place.digest, place.tokens)]
    tokens, lacking = (sum(place.tokens for place in part) for part in (places, missing))
    needed, free = store.image_bytes(lacking), shutil.disk_usage(store.folder).free
    size = f"{len(places)} distinct images, {tokens} tokens x {store.width} x {store.dtype.itemsize} bytes"
    figures = (
        f"image features: {size} = {_gb(store.image_bytes(tokens))} in {store.folder}; "
        f"{len(places) - len(missing)} images are there, {_gb(needed)} to write, {_gb(free)} free"
    )
    say(figures)
    failure = None
    if needed > free:
        failure = (
            f"{figures}. They do not fit: give data.cache_image_features a folder on a larger disk, use fewer records "
            "(data.train_limit, data.validation_limit), or set it to null to run the vision tower in every step"
        )
    failure = trainer.strategy.broadcast(failure)
    if failure:
        raise ValueError(failure)
    return {place.digest for place in missing}


def _compute(
    trainer: Trainer, base: Any, source: Source, data: LlavaDataModule, store: FeatureStore, missing: list[Place]
) -> Path | None:
    """Write this process's share of the missing images: the file of the last one.

    After a failure it goes on running the tower, as often as the others: under ZeRO-3 they would wait for it.
    """
    family, last, failure = family_of(base), None, None
    own = missing[trainer.global_rank :: trainer.world_size]
    size = images_at_once(family)
    calls = -(-len(missing[:: trainer.world_size]) // size)
    batches = iter(_loader(own, partial(_read, source, Encoder(data.processor)), data, size))
    blank = family.empty_images(base)
    with progress_bar("caching image features", len(own), trainer.is_global_zero) as advance:
        for _ in range(calls):
            read: list[tuple[Place, dict[str, torch.Tensor] | None]] = next(batches, [])
            good = [(place, image) for place, image in read if image is not None]
            names = [name for name in (good[0][1] if good else ()) if name != SIZE]
            given = {name: torch.cat([image[name] for _, image in good]).to(base.device) for name in names} or blank
            features = features_to_cache(base, given, reads_tower(base))
            for (place, image), values in zip(good, features, strict=False):
                try:
                    if failure is None and not store.holds(place.digest, place.tokens):  # another run may have
                        store.write(place.digest, values, **family.position_inputs(image))
                    last = store.file(place.digest)
                except OSError as error:
                    failure = error
            advance(len(read))
    if failure is not None:
        raise OSError(f"{failure}, or set data.cache_image_features to null. What is written already is kept")
    return last


def _require_seen(store: FeatureStore, last: Path | None) -> None:
    """Raise OSError where this process does not see what others have written: the machines do not share the folder."""
    if not all(file is None or file.is_file() for file in from_all(last)):
        raise OSError(
            f"a process on {platform.node()} does not see the image features that others have written to "
            f"{store.folder}: data.cache_image_features must be a folder that all machines share"
        )


def _read(source: Source, encoder: Encoder, places: list[Place]) -> list[tuple[Place, dict[str, torch.Tensor] | None]]:
    """Places and images, as `read_image` gives them."""
    return [(place, read_image(source, place, encoder)) for place in places]


def _loader(items: Any, work: Callable[[list[Any]], Any], data: LlavaDataModule, size: int = _BATCH) -> DataLoader[Any]:
    """What the workers make of so many items at a time."""
    return DataLoader(items, size, collate_fn=work, num_workers=data.num_workers)


def _gb(count: int) -> str:
    return f"{count / _GB:.1f} GB" if count >= _GB else f"{count / 1e6:.1f} MB"
