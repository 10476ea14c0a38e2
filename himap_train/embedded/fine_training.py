"""How the fine model was trained, from the embedded model's decoder and words, with a new tower.

The class head that the embedded model's features answer to is fitted again and then frozen: a new tower that is trained
against it puts its features where the decoder expects them.

Shapes: B scenes, T image tokens (256), V vocabulary, D width (128).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from himap_train.embedded.build import IMAGE_SIZE, PATCH_SIZE, build_model, build_processor
from himap_train.embedded.compose import compose_fine, dense_fine, dense_scene
from himap_train.embedded.model import embedded_model_path
from himap_train.embedded.scene_batches import Lesson, decoder_optimizer, train_decoder
from himap_train.embedded.scene_text import FINE_GRID, WORDS, Scene
from himap_train.embedded.scene_training import (
    PatchHeads,
    Stages,
    image_features,
    patch_labels,
    pixels,
    scaled,
    train_tower,
)
from himap_train.embedded.scenes import FINE_CELL, FINE_SIZE, draw
from himap_train.embedded.words import EXTRA_WORDS

ALL_WORDS = tuple(dict.fromkeys([*WORDS, *EXTRA_WORDS]))
FINE = "digit where next_to count colour exist digit next_to where count next_to colour"
COARSE = "count place next_to where count colour next_to digit place next_to where exist"
FINE_LATE = "count digit next_to count colour where count next_to exist colour count digit"
COARSE_LATE = "count place digit count next_to count where exist next_to count colour place"
SPLITS = ("fine-train", "train", "fine-train", "train", "fine-train")


def fine_processor() -> LlavaProcessor:
    """The embedded model's processor for 256x256 images of 256 tokens, with a token for each of `ALL_WORDS`."""
    return build_processor(ALL_WORDS, FINE_SIZE, FINE_CELL)


