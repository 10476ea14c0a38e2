"""The data of a run as a LightningDataModule; the arguments of its `__init__` are the keys of `data:` in a config."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from lightning.pytorch import LightningDataModule

from himap_train.data.batches import pad_token_id_of
from himap_train.data.cached import CachedEncoder, FeatureStore
from himap_train.data.check import DataReport, check_source
from himap_train.data.datasets import EncodedRecords
from himap_train.data.encode import Encoder
from himap_train.data.lengths import estimate_lengths
from himap_train.data.loader import BatchLoader, Collate, Windows
from himap_train.data.mixing import MixedRecords, mix, read_parts
from himap_train.data.records import Source, changes_with_epoch
from himap_train.data.sampling import BatchOrder, check_same_order
from himap_train.data.skips import SkipLog
from himap_train.data.sources import open_source
from himap_train.models.families.base import AspectRatio, Background
from himap_train.models.families.image_form import ImageForm, image_form, limit_images, take_form
from himap_train.ranges import require_possible


class LlavaDataModule(LightningDataModule):
    """Conversations about images, encoded for one checkpoint and batched.

    Args:
        train: data to train on: a file of LLaVA records or `messages` (*.json, *.jsonl, *.ndjson, *.gz), a Hugging Face
            data set (folder, or name on the hub, with `:split` behind it), or `embedded:train`; or a list of such or of
            `{path, weight, image_folder}`, see docs/data.md.
        validation: data to validate on, or a share of `train` to split off, such as 0.02; null for none.
        test: data to test on; null for none.
        image_folder: folder that the image paths in the data start from; by default the folder of the data file.
        follow_links: symbolic links in the image folder may lead out of it; else such images count as broken records.
        batch_size: conversations in a training batch of one device.
        eval_batch_size: in a validation or test batch; by default batch_size.
        max_length: most tokens of a conversation, image tokens included. Longer ones lose their last questions with
            their answers, never part of an image.
        max_image_tokens: most image tokens of one image, which is made smaller for it; by default as the checkpoint has
            it. For Qwen-VL, where very long thin images may have a few more, InternVL and SmolVLM.
        num_workers: processes that read images and tokenize; 0 does it between the training steps.
        group_by_length: make batches of conversations with as many images and of similar length, which saves padding.
        max_skipped: how many broken records may be skipped: a number, or below 1 a fraction of the records.
        train_limit: train on the first records only.
        validation_limit: validate on the first records only.
        test_limit: test on the first records only.
        image_aspect_ratio: "pad" makes images square first, as LLaVA-1.5 was trained; "as_processor" leaves it to the
            checkpoint's image processor, which may cut off the sides. By default as the model or adapter that training
            starts from was trained.
        image_background: colour under transparent images: "white", or "black" for drawings in white; by default as
            above.
        seed: seed of the order of the training data.
        pad_to_multiple_of: round the length of batches up to a multiple; 8 suits GPUs.
        cache_image_features: keep what the frozen vision tower makes of images to train and validate on, and do not run
            it again: a folder, which several runs and machines may share, or true for one in the folder of the run. It
            is filled before training. Large: 1.2 MB an image for LLaVA-1.5 in bf16. Of other families it is what the
            projector makes of that, which must be frozen then: 1.6 MB an image for SmolVLM-500M.
        processor: the checkpoint's; no key of a config, `finetune.py` loads that of `model.path`.

    Raises:
        ValueError: a number cannot be; names key, value and what is allowed.
    """

    def __init__(
        self,
        train: str | list[str | dict[str, Any]] = "embedded:train",
        validation: float | str | None = "embedded:validation",
        test: str | None = None,
        image_folder: str | None = None,
        follow_links: bool = False,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int | None = 2048,
        max_image_tokens: int | None = None,
        num_workers: int = 0,
        group_by_length: bool = False,
        max_skipped: int | float = 0.01,
        train_limit: int | None = None,
        validation_limit: int | None = None,
        test_limit: int | None = None,
        image_aspect_ratio: AspectRatio | None = None,
        seed: int = 0,
        pad_to_multiple_of: int | None = None,
        cache_image_features: bool | str | None = None,
        image_background: Background | None = None,
        processor: Any = None,
    ) -> None:
        require_possible({f"data.{name}": value for name, value in locals().items()})
        super().__init__()
        self.processor = limit_images(processor, max_image_tokens)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        form = ImageForm() if processor is None else image_form(processor)
        self.max_length, self.image_aspect_ratio = max_length, image_aspect_ratio or form.image_aspect_ratio
        self.num_workers, self.group_by_length, self.max_skipped = num_workers, group_by_length, max_skipped
        self.seed, self.pad_to_multiple_of = seed, pad_to_multiple_of
        self.image_background = image_background or form.image_background
        self.max_image_tokens = max_image_tokens or form.max_image_tokens
        self.cache_image_features = cache_image_features
        self._share = validation if isinstance(validation, float) else None
        self._parts = read_parts(train, self._share)
        self.image_folder, self.follow_links = image_folder, follow_links
        self._specs: dict[str, Any] = {"train": train, "validation": validation, "test": test}
        self.limits = {"train": train_limit, "validation": validation_limit, "test": test_limit}
        """How many records of each split are used; None for all."""
        self._sources: dict[str, Source] = {}
        self._encoder: Encoder | None = None
        self._cached_encoder: CachedEncoder | None = None
        self.prompt_tokens: tuple[int, int] | None = None
        """Image tokens and other tokens of a training record's prompt on average, once they are checked."""
        self.token_ids, self.answer_ids = set[int](), dict[int, int]()
        """Tokens of the training records that were examined; of their answers also how often."""
        self.skips: dict[str, SkipLog] = {}
        """For "train" and "validation" which records were skipped so far."""

    def source(self, split: str) -> Source | None:
        """The conversations of "train", "validation" or "test", opened when first asked for; None if there are none."""
        spec = self._specs[split]
        if spec is not None and split not in self._sources:
            if self._parts and (split == "train" or spec is self._share):
                self._sources |= mix(self._parts, self.image_folder, self.follow_links, self._share, self.limits)
            else:
                self._sources[split] = open_source(spec, self.image_folder, split, self.follow_links)
        return self._sources.get(split)

    def spec(self, split: str) -> str:
        """How the config calls the data of a split."""
        return " + ".join(part.path for part in self._parts if split == "train") or str(self._specs[split])

    def setup(self, stage: str) -> None:
        """Opens what the stage needs ("fit" trains and validates), so that bad data ends the run before it starts.

        Raises:
            RuntimeError: it was made without a processor.
            FileNotFoundError, ValueError, ConnectionError: see `open_source`.
        """
        if self.processor is None:
            raise RuntimeError("LlavaDataModule needs the checkpoint's processor: LlavaDataModule(..., processor=...)")
        # Saved with what is trained, which is then asked about pictures that were made ready in the same way.
        take_form(self.processor, ImageForm(self.image_aspect_ratio, self.image_background, self.max_image_tokens))
        self._encoder = Encoder(self.processor, self.max_length)
        cached = stage == "fit" and self.cache_image_features
        self._cached_encoder = CachedEncoder(self.processor, self.max_length) if cached else None
        for split in ("train", "validation") if stage == "fit" else ():
            self.source(split)

    def check(self, split: str = "train", limit: int | None = 2000) -> DataReport | None:
        """The data check of a split, see `check_source`; None when there is nothing to check."""
        source, encoder = self.source(split), self._ready_encoder()
        if source is None:
            return None
        options = (encoder.max_length, limit, self.limits[split], encoder.image_aspect_ratio)
        report = check_source(source, self.processor, *options, name=self.spec(split))
        if split == "train":
            self.prompt_tokens, self.token_ids = report.prompt_tokens(), report.token_ids
            self.answer_ids = report.answer_ids
        return report

    def cached_sources(self) -> dict[str, Source]:
        """Splits whose images are read from `cache_image_features`: not those that are others in each epoch."""
        opened = ((split, self.source(split)) for split in ("train", "validation"))
        return {split: source for split, source in opened if source is not None and not changes_with_epoch(source)}

    def read_features(self, store: FeatureStore) -> None:
        """Train and validate on features of the vision tower, for which `cache_image_features` asks."""
        assert self._cached_encoder is not None
        self._cached_encoder.read_from(store)

    def train_dataloader(self) -> BatchLoader:
        """Right-padded batches with labels, in an order that only (seed, epoch) decides."""
        source, encoder = self.source("train"), self._ready_encoder()
        replicas, rank = self._replicas()
        assert source is not None
        lengths = images = None
        if self.group_by_length:
            lengths, images = estimate_lengths(source, encoder, self.limits["train"])
        dataset = self._dataset("train", source, self._cached_encoder or encoder)
        windows = self._windows()
        groups: dict[str, Any] = {"accumulate": windows.accumulate, "image_tokens": images}
        groups["draw"] = partial(source.draw, seed=self.seed) if isinstance(source, MixedRecords) else None
        shuffle = not getattr(self.trainer, "overfit_batches", 0)  # the same few batches in every epoch
        order = BatchOrder(len(dataset), self.batch_size, lengths, shuffle, self.seed, replicas, rank, **groups)
        trained = self._trained_batches if self.trainer else None
        return BatchLoader(dataset, order, self._collate(), self.num_workers, windows, trained)

    def val_dataloader(self) -> BatchLoader | list[Any]:
        """Batches as for training, in the order of the data.

        A broken record is left out, not replaced; only a batch of nothing else holds a substitute, marked in its meta.
        """
        source, encoder = self.source("validation"), self._ready_encoder()
        if source is None:
            return []
        replicas, rank = self._replicas()
        cached = self._cached_encoder if "validation" in self.cached_sources() else None
        dataset = self._dataset("validation", source, cached or encoder)
        order = BatchOrder(len(dataset), self.eval_batch_size, shuffle=False, num_replicas=replicas, rank=rank)
        return BatchLoader(dataset, order, self._collate(keep_substitutes=False), self.num_workers)

    def state_dict(self) -> dict[str, Any]:
        """What the order of the training data depends on, and how its pictures are made ready; the place in it is the
        loader's own state.
        """
        source = self._sources.get("train")
        processes, accumulate = self._replicas()[0], self._windows().accumulate
        return {
            "records": len(source) if source is not None else None,
            "train_limit": self.limits["train"],
            "batch_size": self.batch_size,
            "accumulate": accumulate,
            "processes": processes,
            "global_batch": self.batch_size * accumulate * processes,
            "image_aspect_ratio": self.image_aspect_ratio,
            "image_background": self.image_background,
            "max_image_tokens": self.max_image_tokens,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses another global batch, and warns when a resumed run cannot go on in the order of the run before."""
        if "train" in self._sources:
            check_same_order(state_dict, self.state_dict())

    def _dataset(self, split: str, source: Source, encoder: Encoder) -> EncodedRecords:
        self.skips[split] = SkipLog(len(source), self.max_skipped, self.limits[split])
        return EncodedRecords(source, encoder.encode, self.skips[split], self.limits[split])

    def _collate(self, keep_substitutes: bool = True) -> Collate:
        return Collate(pad_token_id_of(self.processor.tokenizer), self.pad_to_multiple_of, keep_substitutes)

    def _ready_encoder(self) -> Encoder:
        if self._encoder is None:
            raise RuntimeError("LlavaDataModule.setup has not run yet; call setup(stage) first")
        return self._encoder

    def _replicas(self) -> tuple[int, int]:
        """(number of devices, rank of this one)."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)

    def _windows(self) -> Windows:
        if (trainer := self.trainer) is None:
            return Windows(1, lambda: math.inf)
        return Windows(trainer.accumulate_grad_batches, lambda: trainer.num_training_batches)

    def _trained_batches(self) -> int:
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(progress.processed)
