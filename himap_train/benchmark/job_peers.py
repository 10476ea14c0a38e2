"""A fine-tuning job with others' trainers, and the stopwatch on every job: `python -P job_peers.py JOB.json`.

It runs in an environment of theirs, and imports nothing of this package for that reason. The file is that of `job`.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

PACKAGES = ("torch", "transformers", "peft", "accelerate", "lightning", "trl")
_DECODER = r".*language_model\.layers\.\d+\..*_proj"
_NAMES = {"vision_tower": "tower", "visual": "tower", "language_model": "decoder forward"}


class Stopwatch:
    """Seconds of the parts of a run; what runs inside another part is counted for the inner one alone.

    A GPU is waited for where one part ends and the next begins.

    Args:
        clock: "wall", or "cpu" for the time of this process alone.
    """

    def __init__(self, clock: str) -> None:
        self._now: Callable[[], float] = time.perf_counter if clock == "wall" else time.process_time
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.losses: list[float] = []
        self.rounds: tuple[dict[str, float], ...] = ()
        self._open, self._since = ["other"], self._now()

    def switch(self, name: str) -> None:
        """From now on the innermost part has another name."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = self._now()
        self.seconds[self._open[-1]] += now - self._since
        self._open[-1], self._since = name, now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The block is a part of this name."""
        self.switch(self._open[-1])
        self._open.append(name)
        try:
            yield
        finally:
            self.switch(name)
            self._open.pop()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function as a part."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return call(*args, **kwargs)

        return run

    @contextmanager
    def steps(self, model: Any) -> Iterator[None]:
        """Inside, the parts of the training steps of `model` are told apart: loading, tower, decoder, loss, optimizer.

        From the decoder's last state on all is `lm_head` until the backward pass has come back to that state. A step is
        counted from the end of one backward pass to the end of the next.
        """
        backward, loaders = torch.Tensor.backward, torch.utils.data.dataloader
        single, several = loaders._SingleProcessDataLoaderIter, loaders._MultiProcessingDataLoaderIter

        def decode(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with self.part("decoder forward"):
                found = call(*args, **kwargs)
            self.switch("lm_head")
            found[0].register_hook(lambda _: self.switch("decoder backward"))
            return found

        def back(loss: Any, *args: Any, **kwargs: Any) -> None:
            self.losses.append(float(loss.detach()))
            with self.part("lm_head"):
                backward(loss, *args, **kwargs)
            self.switch("other")
            self.rounds = (*self.rounds[:1], dict(self.seconds))

        with ExitStack() as stack:
            for name, module in model.named_modules():
                if kind := _NAMES.get(name.rpartition(".")[2]):
                    forward = module.forward
                    timed = self.timed(kind, forward) if kind == "tower" else partial(decode, forward)
                    stack.enter_context(patch.object(module, "forward", timed))
            stack.enter_context(patch.object(torch.Tensor, "backward", back))
            for kind, owner, name in (
                ("optimizer", import_module("torch.optim.adam"), "adam"),
                ("optimizer", import_module("torch.optim.adamw"), "adamw"),
                ("loading", single, "_next_data"),
                ("waiting", several, "_next_data"),
            ):
                stack.enter_context(patch.object(owner, name, self.timed(kind, getattr(owner, name))))
            yield

    def save(self, path: str, trained: int) -> None:
        """Write what was measured, and how many numbers were trained."""
        self.switch("other")
        count = len(self.losses) - 1
        step = {name: (value - self.rounds[0].get(name, 0)) / count for name, value in self.rounds[-1].items()}
        here = {name: version(name) for name in PACKAGES if find_spec(name)}
        facts = {"seconds": self.seconds, "step": step, "losses": self.losses, "trained": trained, "versions": here}
        Path(path).write_text(json.dumps(facts), encoding="utf-8")


def read_rows(data: dict[str, Any], order: list[int], processor: Any) -> list[dict[str, Any]]:
    """LLaVA records as image path, prompt and completion, in the order in which the other jobs train on them."""
    rows = []
    for record in json.loads(Path(data["train"]).read_text(encoding="utf-8")):
        question, answer = (turn["value"] for turn in record["conversations"])
        asked = [{"type": "image"}, {"type": "text", "text": question.replace("<image>\n", "")}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": asked}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        completion = processor.apply_chat_template(messages)[len(prompt) :]
        rows.append({"image": f"{data['image_folder']}/{record['image']}", "prompt": prompt, "completion": completion})
    return [rows[index] for index in order]


def collator(processor: Any) -> Callable[[list[dict[str, Any]]], Any]:
    """What users of Trainer write: images read, all encoded together, prompts and padding unsupervised."""
    from PIL import Image

    def collate(rows: list[dict[str, Any]]) -> Any:
        images = [Image.open(row["image"]).convert("RGB") for row in rows]
        texts = [row["prompt"] + row["completion"] for row in rows]
        batch = processor(images=images, text=texts, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].clone()
        for row, mask, each in zip(labels, batch["attention_mask"], rows, strict=True):
            answer = len(processor.tokenizer(each["completion"], add_special_tokens=False)["input_ids"])
            row[: int(mask.sum()) - answer] = -100
            row[mask == 0] = -100
        return batch | {"labels": labels}

    return collate


def trainer_of(kind: str, config: dict[str, Any], rows: Any, model: Any, processor: Any) -> Any:
    """Trainer or SFTTrainer, with the data in the given order."""
    data, given = config["data"], config["trainer"]
    shared = {
        "output_dir": config["output"],
        "per_device_train_batch_size": data["batch_size"],
        "num_train_epochs": given["max_epochs"],
        "dataloader_num_workers": data["num_workers"],
        "gradient_checkpointing": config["model"]["gradient_checkpointing"],
        "learning_rate": config["model"]["lora_lr"],
        "bf16": given["precision"] == "bf16-mixed",
        "fp16": given["precision"] == "16-mixed",
        "use_cpu": given["accelerator"] == "cpu",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    if kind == "trl":
        from datasets import Dataset, Image
        from trl import SFTConfig, SFTTrainer

        shown = Dataset.from_list(rows).cast_column("image", Image())
        arguments = SFTConfig(**shared, completion_only_loss=True, max_length=None)
        trainer: Any = SFTTrainer(model=model, args=arguments, train_dataset=shown, processing_class=processor)
    else:
        from transformers import Trainer, TrainingArguments

        arguments = TrainingArguments(**shared, remove_unused_columns=False)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator(processor))
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    return trainer


def main() -> None:
    """Load, train, save."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    config: dict[str, Any] = job["config"]
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    watch, settings = Stopwatch(job["clock"]), config["model"]
    with watch.part("start"):
        torch.manual_seed(config["seed_everything"])
        processor = AutoProcessor.from_pretrained(settings["path"])
        model: Any = AutoModelForImageTextToText.from_pretrained(
            settings["path"], dtype="auto", attn_implementation=settings["attn_implementation"]
        )
        lora = LoraConfig(r=settings["lora_r"], lora_alpha=settings["lora_alpha"], target_modules=_DECODER)
        model = get_peft_model(model, lora)
        rows = read_rows(config["data"], job["order"], processor)
        trainer = trainer_of(job["contender"], config, rows, model, processor)
    with watch.steps(model):
        trainer.train()
    with watch.part("saving"):
        trainer.save_model(config["output"])
    watch.save(job["results"], sum(p.numel() for p in model.parameters() if p.requires_grad))


if __name__ == "__main__":
    main()
