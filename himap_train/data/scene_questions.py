"""Questions about the embedded scenes as a source of conversations."""

from __future__ import annotations

from himap_train.data.records import Conversation, Turn
from himap_train.embedded.scene_source import Scenes


class SceneQuestions(Scenes):
    """Map-style source of `Conversation`; `meta["type"]` names the type of its last question.

    On fine scenes `meta["patches"]` holds the image tokens that show what it is about: what an oracle would keep.

    Args:
        split: "train", "validation" or "test"; of the fine scenes "fine-train" and so on.
        scenes: how many scenes. Training may ask for any number: they are never stored.
        seed: another seed, other scenes (of the same source images).
        questions_per_scene: conversations about each scene, all on the same image, one after the other.
        turns: questions in one conversation.
        epoch: another epoch, other scenes; set it to train on fresh scenes all the time.
        fixed: 1 keeps the scenes of this epoch in training too.
        decoys: striped tiles in a fine scene that no question asks about, 240 at most.
    """

    def __init__(
        self,
        split: str,
        scenes: int = 1000,
        seed: int = 0,
        questions_per_scene: int = 1,
        turns: int = 1,
        epoch: int = 0,
        fixed: int = 0,
        decoys: int = 0,
    ) -> None:
        super().__init__(split, seed, epoch, decoys)
        if min(scenes, questions_per_scene, turns) < 1:
            raise ValueError(
                f"scenes={scenes}, questions_per_scene={questions_per_scene}, turns={turns}: all must be at least 1"
            )
        self.scenes, self.questions_per_scene, self.turns, self.fixed = scenes, questions_per_scene, turns, bool(fixed)

    def __len__(self) -> int:
        """Number of conversations."""
        return self.scenes * self.questions_per_scene

    def __getitem__(self, index: int) -> Conversation:
        """Conversation `index`; types follow one another through `types`."""
        if not 0 <= index < len(self):
            raise IndexError(f"conversation {index} of {len(self)}")
        scene, image = self.scene(index // self.questions_per_scene)
        rng = self.generator(index // self.questions_per_scene, 1 + index % self.questions_per_scene)
        turns: list[Turn] = []
        for turn in range(self.turns):
            kind = self.types[(index * self.turns + turn) % len(self.types)]
            question, answer, patches = self.ask(scene, kind, rng)
            turns += [Turn("user", question if turn else f"<image>\n{question}"), Turn("assistant", answer)]
        name = f"{self.split}-{self.seed}-{self.epoch}-{index}"
        meta = {"type": kind} | ({"patches": " ".join(map(str, patches))} if patches else {})
        return Conversation(id=name, images=(image,), turns=tuple(turns), meta=meta)