def fit_heads(heads: PatchHeads, model: LlavaForConditionalGeneration, steps: int) -> None:
    """Fit the class head to the embedded model's features: its directions are what the decoder looks for."""
    rng = np.random.default_rng([7, 0])
    optim = torch.optim.Adam(heads.parameters(), 1e-2)
    for now in range(steps):
        scenes = [dense_scene(rng) for _ in range(32)]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features = image_features(model, pixels([draw(scene, "train", rng) for scene in scenes], IMAGE_SIZE))
        loss, _ = heads(features.float(), patch_labels(scenes, IMAGE_SIZE // PATCH_SIZE))
        optim.param_groups[0]["lr"] = 1e-2 * (1 - now / steps)
        optim.zero_grad()
        loss.backward()
        optim.step()


@torch.no_grad()
def start_decoder(
    model: LlavaForConditionalGeneration,
    old: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    old_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Give `model` the old decoder, and the old rows of the words that both know; other words start apart.

    A new word's output row points where its embedding does, so that saying a word that was read is near at once.
    """
    decoder, before = model.model.language_model, old.model.language_model
    decoder.layers.load_state_dict(before.layers.state_dict())
    decoder.norm.load_state_dict(before.norm.state_dict())
    embedding, output = decoder.embed_tokens.weight, model.lm_head.weight
    embedding.normal_(std=0.5)
    output.copy_(0.06 * embedding)
    vocabulary, known = old_tokenizer.get_vocab(), {"USER", "ASSISTANT", *WORDS}
    for token, index in tokenizer.get_vocab().items():
        word = token.removeprefix(chr(0x120))
        if token in vocabulary and (word in known or len(token) == 1 or token.startswith("<")):
            embedding[index] = before.embed_tokens.weight[vocabulary[token]]
            output[index] = 0.06 * embedding[index]
            if word in WORDS or token == tokenizer.eos_token:
                output[index] = old.lm_head.weight[vocabulary[token]]


@torch.no_grad()
def revive_words(model: LlavaForConditionalGeneration) -> None:
    """Turn output rows that point where another does towards their embedding: what was never said fell together."""
    rows, embedding = model.lm_head.weight, model.model.language_model.embed_tokens.weight
    ahead = torch.nn.functional.normalize(rows, dim=-1)
    alike = (ahead @ ahead.T).fill_diagonal_(-1).amax(-1) > 0.99
    rows[alike] += 0.06 * embedding[alike] / embedding[alike].pow(2).mean(-1, keepdim=True).sqrt()


@torch.no_grad()
def scale_to(model: LlavaForConditionalGeneration, old: LlavaForConditionalGeneration, scenes: Sequence[Scene]) -> None:
    """Scale the projector such that features of coarse scenes have the size that the old decoder knows."""
    pictures = [draw(scene, "train", np.random.default_rng(number)) for number, scene in enumerate(scenes)]
    wanted = image_features(old, pixels(pictures, IMAGE_SIZE)).pow(2).mean().sqrt()
    found = image_features(model, pixels(pictures, FINE_SIZE)).pow(2).mean().sqrt()
    for parameter in model.model.multi_modal_projector.linear_2.parameters():
        parameter *= wanted / found


def pictures(rng: np.random.Generator, sparse: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """16 coarse and 16 fine pictures for the tower; `sparse` of the fine ones are as questions have them."""
    coarse = [dense_scene(rng) for _ in range(16)]
    fine = [compose_fine(rng) if number < sparse else dense_fine(rng) for number in range(16)]
    images = [draw(scene, "train", rng) for scene in coarse + fine]
    return pixels(images, FINE_SIZE), [patch_labels(coarse, FINE_GRID), patch_labels(fine, FINE_GRID)]


def train_fine(work: Path, scale: float, seed: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """All stages; their results go to `work`. `scale` shrinks their steps."""
    path = embedded_model_path()
    old = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(seed)
    processor, heads = fine_processor(), PatchHeads()
    eyes, model = (
        build_model(size, seed=seed, image_size=FINE_SIZE, patch_size=FINE_CELL).eval()
        for size in (len(old.lm_head.weight), len(processor.tokenizer))
    )
    model.config.dtype = model.config.text_config.dtype = model.config.vision_config.dtype = torch.float32
    start_decoder(model, old, processor.tokenizer, AutoProcessor.from_pretrained(path).tokenizer)
    optim = decoder_optimizer(model)
    stage = Stages(work, heads=heads, eyes=eyes, model=model, optim=optim)

    def tower(name: str, steps: int, peak: float, own: int, sparse: int) -> None:
        drawn = partial(pictures, sparse=sparse)
        stage(name, lambda: train_tower(eyes, heads, drawn, scaled(steps, scale), peak, own + seed))
        model.model.vision_tower.load_state_dict(eyes.model.vision_tower.state_dict())
        model.model.multi_modal_projector.load_state_dict(eyes.model.multi_modal_projector.state_dict())
        scale_to(model, old, [dense_scene(np.random.default_rng([5, seed, number])) for number in range(16)])

    steps, words = max(2, round(scale * 1800)), scaled(250, scale)

    def lesson(now: int, copies: int = 1) -> Lesson:
        split = SPLITS[now % len(SPLITS)]
        late, dense = now >= 2 * steps // 3 or copies > 1, copies == 1 and now < steps // 4 and now % 4 < 2
        mix = ((COARSE_LATE, FINE_LATE) if late else (COARSE, FINE))[split == "fine-train"]
        return Lesson(mix.split(), split, dense, now % 10 == 3, ALL_WORDS, copies)

    def decoder(name: str, first: int, last: int) -> None:
        now = range(first, last)
        stage(name, lambda: train_decoder(model, processor, lesson, now, steps, 1e-3, 100 + seed, 12, optim))

    stage("heads", lambda: fit_heads(heads, old, scaled(150, scale)))
    heads.requires_grad_(False)
    tower("tower", 1800, 1.5e-3, 0, sparse=0)
    decoder("decoder", 0, steps // 2)
    tower("tower_again", 700, 8e-4, 1000, sparse=8)
    decoder("decoder_again", steps // 2, steps)
    revive_words(model)
    say = partial(lesson, copies=4)
    stage("words", lambda: train_decoder(model, processor, say, range(words), words, 3e-4, 200 + seed, 12))
    return model, processor
