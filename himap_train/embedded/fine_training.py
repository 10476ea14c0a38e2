"""What the training of the fine model starts from: the embedded model's decoder and words, and labels for a new tower.

The class head that the embedded model's features answer to is fitted again and then frozen: a new tower that is trained
against it puts its features where the decoder expects them.

Shapes: B scenes, T image tokens (256), V vocabulary, D width (128).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from himap_train.embedded.build import build_processor
from himap_train.embedded.fine_scenes import FINE_CELL, FINE_GRID, FINE_SIZE, FineScene, third
from himap_train.embedded.scene_text import WORDS, Scene
from himap_train.embedded.scene_training import dense_scene, image_features, patch_labels, pixels
from himap_train.embedded.scenes import draw
from himap_train.embedded.start import HEADS, PatchHeads
from himap_train.embedded.words import EXTRA_WORDS

ALL_WORDS = tuple(dict.fromkeys([*WORDS, *EXTRA_WORDS]))
_THIRDS = np.array([third(index) for index in range(FINE_GRID)])


def fine_processor() -> LlavaProcessor:
    """The embedded model's processor for 256x256 images of 256 tokens, with a token for each of `ALL_WORDS`."""
    return build_processor(ALL_WORDS, FINE_SIZE, FINE_CELL)


def fit_heads(model: LlavaForConditionalGeneration, steps: int) -> PatchHeads:
    """The class head of the embedded model's features: its directions are what the decoder looks for. Frozen."""
    heads, rng = PatchHeads(), np.random.default_rng([7, 0])
    optim = torch.optim.Adam(heads.parameters(), 1e-2)
    for now in range(steps):
        scenes = [dense_scene(rng) for _ in range(32)]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features = image_features(model, pixels([draw(scene, "train", rng) for scene in scenes]))
        loss, _ = heads(features.float(), patch_labels(scenes))
        optim.param_groups[0]["lr"] = 1e-2 * (1 - now / steps)
        optim.zero_grad()
        loss.backward()
        optim.step()
    return heads.requires_grad_(False)


def untrained(old: LlavaForConditionalGeneration, vocabulary: int, seed: int) -> LlavaForConditionalGeneration:
    """The embedded model's shape with a tower for 256x256 images and another vocabulary; random weights."""
    config: Any = copy.deepcopy(old.config)
    config.vision_config.image_size, config.vision_config.patch_size = FINE_SIZE, FINE_CELL
    config.image_seq_length, config.text_config.vocab_size = FINE_GRID**2, vocabulary
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.generation_config = copy.deepcopy(old.generation_config)
    return model


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
    wanted = image_features(old, pixels(pictures)).pow(2).mean().sqrt()
    found = image_features(model, pixels(pictures, FINE_SIZE)).pow(2).mean().sqrt()
    for parameter in model.model.multi_modal_projector.linear_2.parameters():
        parameter *= wanted / found


def fine_labels(scenes: Sequence[FineScene]) -> dict[str, Tensor]:
    """For each head the class of what lies at each patch, (B, T); -100 where a patch has no colour or digit."""
    grids = {name: np.full((len(scenes), FINE_GRID, FINE_GRID), -100) for name in HEADS}
    grids["kind"][:] = HEADS["kind"].index("nothing")
    grids["row"][:], grids["column"][:] = _THIRDS[:, None], _THIRDS
    for b, scene in enumerate(scenes):
        for (row, column), item in scene.things:
            for name, word in {"kind": item.kind, "colour": item.colour, "digit": item.digit}.items():
                if word:
                    grids[name][b, row, column] = HEADS[name].index(word)
    return {name: torch.from_numpy(grid.reshape(len(scenes), -1)) for name, grid in grids.items()}


def coarse_labels(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """`patch_labels` of coarse scenes enlarged to 16 x 16 patches: each has the class of its centre's place."""
    side = 12  # of the labels' grid: four patches a place
    index = torch.tensor([[4 * side * row + 4 * column for column in _THIRDS] for row in _THIRDS]).flatten()
    return {name: labels[:, index] for name, labels in patch_labels(scenes).items()}
