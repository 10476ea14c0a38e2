"""Train the embedded model for fine scenes, from the embedded model's decoder, on one CPU core, and write its folder.

    python recipes/train_fine.py --work runs/fine --out himap_train/assets/embedded_fine

A LLaVA of the embedded model's shape for 256x256 images of 256 tokens, that answers coarse and fine scenes and has a
token and an output row of its own for some 400 words beyond them. Its stages:

1. `heads`: the class head that the embedded model's features answer to, fitted again.
2. `tower`: a new vision tower and projector against that head, from random weights, on coarse and fine pictures.
3. `decoder`: the embedded model's decoder on the new features: questions and dense texts about coarse and fine scenes,
   and requests to say words.
4. `tower_again`: the tower further, with fewer things in half of the fine pictures, as questions have them.
5. The decoder further, on the better features.
6. `words`: the decoder once more, with more words to say, from output rows that were set apart.

About 80 minutes on one core. The weights in the package came from these stages, but that the odd words of stages 3 and
5 were letters in a row then, which left the beginnings of words unsaid. The whole has not been run a second time.

A stage whose result is already in the work folder is not repeated, and the decoder goes on from its last validation.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from himap_train.embedded.build import export
from himap_train.embedded.fine_scenes import FINE_SIZE, compose_fine, dense_fine, draw_fine
from himap_train.embedded.fine_training import (
    ALL_WORDS,
    coarse_labels,
    fine_labels,
    fine_processor,
    fit_heads,
    revive_words,
    scale_to,
    start_decoder,
    untrained,
)
from himap_train.embedded.model import embedded_model_path
from himap_train.embedded.scene_batches import SceneBatches, accuracy, answer_logits
from himap_train.embedded.scene_training import dense_scene, optimizer, pixels, step, train_tower
from himap_train.embedded.scenes import draw
from himap_train.embedded.start import PatchHeads

FINE = "digit where next_to count colour exist digit next_to where count next_to colour"
COARSE = "count place next_to where count colour next_to digit place next_to where exist"
FINE_LATE = "count digit next_to count colour where count next_to exist colour count digit"
COARSE_LATE = "count place digit count next_to count where exist next_to count colour place"
EVERY = 150  # steps between two validations, behind each of which a decoder can go on
SPLITS = ("fine-train", "train", "fine-train", "train", "fine-train")


def pictures(rng: np.random.Generator, sparse: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """16 coarse and 16 fine pictures for the tower; `sparse` of the fine ones are as questions have them."""
    coarse = [dense_scene(rng) for _ in range(16)]
    fine = [compose_fine(rng) if number < sparse else dense_fine(rng) for number in range(16)]
    images = [draw(s, "train", rng) for s in coarse] + [draw_fine(s, "train", rng) for s in fine]
    return pixels(images, FINE_SIZE), [coarse_labels(coarse), fine_labels(fine)]


def train_decoder(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    until: int,
    steps: int,
    seed: int,
    file: Path,
    peak: float = 1e-3,
    copies: int = 1,
) -> None:
    """The decoder with its words, up to step `until` of `steps`; `file` holds what is needed to go on."""
    decoder = model.model.language_model
    decoder.set_attn_implementation("bf16_plain")
    trained: list[nn.Parameter] = [*decoder.parameters(), *model.lm_head.parameters()]
    optim, begun, start = optimizer(trained), 0, time.time()
    if file.exists():
        state = torch.load(file, weights_only=True)
        decoder.load_state_dict(state["decoder"])
        model.lm_head.load_state_dict(state["lm_head"])
        optim.load_state_dict(state["optim"])
        begun = state["step"]
    data = {split: SceneBatches(model, processor, split, seed) for split in set(SPLITS)}
    for now in range(begun, until):
        split = SPLITS[now % len(SPLITS)]
        late, dense = now >= 2 * steps // 3 or copies > 1, copies == 1 and now < steps // 4 and now % 4 < 2
        mixes = (COARSE_LATE, FINE_LATE) if late else (COARSE, FINE)
        mix = mixes[split == "fine-train"].split()
        features, rows, _ = data[split].get(now, 12, mix, dense, chained=now % 10 == 3, copied=ALL_WORDS, copies=copies)
        with torch.autocast("cpu", torch.bfloat16):
            logits, target = answer_logits(model, features, data[split].prefix, rows)
            loss = nn.functional.cross_entropy(logits, target)
        step(optim, loss, now, steps, peak)
        if now % 25 == 0:
            right = (logits.argmax(-1) == target).float().mean().item()
            print(f"{split} {now}/{steps} {time.time() - start:.0f} s, {loss.item():.3f}, {right:.3f}", flush=True)
        if now % EVERY == EVERY - 1 or now == until - 1:
            for name in ("validation", "fine-validation"):
                print(name, accuracy(model, processor, name, 64 if steps > EVERY else 2), flush=True)
            weights = {"decoder": decoder.state_dict(), "lm_head": model.lm_head.state_dict()}
            torch.save(weights | {"optim": optim.state_dict(), "step": now + 1}, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)
    decoder.set_attn_implementation("sdpa")


def train(work: Path, scale: float, seed: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """All stages; their results go to `work`."""
    work.mkdir(parents=True, exist_ok=True)
    path = embedded_model_path()
    old = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    heads = PatchHeads()
    if not (file := work / "heads.pt").exists():
        torch.save(fit_heads(old, max(1, round(scale * 150))).state_dict(), file)
    heads.load_state_dict(torch.load(file, weights_only=True))
    eyes = untrained(old, len(old.lm_head.weight), seed)
    processor = fine_processor()
    model = untrained(old, len(processor.tokenizer), seed).eval()
    start_decoder(model, old, processor.tokenizer, AutoProcessor.from_pretrained(path).tokenizer)

    def tower(name: str, steps: int, peak: float, own: int, sparse: int) -> None:
        if not (file := work / f"{name}.pt").exists():
            heads.requires_grad_(False)
            batch = partial(pictures, sparse=sparse)
            train_tower(eyes, heads, batch, max(1, round(scale * steps)), peak, own + seed)
            torch.save(eyes.state_dict(), file)
        eyes.load_state_dict(torch.load(file, weights_only=True))
        model.model.vision_tower.load_state_dict(eyes.model.vision_tower.state_dict())
        model.model.multi_modal_projector.load_state_dict(eyes.model.multi_modal_projector.state_dict())
        scale_to(model, old, [dense_scene(np.random.default_rng([5, seed, number])) for number in range(16)])

    tower("tower", 1800, 1.5e-3, 0, sparse=0)
    steps, file = max(2, round(scale * 1800)), work / "decoder.pt"
    train_decoder(model, processor, steps // 2, steps, 100 + seed, file)
    tower("tower_again", 700, 8e-4, 1000, sparse=8)
    train_decoder(model, processor, steps, steps, 100 + seed, file)
    revive_words(model)
    words = max(1, round(scale * 250))
    train_decoder(model, processor, words, words, 200 + seed, work / "words.pt", peak=3e-4, copies=4)
    return model, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/fine"), help="results of the stages")
    parser.add_argument("--out", type=Path, default=Path("runs/fine/embedded_fine"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-scenes", type=int, default=320, help="scenes of the table at the end")
    parser.add_argument("--scale", type=float, default=1.0, help="shrinks the steps of every stage, to try the recipe")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = train(args.work, args.scale, args.seed)
    export(model, processor, args.out)
    for split in ("validation", "fine-validation"):
        print(split, accuracy(model, processor, split, args.test_scenes, seed=1))


if __name__ == "__main__":
    main()
