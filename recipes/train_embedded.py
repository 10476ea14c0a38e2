"""Train the embedded LLaVA from nothing, on one CPU core, and write its folder.

    python recipes/train_embedded.py --work runs/embedded --out himap_train/assets/embedded_llava

Two stages (about 15 and 25 minutes on one core with avx512_bf16):

1. Vision tower and projector, with dense labels: from each of the 144 image tokens one linear layer has to tell what
   lies at its place, the colour and digit of a card, and the place's row and column.
2. The decoder, its word embeddings started from that linear layer, on fresh scenes all the time: first also describing
   every place, then questions alone. Tower and projector are frozen.

A stage whose result is already in the work folder is not repeated.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from himap_train.data.scene_text import DESCRIBE, TYPES, WORDS, ask, describe
from himap_train.data.scenes import SceneQuestions, draw
from himap_train.models.embedded_build import IMAGE_TOKENS, build_model, build_processor
from himap_train.models.embedded_training import (
    PatchHeads,
    answer_logits,
    branches,
    dense_scene,
    image_features,
    patch_labels,
    pixels,
    start_words,
)

PLENTY = 10**9  # scenes are drawn when asked for
PEAK_LR = 1.5e-3


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW; `step` sets the learning rate."""
    return torch.optim.AdamW(parameters, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.05)


def step(optimizer: torch.optim.Optimizer, loss: Tensor, now: int, steps: int) -> None:
    """One update at the learning rate of step `now`: warm-up, then cosine to a fiftieth."""
    lr = PEAK_LR * min(1.0, (now + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * now / steps)))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()


def train_tower(
    model: LlavaForConditionalGeneration, heads: PatchHeads, steps: int, seed: int, work: Path, batch: int
) -> None:
    """Stage 1. Prints loss and, for each head, the fraction of patches that are right on the batch trained next."""
    model.model.vision_tower.set_attn_implementation("bf16_plain")
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    optim = optimizer([*tower.parameters(), *projector.parameters(), *heads.parameters()])
    rng, start = np.random.default_rng([1, seed]), time.time()
    for now in range(steps):
        scenes = [dense_scene(rng) for _ in range(batch)]
        with torch.autocast("cpu", torch.bfloat16):
            features = image_features(model, pixels([draw(scene, "train", rng) for scene in scenes]))
            loss, right = heads(features, patch_labels(scenes))
        step(optim, loss, now, steps)
        if now % 100 == 99:
            torch.save({"model": model.state_dict(), "heads": heads.state_dict()}, work / "tower_partial.pt")
        if now % 25 == 0 or now == steps - 1:
            rates = " ".join(f"{name} {rate:.3f}" for name, rate in right.items())
            print(f"tower {now}/{steps} {time.time() - start:.0f} s, loss {loss.item():.3f}, {rates}", flush=True)


class SceneBatches:
    """Batches of scenes with several questions each, as `answer_logits` takes them; number `n` is always the same."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor, split: str, seed: int) -> None:
        self.model, self.tokenizer, self.seed = model, processor.tokenizer, seed
        self.source = SceneQuestions(split, scenes=PLENTY, seed=seed)
        prefix = "USER: " + "<image>" * IMAGE_TOKENS + "\n"
        self.prefix: list[int] = self.tokenizer.encode(prefix, add_special_tokens=False)

    def get(
        self, number: int, size: int, questions: int, described: bool = False, chained: bool = False
    ) -> tuple[Tensor, dict[str, Tensor], list[list[str]]]:
        """Image features, branches and question types of batch `number`; every type equally often over the batches."""
        rng = np.random.default_rng([self.seed, number])
        scenes = [self.source.scene(number * size + i) for i in range(size)]
        types = [[TYPES[(q + i) % len(TYPES)] for q in range(questions)] for i in range(size)]
        texts = [[ask(scene, t, rng) for t in row] for (scene, _), row in zip(scenes, types, strict=True)]
        if described:
            texts = [[*row, (DESCRIBE, describe(scene))] for row, (scene, _) in zip(texts, scenes, strict=True)]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features = image_features(self.model, pixels([image for _, image in scenes]))
        return features.bfloat16(), branches(self.tokenizer, texts, chained), types


def train_decoder(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, steps: int, seed: int, work: Path, batch: int
) -> None:
    """Stage 2. Every fifth batch after the describing part holds conversations instead of single questions."""
    model.model.language_model.set_attn_implementation("bf16_plain")
    trained = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    data, optim, start = SceneBatches(model, processor, "train", 2000 + seed), optimizer(trained), time.time()
    for now in range(steps):
        described = now < 0.35 * steps
        chained = not described and now % 5 == 4
        features, rows, _ = data.get(now, batch, 14, described, chained)
        with torch.autocast("cpu", torch.bfloat16):
            logits, target = answer_logits(model, features, data.prefix, rows)
            loss = nn.functional.cross_entropy(logits, target)
        step(optim, loss, now, steps)
        if now % 25 == 0 or now == steps - 1:
            right = (logits.argmax(-1) == target).float().mean().item()
            seconds = time.time() - start
            print(
                f"decoder {now}/{steps} {seconds:.0f} s, loss {loss.item():.3f}, tokens right {right:.3f}", flush=True
            )
        if now % 200 == 199:
            print("validation", accuracy(model, processor, "validation", scenes=160), flush=True)
            save_file(model.state_dict(), work / "decoder_partial.safetensors")


@torch.no_grad()
def accuracy(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, split: str, scenes: int, seed: int = 0
) -> dict[str, float]:
    """Exact match of greedy answers by question type, one question of each type a scene, and over all."""
    data, size = SceneBatches(model, processor, split, seed), min(16, scenes)
    right: dict[str, list[bool]] = defaultdict(list)
    for number in range(scenes // size):
        features, rows, types = data.get(number, size, len(TYPES))
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
    parser.add_argument("--decoder-steps", type=int, default=1100, help="of a batch of scenes, 14 questions each")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--test-scenes", type=int, default=320, help="scenes of the table at the end, 7 questions each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    processor = build_processor(WORDS)
    model, heads = build_model(len(processor.tokenizer), args.layers, args.seed), PatchHeads()
    tower, decoder = args.work / "tower.pt", args.work / "decoder.pt"
    if not tower.exists():
        train_tower(model, heads, args.tower_steps, args.seed, args.work, 4 * args.batch)
        vision = {k: v for k, v in model.state_dict().items() if "vision_tower" in k or "projector" in k}
        torch.save({"model": vision, "heads": heads.state_dict()}, tower)
    state = torch.load(tower, weights_only=True)
    model.load_state_dict(state["model"], strict=False)
    heads.load_state_dict(state["heads"])
    if decoder.exists():
        model.load_state_dict(torch.load(decoder, weights_only=True))
    else:
        data = SceneBatches(model, processor, "train", 3000 + args.seed)
        start_words(model, heads, processor.tokenizer, data.get(0, 32, 1)[0].float())
        train_decoder(model, processor, args.decoder_steps, args.seed, args.work, args.batch)
        torch.save(model.state_dict(), decoder)
    export(model, processor, args.out)
    for split in ("validation", "test"):
        print(split, accuracy(model, processor, split, args.test_scenes, seed=1))


if __name__ == "__main__":
    main()
