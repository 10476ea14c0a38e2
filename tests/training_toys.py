"""A tiny LLaVA on disk and batches for it, for tests of training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningDataModule, Trainer
from recipes_cli import recipe_module
from tiny import IMAGE_SIZE, IMAGE_TOKENS, tiny_llava, tiny_processor
from torch.utils.data import DataLoader

from himap_train.data.loader import Windows
from himap_train.data.module import LlavaDataModule
from himap_train.training.callbacks.checkpoints import AtomicCheckpointIO
from himap_train.training.callbacks.interrupt import SaveOnInterrupt
from himap_train.training.module import LlavaFineTuner

SCHEDULE = {"stages": [{"layer": 2, "criterion": "instruction", "keep_ratio": 0.5}]}
IMAGE_ID = 4


def save_tiny(folder: Path, **kwargs: Any) -> str:
    """A random LLaVA with its processor in the Hugging Face layout."""
    tiny_llava(**kwargs).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


def finetune(*options: str) -> int:
    """What `python recipes/finetune.py <options>` runs, in this process; its exit status."""
    return run_main("finetune", *options)


def run_main(recipe: str, *options: str) -> int:
    """What `python recipes/<recipe>.py <options>` runs, for a recipe whose `main` takes the command line."""
    return int(recipe_module(recipe).main(list(options)))


def small_run(folder: Path, path: str, **groups: dict[str, Any]) -> str:
    """A config file for `finetune`: a run of seconds on the embedded scenes that measures nothing; `groups` go over."""
    defaults: dict[str, Any] = {
        "model": {"path": path, "schedule": SCHEDULE, "lora_r": 4, "lora_alpha": 8},
        "data": {"batch_size": 2, "train_limit": 16, "validation": None, "max_length": 400},
        "trainer": {"accelerator": "cpu"},
        "evaluation": {"before": False, "after": False, "during": 0},
    }
    content = {"output": str(folder / "run"), **{name: one | groups.get(name, {}) for name, one in defaults.items()}}
    (folder / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(folder / "config.yaml")


def sample(index: int, answer: int = 3, image: bool = True) -> dict[str, Any]:
    """`<s> image prompt answer`, one row; its content depends on `index` alone."""
    noise = torch.Generator().manual_seed(index)
    text = torch.randint(5, 261, (6 + answer,), generator=noise)
    ids = torch.cat([torch.tensor([1]), torch.full((IMAGE_TOKENS * image,), IMAGE_ID), text])
    labels = torch.full_like(ids, -100)
    labels[-answer:] = ids[-answer:]
    pixels = torch.randn(int(image), 3, IMAGE_SIZE, IMAGE_SIZE, generator=noise)
    return {"input_ids": ids, "labels": labels, "images": [{"pixel_values": one[None]} for one in pixels]}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Right padding, as for training."""
    length = max(len(s["input_ids"]) for s in samples)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.stack([torch.nn.functional.pad(s[key], (0, length - len(s[key])), value=value) for s in samples])

    ids = padded("input_ids", 0)
    pixels = [image["pixel_values"] for s in samples for image in s["images"]]
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": padded("labels", -100),
        "images": {"pixel_values": torch.cat(pixels)} if pixels else {},
        "ids": [f"toy-{index}" for index in range(len(samples))],
    }


@dataclass(frozen=True)
class WindowedLoader:
    """A loader with its windows counted, as training wants it."""

    loader: DataLoader
    windows: Windows

    def __iter__(self) -> Iterator[Any]:
        return self.windows.count(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


class ToyData(LightningDataModule):
    """`count` fixed samples in fixed order; answers of different lengths, so that averages differ."""

    def __init__(self, count: int = 8, batch_size: int = 2) -> None:
        super().__init__()
        self.samples = [sample(index, answer=1 + index % 4) for index in range(count)]
        self.batch_size = batch_size

    def train_dataloader(self) -> WindowedLoader:
        return self.windowed(DataLoader(self.samples, self.batch_size, collate_fn=collate))  # type: ignore[arg-type]

    def windowed(self, loader: DataLoader) -> WindowedLoader:
        """Any loader of batches, as training wants it."""
        trainer = self.trainer
        return WindowedLoader(loader, Windows(trainer.accumulate_grad_batches, lambda: trainer.num_training_batches))

    val_dataloader = train_dataloader


def tuner(path: str, **kwargs: Any) -> LlavaFineTuner:
    """A small fine-tuner; keyword arguments override."""
    defaults = {
        "schedule": SCHEDULE,
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_lr": 1e-2,
        "projector_lr": 1e-3,
        "warmup_ratio": 0.0,
    }
    return LlavaFineTuner(path, **{**defaults, **kwargs})


def quiet_trainer(folder: Path, **kwargs: Any) -> Trainer:
    """On the CPU, without bars, logs and checkpoints unless asked for."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    kind = kwargs.pop("kind", Trainer)
    return kind(default_root_dir=folder, **{**defaults, **kwargs})


class CountingHead(torch.nn.Linear):
    """An output layer that notes how many rows each call gives it."""

    def __init__(self) -> None:
        super().__init__(8, 20)
        self.rows: list[int] = []

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        self.rows.append(states.shape[0])
        return super().forward(states)


def fit_windows(model: LlavaFineTuner, folder: Path, callbacks: list[Any], resume: bool = False, **trainer: Any) -> Any:
    """Eight optimizer steps of two micro-batches of embedded scenes; interrupted, it leaves `last.ckpt`."""
    last = folder / "last.ckpt"
    fitting = quiet_trainer(
        folder,
        **{"max_epochs": 2, "accumulate_grad_batches": 2, **trainer},
        enable_checkpointing=True,
        plugins=[AtomicCheckpointIO()],
        callbacks=[*callbacks, SaveOnInterrupt(last, "again --resume")],
    )
    data = LlavaDataModule(batch_size=2, train_limit=16, validation_limit=4, max_length=400, processor=tiny_processor())
    torch.manual_seed(0)
    fitting.fit(model, datamodule=data, ckpt_path=last if resume else None, weights_only=True)
    return model
