"""Scenes of one split, coarse or fine: drawn when asked for, from (split, seed, epoch, index) alone."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from PIL import Image

from himap_train.embedded.compose import compose, compose_fine
from himap_train.embedded.scene_text import FINE_TYPES, TYPES, Scene, ask
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

    def scene(self, index: int) -> tuple[Scene, Image.Image]:
        """What scene `index` holds, and its picture."""
        rng = self.generator(index, 0)
        scene = (compose_fine if self.fine else compose)(rng)
        return scene, draw(scene, self.split.removeprefix("fine-"), rng, self.decoys)

    def ask(self, scene: Scene, kind_of_question: str, rng: Generator) -> tuple[str, str, list[int]]:
        """One question of the named type, its answer, and the image tokens that show what it is about (fine alone)."""
        question, answer, cells = ask(scene, kind_of_question, rng)
        return question, answer, [row * scene.grid + column for row, column in cells if scene.fine]

    def generator(self, scene: int, stream: int) -> Generator:
        """Random numbers of a scene: stream 0 composes and draws it, others ask about it."""
        return np.random.default_rng([SCENE_SPLITS.index(self.split), self.seed, self.epoch, scene, stream])
