"""One of several processes that train the tiny LLaVA under one strategy after another; see `distributed.py`.

    RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python distributed_worker.py WORK SCENARIOS.json

SCENARIOS.json is a list of the keyword arguments of `train`; the first process writes what it returns to
WORK/<name>.pt.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint
from tiny import tiny_processor
from tokenizers import decoders
from torch.utils.data import DataLoader
from training_toys import SCHEDULE, ToyData, collate, quiet_trainer, sample, tuner

from himap_train.checkpoints.ranking import ranking_of
from himap_train.data.module import LlavaDataModule
from himap_train.evaluation.answering import answer_batch, evaluation_mode
from himap_train.models.install import pruning_of
from himap_train.training.callbacks.checkpoints import AtomicCheckpointIO, SaveLast
from himap_train.training.callbacks.finite import GradientNorm
from himap_train.training.callbacks.learn_ranking import LearnRanking
from himap_train.training.callbacks.learn_ratios import LearnKeepRatios
from himap_train.training.callbacks.progress import step_ended
from himap_train.training.callbacks.step_seeds import StepSeeds
from himap_train.training.run.feature_cache import fill_feature_cache
from himap_train.training.run.launch import AroundTraining, FineTuneTrainer
from himap_train.training.schedules.learn_ranking import RankingSettings
from himap_train.training.schedules.learnable import Learnable
from himap_train.training.zero.gather import trained_state
from himap_train.training.zero.strategy import ZeroStrategy

LINEAR = torch.nn.functional.linear
BY_MASS = {"stages": [{"layer": 2, "criterion": "instruction", "keep": {"mass": 0.7}}]}
RANKED = {"stages": [{"layer": 0, "criterion": {"name": "learned", "width": 16}, "keep_ratio": 0.5}]}
SCHEDULES: dict[str, Any] = {"pruned": SCHEDULE, "dense": None, "mass": BY_MASS, "learned": None, "ranked": RANKED}
LEARNABLE = Learnable(budget=0.85, first_layer=1, switch_layer=3, warmup=0.1, until=0.8)
ANSWER_TOKENS = (1, 3)
"""Lengths of what the processes answer, each its own."""


class MixedModalities(ToyData):
    """Global batches of four rows, images and text in turn: of two processes one sees images only, the other text."""

    def train_dataloader(self) -> Any:
        rows = [sample(index, answer=1 + index % 4, image=index % 2 == 0) for index in range(8)]
        rank, world = self.trainer.global_rank, self.trainer.world_size
        batches = [collate(rows[start : start + 4][rank::world]) for start in (0, 4)]
        return self.windowed(DataLoader(batches, batch_size=None))  # type: ignore[arg-type]

    val_dataloader = train_dataloader


class Recorder(Callback):
    """Loss and gradient norm of each optimizer step; of each batch its samples and, where pruned, what is kept."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.samples: list[list[str]] = []
        self.kept: list[list[int]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.samples.append(list(batch["ids"]))
        if pruning := pruning_of(module.peft_model):
            self.kept.append(pruning.last.kept if pruning.last else [])
        if step_ended(trainer, batch_idx):
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.norms.append(float(trainer.callback_metrics["train/grad_norm"]))


class KeepFirst(Checkpoint):
    """Keeps the checkpoint of the first step as `first.ckpt`: what a run leaves that is killed then.

    Lightning calls callbacks of this class after all others.
    """

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        last = Path(trainer.default_root_dir) / "last.ckpt"
        if trainer.is_global_zero and trainer.global_step == 1 and last.exists():
            shutil.copy(last, last.with_name("first.ckpt"))


def strategy_of(name: str) -> Any:
    """`ddp`, `zero1`, `zero2`, `zero3`, `zero3_offload` or `auto`; parameters of every size are spread."""
    if not name.startswith("zero"):
        return name
    return ZeroStrategy(int(name[4]), offload=name.endswith("offload"), persistence_threshold=0, bucket_size=100_000)


def frozen_weights(model: Any) -> dict[str, torch.Tensor]:
    """What ZeRO-3 has loaded, gathered, under the names of the stock model."""
    from deepspeed.runtime.zero import GatheredParameters

    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            stock = name.removeprefix("llava.base_model.model.")
            with GatheredParameters([parameter]):
                found[stock.replace(".base_layer", "").replace(".original_module", "")] = parameter.detach().clone()
    return found


def answers(module: Any, devices: int) -> list[str]:
    """What this process answers to one prompt; one process alone gives the answers of both."""
    row = sample(0)
    prompt = {"input_ids": row["input_ids"][:-3][None], "images": {"pixel_values": row["images"][0]["pixel_values"]}}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    processor = tiny_processor()
    processor.tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # each token, not the UTF-8 that few bytes are
    own = ANSWER_TOKENS if devices == 1 else [ANSWER_TOKENS[torch.distributed.get_rank()]]
    with evaluation_mode(module), module.trainer.precision_plugin.forward_context():
        return [answer_batch(module.peft_model, processor, prompt, tokens)[0][0] for tokens in own]


def train(
    work: Path,
    *,
    name: str,
    strategy: str,
    model: str,
    data: str | None = None,
    schedule: str = "pruned",
    batch_size: int = 2,
    accumulate: int = 2,
    epochs: int = 2,
    max_steps: int = -1,
    resume: str | None = None,
    precision: str = "32-true",
    checkpointing: bool = False,
    devices: int = 2,
    grouped: bool = False,
    cached: bool = False,
) -> dict[str, Any]:
    """Train, save every step, validate afterwards in the same process; what a comparison needs."""
    torch.manual_seed(0)
    tuner_ = tuner(
        model,
        schedule=SCHEDULES[schedule],
        gradient_checkpointing=checkpointing,
        weight_decay=0.1,
        lora_targets=["q_proj", "v_proj", "down_proj"],  # ZeRO-3 fetches each adapter by itself, which takes time
        lora_lr=3e-3,
        lora_dropout=0.0,
    )
    module = (
        MixedModalities()
        if data is None
        else LlavaDataModule(
            data,
            data,
            batch_size=batch_size,
            eval_batch_size=3,
            group_by_length=grouped,
            max_length=400,
            cache_image_features=str(work / f"{name}-features") if cached else None,
            processor=tiny_processor(),
        )
    )
    recorder, facts = Recorder(), dict[str, Any]()
    answering = name in (strategy, "one")  # what other scenarios vary makes no difference to it

    def before() -> None:
        own = [getattr(p, "ds_tensor", p).numel() for p in tuner_.parameters()]
        facts["resident"], facts["all"] = sum(own), sum(getattr(p, "ds_numel", p.numel()) for p in tuner_.parameters())

        if name == "zero3":
            facts["frozen"] = frozen_weights(tuner_)
        if cached:
            fill_feature_cache(trainer, tuner_.peft_model, module)  # type: ignore[arg-type]

    def after() -> None:
        facts["weights"] = trained_state(tuner_)
        if answering:
            facts["answers"] = answers(tuner_, devices)

    folder = work / name
    saving = SaveLast(folder / "last.ckpt", 1)
    trainer = quiet_trainer(
        folder,
        kind=FineTuneTrainer,
        strategy=strategy_of(strategy),
        devices=devices,
        max_epochs=epochs,
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
        precision=precision,
        enable_checkpointing=True,
        limit_val_batches=1.0,
        plugins=[AtomicCheckpointIO()],
        callbacks=[
            AroundTraining(before, after),
            *([LearnKeepRatios(LEARNABLE, lambda measured: (16, 30))] if schedule == "learned" else []),
            *([LearnRanking(RankingSettings())] if schedule == "ranked" else []),
            GradientNorm(),
            recorder,
            StepSeeds(1),
            saving,
            KeepFirst(),
        ],
    )
    trainer.fit(tuner_, datamodule=module, ckpt_path=resume, weights_only=True)
    facts["schedule"] = tuner_.schedule.to_dict()
    facts["ranking"] = ranking_of(tuner_.peft_model, tuner_.schedule)
    if answering:
        facts["later_answers"] = answers(tuner_, devices)
    facts["torch_linear"] = torch.nn.functional.linear is LINEAR
    facts["val_loss"] = float(trainer.callback_metrics.get("val/loss", float("nan")))
    pruning = pruning_of(tuner_.peft_model)
    if pruning:
        pruning.last = None
    again = trainer.validate(tuner_, datamodule=module, verbose=False)
    facts["val_loss_after"] = again[0]["val/loss"]
    facts["kept"] = pruning.last.kept if pruning and pruning.last else None
    facts |= {"losses": recorder.losses, "norms": recorder.norms, "samples": recorder.samples}
    facts["kept_while_training"] = recorder.kept
    facts["checkpoint"] = str(folder / "last.ckpt")
    return facts


def main() -> None:
    """Run all scenarios."""
    faulthandler.dump_traceback_later(float(sys.argv[3]))  # just before the time limit: where it hangs
    work, scenarios = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    for scenario in scenarios:
        facts = train(work, **scenario)
        torch.distributed.barrier()
        torch.save(facts, work / f"{scenario['name']}.rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
