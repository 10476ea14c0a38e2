"""Train the embedded LLaVA from nothing, on one CPU core, and write its folder.

    python recipes/train_embedded.py --work runs/embedded --out himap_train/assets/embedded_llava

Four stages, each of minutes on one core with avx512_bf16:

1. Vision tower and projector, with dense labels: from each of the 144 image tokens one linear layer has to tell what
   lies at its place, the colour and digit of a card, and the place's row and column.
2. The decoder, its words and some attention heads started from that linear layer (`embedded_start`), on fresh scenes
   all the time: first with dense texts beside the questions (every place, thing, count and neighbour of a scene), then
   with them in every fourth batch. Tower and projector are frozen.
3. The tower of stage 1 again, with the linear layer frozen, so that its features stay where the decoder expects them.
4. The decoder again, on the better features.

A stage whose result is already in the work folder is not repeated.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from himap_train.data.scene_text import TYPES, WORDS
from himap_train.data.scenes import draw
from himap_train.models.embedded_build import build_model, build_processor
from himap_train.models.embedded_start import PatchHeads, start_attention, start_features, start_words
from himap_train.models.embedded_training import (
    SceneBatches,
    answer_logits,
    dense_scene,
    image_features,
    patch_labels,
    pixels,
)

LR = {"tower": 1.5e-3, "decoder": 2e-3}
# Questions about one scene in training: more of the types that are learnt later.
MIX = (*TYPES, "next_to", "exist", "count", "place", "digit")


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW; `step` sets the learning rate."""
    return torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.05)


def step(optimizer: torch.optim.Optimizer, loss: Tensor, now: int, steps: int, peak: float) -> None:
    """One update at the learning rate of step `now`: warm-up to `peak`, then cosine to a fiftieth."""
    lr = peak * min(1.0, (now + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * now / steps)))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()


def train_tower(
    model: LlavaForConditionalGeneration, heads: PatchHeads, steps: int, seed: int, batch: int, peak: float
) -> None:
    """Stages 1 and 3. Heads that are frozen stay so. Prints for each head the fraction of patches that are right."""
    model.model.vision_tower.set_attn_implementation("bf16_plain")
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    trained = [*tower.parameters(), *projector.parameters(), *heads.parameters()]
    optim = optimizer([p for p in trained if p.requires_grad])
    rng, start = np.random.default_rng([1, seed]), time.time()
    for now in range(steps):
        scenes = [dense_scene(rng) for _ in range(batch)]
        with torch.autocast("cpu", torch.bfloat16):
            features = image_features(model, pixels([draw(scene, "train", rng) for scene in scenes]))
            loss, right = heads(features, patch_labels(scenes))
        step(optim, loss, now, steps, peak)
        if now % 25 == 0 or now == steps - 1:
            rates = " ".join(f"{name} {rate:.3f}" for name, rate in right.items())
            print(f"tower {now}/{steps} {time.time() - start:.0f} s, loss {loss.item():.3f}, {rates}", flush=True)


def train_decoder(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    steps: int,
    seed: int,
    batch: int,
    peak: float,
    dense: float,
) -> None:
    """Stages 2 and 4. `dense` is the part of the steps that all have dense texts; later every fourth batch has them.

    Later every fourth batch also holds conversations of many turns instead of single questions.
    """
    model.model.language_model.set_attn_implementation("bf16_plain")
    trained = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    data, optim, start = SceneBatches(model, processor, "train", 2000 + seed), optimizer(trained), time.time()
    for now in range(steps):
        early = now < dense * steps
        features, rows, _ = data.get(now, batch, MIX, dense=early or now % 4 == 0, chained=not early and now % 4 == 2)
        with torch.autocast("cpu", torch.bfloat16):
            logits, target = answer_logits(model, features, data.prefix, rows)
            loss = nn.functional.cross_entropy(logits, target)
        step(optim, loss, now, steps, peak)
        if now % 25 == 0 or now == steps - 1:
            right = (logits.argmax(-1) == target).float().mean().item()
            seconds = time.time() - start
            print(
                f"decoder {now}/{steps} {seconds:.0f} s, loss {loss.item():.3f}, tokens right {right:.3f}", flush=True
            )
        if now % 100 == 99:
            print("validation", accuracy(model, processor, "validation", scenes=160), flush=True)


