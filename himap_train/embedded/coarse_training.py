"""How the embedded LLaVA was trained from nothing; its decoder starts from the class head of its vision tower.

The head's rows become word embeddings and output rows, and three attention heads of every layer start as lookups over
the same directions. With random starts the decoder answers only from the frequency of answers for a long time.
Shapes: B images, T image tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from himap_train.embedded.build import IMAGE_SIZE, PATCH_SIZE, WIDTH, build_model, build_processor
from himap_train.embedded.compose import dense_scene
from himap_train.embedded.scene_batches import Lesson, SceneBatches, train_decoder
from himap_train.embedded.scene_text import PLURALS, TYPES, WORDS
from himap_train.embedded.scene_training import (
    HEAD_WORDS,
    HEADS,
    PatchHeads,
    Stages,
    patch_labels,
    pixels,
    scaled,
    train_tower,
)
from himap_train.embedded.scenes import draw

# What each look-up head compares; and by how much a word's attention logit for the image tokens of its own class of
# the first group exceeds that for others.
LOOKUPS = (("kind",), ("colour", "digit"), ("row", "column"))
GAP = 5.0


@torch.no_grad()
def scale_features(model: LlavaForConditionalGeneration, features: Tensor) -> None:
    """Scale the projector such that `features`, (B, T, D) as it made them before, would have root mean square 0.5."""
    scale = 0.5 / features.pow(2).mean().sqrt()
    for parameter in model.model.multi_modal_projector.linear_2.parameters():
        parameter *= scale


@torch.no_grad()
def start_words(model: LlavaForConditionalGeneration, heads: PatchHeads, tokenizer: PreTrainedTokenizerFast) -> None:
    """Start word embeddings and output rows from the class head, at the scale of `scale_features`.

    It is what CLIP's training does for the words of a real LLaVA. Without it the decoder has to find out by chance
    which word belongs to which feature, and stays at chance for long.
    """
    embedding, output = model.model.language_model.embed_tokens.weight, model.lm_head.weight
    nn.init.normal_(embedding, std=0.5)
    nn.init.normal_(output, std=0.02)
    singular = {plural: kind for kind, plural in PLURALS.items()}
    for word in WORDS:
        if (head := singular.get(word, word)) in HEAD_WORDS:
            row = _scaled(heads.linear.weight[HEAD_WORDS.index(head)])
            (token,) = tokenizer.encode(f" {word}", add_special_tokens=False)
            embedding[token] = 0.5 * row
            output[token] = 0.03 * row


@torch.no_grad()
def start_attention(model: LlavaForConditionalGeneration, heads: PatchHeads, features: Tensor) -> None:
    """Start the first three heads of every layer as lookups: a token looks for tokens that are like it in one respect.

    Words are like the image tokens of what they name (`start_words`), so looking things up by content and by place
    need not be found by chance; without it these come late, one after another. `features` (B, T, D) of some images.
    """
    seen, size = _scaled(features.flatten(0, 1)), model.model.language_model.config.head_dim
    looks = [_lookup(heads, names, seen, size) for names in LOOKUPS]
    for layer in model.model.language_model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            for head, look in enumerate(looks):
                projection.weight[head * size : (head + 1) * size] = look + 0.01 * torch.randn(look.shape)


def _scaled(rows: Tensor) -> Tensor:
    """Rows (..., D) brought to root mean square 1."""
    return rows / rows.pow(2).mean(-1, keepdim=True).sqrt()


def _lookup(heads: PatchHeads, names: tuple[str, ...], seen: Tensor, size: int) -> Tensor:
    """Query and key projection, (size, D), of an attention head that compares the named groups.

    `seen` (N, D) image tokens tell how strong it must be for a difference of `GAP`.
    """
    rows = dict(zip(HEADS, heads.linear.weight.split([len(words) for words in HEADS.values()]), strict=True))
    centred = torch.cat([rows[name] - rows[name].mean(0) for name in names])
    _, strength, basis = torch.linalg.svd(centred, full_matrices=False)
    basis = basis[: int((strength > 1e-3 * strength[0]).sum())]
    words = rows[names[0]]
    logits = (_scaled(words) @ basis.T) @ (seen @ basis.T).T / size**0.5
    classes = (seen @ words.T).argmax(-1)
    gaps = [logits[c][classes == c].mean() - logits[c][classes != c].mean() for c in classes.unique()]
    # Rotary embedding turns the first dimensions of each half too fast to compare tokens a hundred places apart.
    slow_first = [d for i in reversed(range(size // 2)) for d in (i, i + size // 2)]
    look = torch.zeros(size, WIDTH)
    look[slow_first[: len(basis)]] = (GAP / torch.stack(gaps).mean()).sqrt() * basis
    return look


def shrink(model: LlavaForConditionalGeneration, count: int) -> None:
    """Leave the decoder its first `count` layers."""
    decoder = model.model.language_model
    decoder.layers = decoder.layers[:count]
    decoder.config.num_hidden_layers = count


@torch.no_grad()
def grow(model: LlavaForConditionalGeneration) -> None:
    """Put a new layer behind each layer of the decoder: random, but it adds nothing yet."""
    decoder, config = model.model.language_model, model.model.language_model.config
    layers: list[nn.Module] = []
    for layer in decoder.layers:
        new = LlamaDecoderLayer(config, 0)
        for parameter in new.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.05)
        nn.init.zeros_(new.self_attn.o_proj.weight)
        nn.init.zeros_(new.mlp.down_proj.weight)
        layers += [layer, new]
    decoder.layers = nn.ModuleList(layers)
    config.num_hidden_layers = len(layers)
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index


@dataclass(frozen=True)
class Lessons:
    """One training of the decoder. Questions about a scene are one of each of `mix`, so a type may come several times.

    Every `dense_every`-th batch before step `dense_until` has dense texts instead of half of the questions. From step
    `chained_from` on, the batches whose number modulo `chained[0]` is `chained[1]` hold conversations of many turns.
    """

    steps: int
    cosine: int  # steps after which the learning rate would be at its end
    peak: float  # learning rate
    seed: int
    mix: str
    dense_every: int
    dense_until: int
    chained: tuple[int, int] = (8, 3)
    chained_from: int = 0


EVEN = "where next_to exist place count where next_to exist place count where next_to colour digit"
LATE = "count next_to digit colour count next_to digit place count next_to digit colour where exist"
CARDS = "count colour next_to digit count colour place next_to count colour digit place where exist"
COUNT = "count next_to count place count next_to count place count next_to colour count exist digit"
ALL = "count place next_to where count colour next_to digit count place next_to where exist colour"
LESSONS = {
    "decoder": Lessons(700, 900, 2e-3, 2000, EVEN, 1, 405, chained=(5, 4), chained_from=405),
    "grown": Lessons(650, 650, 1.2e-3, 6000, EVEN, 4, 455),
    "more": Lessons(480, 480, 1e-3, 6000, LATE, 8, 336),
    "decoder_again": Lessons(340, 340, 9e-4, 6000, CARDS, 9, 238),
    "counts": Lessons(270, 270, 8e-4, 10000, COUNT, 1, 1),
    "last": Lessons(230, 230, 5e-4, 14000, ALL, 1, 1),
}
BATCH = 16  # scenes a step of the decoder; the tower takes four times as many


def train_coarse(work: Path, scale: float, seed: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """All stages; their results go to `work`. `scale` shrinks their steps."""
    processor = build_processor(WORDS)
    model, heads = build_model(len(processor.tokenizer), seed=seed), PatchHeads()
    stage = Stages(work, model=model, heads=heads)

    def pictures(rng: np.random.Generator) -> tuple[Tensor, list[dict[str, Tensor]]]:
        scenes = [dense_scene(rng) for _ in range(4 * BATCH)]
        labels = patch_labels(scenes, IMAGE_SIZE // PATCH_SIZE)
        return pixels([draw(scene, "train", rng) for scene in scenes], IMAGE_SIZE), [labels]

    def tower(name: str, steps: int, own: int, peak: float) -> None:
        stage(name, lambda: train_tower(model, heads, pictures, scaled(steps, scale), peak, own + seed))

    def decoder(name: str) -> None:
        plan = LESSONS[name]

        def lesson(now: int) -> Lesson:
            dense = now % plan.dense_every == 0 and now < scale * plan.dense_until
            chained = now % plan.chained[0] == plan.chained[1] and now >= scale * plan.chained_from
            return Lesson(plan.mix.split(), dense=dense, chained=chained)

        steps, cosine = range(scaled(plan.steps, scale)), scaled(plan.cosine, scale)
        stage(name, lambda: train_decoder(model, processor, lesson, steps, cosine, plan.peak, plan.seed + seed, BATCH))

    def features() -> Tensor:
        return SceneBatches(model, processor, 3000 + seed).get(0, 32, Lesson(TYPES[:1]))[0].float()

    tower("tower", 1000, 0, 1.5e-3)
    vision = {n: w.clone() for n, w in model.state_dict().items() if "vision_tower" in n or "projector" in n}
    shrink(model, 4)
    scale_features(model, features())
    start_words(model, heads, processor.tokenizer)
    with torch.random.fork_rng(devices=[]):  # so the weights of new layers do not depend on how attention starts
        start_attention(model, heads, features())
    decoder("decoder")
    grow(model)
    decoder("grown")
    decoder("more")
    model.load_state_dict(vision, strict=False)
    heads.requires_grad_(False)
    tower("tower_again", 420, 1000, 8e-4)
    scale_features(model, features())
    decoder("decoder_again")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    decoder("counts")
    model.load_state_dict({name: (weight + before[name]) / 2 for name, weight in model.state_dict().items()})
    decoder("last")
    return model, processor
