"""Scenes of one split, coarse or fine: drawn when asked for, from (split, seed, epoch, index) alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

from himap_train.embedded.fine_scenes import FINE_GRID, FINE_TYPES, ask_fine, compose_fine, draw_fine
from himap_train.embedded.scene_dense import dense_texts, fine_catalogue
from himap_train.embedded.scene_text import TYPES, ask, compose
from himap_train.embedded.scenes import SPLITS, draw

SCENE_SPLITS = (*SPLITS, *(f"fine-{split}" for split in SPLITS))


class Scenes:
    """The scenes of one split: what each holds, its picture, and questions about it.

    Args:
        split: "train", "validation" or "test"; of the fine scenes "fine-train" and so on.
        seed: another seed, other scenes (of the same source images).
        epoch: another epoch, other scenes; set it to train on fresh scenes all the time.
        decoys: striped tiles in a fine scene that no question asks about, 240 at most.
    """

    def __init__(self, split: str, seed: int = 0, epoch: int = 0, decoys: int = 0) -> None:
        if split not in SCENE_SPLITS:
            raise ValueError(f"unknown split {split!r} of the embedded scenes; there are {', '.join(SCENE_SPLITS)}")
        self.split, self.seed, self.epoch, self.decoys = split, seed, epoch, decoys
        self.fine = split.startswith("fine-")
        if not 0 <= decoys <= 240 * self.fine:
            raise ValueError(f"decoys={decoys} in {split} scenes; expected 0 to 240, in fine scenes alone")
        self.types = FINE_TYPES if self.fine else TYPES

    def scene(self, index: int) -> tuple[Any, Image.Image]:
        """What scene `index` holds (`Scene` or `FineScene`), and its picture."""
        rng, images = self.generator(index, 0), self.split.removeprefix("fine-")
        if self.fine:
            fine = compose_fine(rng)
            return fine, draw_fine(fine, images, rng, self.decoys)
        scene = compose(rng)
        return scene, draw(scene, images, rng)

    def ask(self, scene: Any, kind_of_question: str, rng: Generator) -> tuple[str, str, list[int]]:
        """One question of the named type, its answer, and the image tokens that show what it is about (fine alone)."""
        if self.fine:
            question, answer, cells = ask_fine(scene, kind_of_question, rng)
            return question, answer, [row * FINE_GRID + column for row, column in cells]
        return *ask(scene, kind_of_question, rng), []

    def dense(self, scene: Any, rng: Generator) -> list[tuple[str, str]]:
        """Requests whose answers say nearly everything about the scene."""
        return (fine_catalogue if self.fine else dense_texts)(scene, rng)

    def generator(self, scene: int, stream: int) -> Generator:
        """Random numbers of a scene: stream 0 composes and draws it, others ask about it."""
        return np.random.default_rng([SCENE_SPLITS.index(self.split), self.seed, self.epoch, scene, stream])