@torch.no_grad()
def accuracy(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, split: str, scenes: int, seed: int = 0
) -> dict[str, float]:
    """Exact match of greedy answers by question type, one question of each type a scene, and over all."""
    data, size = SceneBatches(model, processor, split, seed), min(16, scenes)
    right: dict[str, list[bool]] = defaultdict(list)
    for number in range(scenes // size):
        features, rows, types = data.get(number, size, TYPES)
        with torch.autocast("cpu", torch.bfloat16):
            logits, target = answer_logits(model, features, data.prefix, rows)
        scene, row = (rows["labels"] != -100).nonzero(as_tuple=True)
        branch = rows["branch"][scene, row]
        good = logits.argmax(-1) == target
        for i, kinds in enumerate(types):
            for b, kind in enumerate(kinds):
                right[kind].append(bool(good[(scene == i) & (branch == b)].all()))
    table = {kind: float(np.mean(right[kind])) for kind in TYPES}
    return {k: round(v, 4) for k, v in (table | {"all": float(np.mean(list(table.values())))}).items()}


def is_vision(name: str) -> bool:
    """Whether a weight belongs to the tower or the projector."""
    return "vision_tower" in name or "projector" in name


def export(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """Write the Hugging Face folder. Weights are stored in fp16, half the size, and load as the config's float32."""
    model.set_attn_implementation("sdpa")
    model.save_pretrained(out)
    processor.save_pretrained(out)
    weights = load_file(out / "model.safetensors")
    save_file({name: w.half() for name, w in weights.items()}, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/embedded"), help="results of the stages")
    parser.add_argument("--out", type=Path, default=Path("runs/embedded/embedded_llava"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=8, help="decoder layers")
    parser.add_argument("--tower-steps", type=int, default=1000, help="of four batches of scenes")
    parser.add_argument("--decoder-steps", type=int, default=1000, help="of a batch of scenes, 12 questions each")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--test-scenes", type=int, default=320, help="scenes of the table at the end, 7 questions each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    processor = build_processor(WORDS)
    model, heads = build_model(len(processor.tokenizer), args.layers, args.seed), PatchHeads()

    def stage(name: str, train: Callable[[], None]) -> None:
        file = args.work / f"{name}.pt"
        if not file.exists():
            train()
            torch.save({"model": model.state_dict(), "heads": heads.state_dict()}, file)
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])

    seed, size = args.seed, args.batch
    stage("tower", lambda: train_tower(model, heads, args.tower_steps, seed, 4 * size, LR["tower"]))
    tower = {name: value.clone() for name, value in model.state_dict().items()}
    images = SceneBatches(model, processor, "train", 3000 + seed)
    plain = images.get(0, 32, TYPES[:1])[0].float()
    start_features(model, heads, plain)
    start_words(model, heads, processor.tokenizer)
    start_attention(model, heads, images.get(0, 32, TYPES[:1])[0].float())
    stage("decoder", lambda: train_decoder(model, processor, args.decoder_steps, seed, size, LR["decoder"], 0.4))
    decoder = {name: value.clone() for name, value in model.state_dict().items() if not is_vision(name)}
    model.load_state_dict(tower)
    heads.requires_grad_(False)
    more = 1000 + seed
    stage("tower_again", lambda: train_tower(model, heads, args.tower_steps * 2 // 5, more, 4 * size, LR["tower"] / 2))
    start_features(model, heads, plain)
    model.load_state_dict(decoder, strict=False)
    again = args.decoder_steps // 5
    stage("decoder_again", lambda: train_decoder(model, processor, again, more, size, LR["decoder"] / 4, 0.0))
    export(model, processor, args.out)
    for split in ("validation", "test"):
        print(split, accuracy(model, processor, split, args.test_scenes, seed=1))


if __name__ == "__main__":
    main()
