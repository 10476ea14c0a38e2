"""Train the embedded LLaVA from nothing, on one CPU core, and write its folder.

    python recipes/train_embedded.py --work runs/embedded --out himap_train/assets/embedded_llava

Eight stages, about 67 minutes on one core with avx512_bf16 (12 + 10 + 13 + 9 + 8 + 6 + 5 + 4):

1. `tower`: vision tower and projector, with dense labels. From each of the 144 image tokens one linear layer has to
   tell what lies at its place, the colour and digit of a card, and the place's row and column.
2. `decoder`: four decoder layers, started from that linear layer (`embedded_start`), on fresh scenes all the time:
   first with dense texts beside the questions, then questions alone. Tower and projector are frozen.
3. `grown`: a new layer behind each of the four; all eight are trained.
4. `more`: the same again, with more of the question types that are learnt last.
5. `tower_again`: the tower of stage 1 further, with the linear layer frozen, so that its features stay where the
   decoder expects them.
6. `decoder_again`: the decoder on the better features, with more questions about cards.
7. `counts`: the decoder again, on other scenes, with more questions about counts.
8. `last`: the decoder once more, on other scenes, from the mean of the weights of stages 6 and 7.

The weights in the package came from these stages; a second run of the whole recipe, on the same kind of machine, gave
the same file to the last byte. Floating-point results differ between machines, and so will the weights. A stage whose
result is already in the work folder is not repeated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from himap_train.embedded.build import build_model, build_processor, export
from himap_train.embedded.scene_batches import SceneBatches, accuracy, answer_logits
from himap_train.embedded.scene_text import TYPES, WORDS
from himap_train.embedded.scene_training import (
    dense_scene,
    optimizer,
    patch_labels,
    pixels,
    step,
    train_tower,
)
from himap_train.embedded.scenes import draw
from himap_train.embedded.start import PatchHeads, grow, scale_features, shrink, start_attention, start_words


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
TOWER = {"tower": (1000, 0, 1.5e-3), "tower_again": (420, 1000, 8e-4)}  # steps, seed, peak learning rate


def pictures(rng: np.random.Generator, size: int) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """A batch for the tower."""
    scenes = [dense_scene(rng) for _ in range(size)]
    return pixels([draw(scene, "train", rng) for scene in scenes]), [patch_labels(scenes)]


def train_decoder(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, plan: Lessons, scale: float, seed: int, batch: int
) -> None:
    """The decoder with its words, by `plan`. `scale` shrinks its steps."""
    model.model.language_model.set_attn_implementation("bf16_plain")
    trained: list[nn.Parameter] = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    data, optim = SceneBatches(model, processor, "train", plan.seed + seed), optimizer(trained)
    steps, start = scaled(plan.steps, scale), time.time()
    for now in range(steps):
        dense = now % plan.dense_every == 0 and now < scale * plan.dense_until
        chained = now % plan.chained[0] == plan.chained[1] and now >= scale * plan.chained_from
        features, rows, _ = data.get(now, batch, plan.mix.split(), dense, chained)
        with torch.autocast("cpu", torch.bfloat16):
            logits, target = answer_logits(model, features, data.prefix, rows)
            loss = nn.functional.cross_entropy(logits, target)
        step(optim, loss, now, scaled(plan.cosine, scale), plan.peak)
        if now % 25 == 0 or now == steps - 1:
            right, spent = (logits.argmax(-1) == target).float().mean().item(), time.time() - start
            print(f"decoder {now}/{steps} {spent:.0f} s, loss {loss.item():.3f}, tokens right {right:.3f}", flush=True)
        if now % 100 == 99:
            print("validation", accuracy(model, processor, "validation", scenes=80), flush=True)


def scaled(steps: int, scale: float) -> int:
    """`steps` shrunk, at least 1."""
    return max(1, round(scale * steps))


def train(work: Path, processor: LlavaProcessor, scale: float, seed: int, batch: int) -> LlavaForConditionalGeneration:
    """All stages; their results go to `work`."""
    work.mkdir(parents=True, exist_ok=True)
    model, heads = build_model(len(processor.tokenizer), seed=seed), PatchHeads()
    images = SceneBatches(model, processor, "train", 3000 + seed)

    def stage(name: str, run: Callable[[], None]) -> None:
        file = work / f"{name}.pt"
        if not file.exists():
            run()
            torch.save({"model": model.state_dict(), "heads": heads.state_dict()}, file)
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])

    def tower(name: str) -> None:
        steps, own, peak = TOWER[name]
        drawn = partial(pictures, size=4 * batch)
        stage(name, lambda: train_tower(model, heads, drawn, scaled(steps, scale), peak, own + seed))

    def decoder(name: str) -> None:
        stage(name, lambda: train_decoder(model, processor, LESSONS[name], scale, seed, batch))

    tower("tower")
    vision = {n: w.clone() for n, w in model.state_dict().items() if "vision_tower" in n or "projector" in n}
    shrink(model, 4)
    scale_features(model, images.get(0, 32, TYPES[:1])[0].float())
    start_words(model, heads, processor.tokenizer)
    with torch.random.fork_rng(devices=[]):  # so the weights of new layers do not depend on how attention starts
        start_attention(model, heads, images.get(0, 32, TYPES[:1])[0].float())
    decoder("decoder")
    grow(model)
    decoder("grown")
    decoder("more")
    model.load_state_dict(vision, strict=False)
    heads.requires_grad_(False)
    tower("tower_again")
    scale_features(model, images.get(0, 32, TYPES[:1])[0].float())
    decoder("decoder_again")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    decoder("counts")
    model.load_state_dict({name: (weight + before[name]) / 2 for name, weight in model.state_dict().items()})
    decoder("last")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/embedded"), help="results of the stages")
    parser.add_argument("--out", type=Path, default=Path("runs/embedded/embedded_llava"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--batch", type=int, default=16, help="scenes a batch of the decoder; the tower takes four times"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="shrinks the steps of every stage, to try the recipe")
    parser.add_argument("--test-scenes", type=int, default=320, help="scenes of the table at the end, 7 questions each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    processor = build_processor(WORDS)
    model = train(args.work, processor, args.scale, args.seed, args.batch)
    export(model, processor, args.out)
    for split in ("validation", "test"):
        print(split, accuracy(model, processor, split, args.test_scenes, seed=1))


if __name__ == "__main__":
    main()
