"""The command line of `plan.py`: that of `finetune.py`, with the same files and options, which builds no trainer."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from himap_train.command_line import with_underscores
from himap_train.data.module import LlavaDataModule
from himap_train.models.attention import ATTENTION_IMPLEMENTATIONS
from himap_train.models.published import find_config
from himap_train.planning.device_memory import GIB, configured_strategy
from himap_train.planning.facts import ModelFacts, model_facts
from himap_train.planning.run_plan import Duration, Plan, RunSettings, Sample, make_plan
from himap_train.planning.throughput import seconds_a_sample
from himap_train.planning.typical_sample import read_sample
from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.init_adapter import processor_of
from himap_train.training.module import LlavaFineTuner
from himap_train.training.run.finetune_cli import FinetuneCLI
from himap_train.training.run.parser import set_epochs
from himap_train.training.run.rehearsal import rehearse
from himap_train.training.run.strategy_names import refuse_together, settle_trainer, strategy_name
from himap_train.training.schedules.settings import MODES

_MORE = {
    "learnable": ", up to a quarter more while ratios get a gradient",
    "elastic": ", and a forward pass more where there is a teacher",
    "dense_steps": ", and the forward pass of the pruned teacher",
}
"""What a step takes beside that of a dense one, by mode."""


class PlanCLI(FinetuneCLI):
    """Parses what `finetune.py` would run with, and plans it.

    Args:
        args: The command line; None for that of this process.
    """

    def __init__(self, args: Sequence[str] | None = None) -> None:
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        super().__init__([with_underscores(option) for option in (sys.argv[1:] if args is None else args)])

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What only planning needs, beside everything that `finetune.py` takes."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--gpu_memory", type=float, default=80.0, help="GiB of one GPU")
        parser.add_argument("--text_tokens", type=int | None, default=None, help="of a sample, instead of the data's")
        parser.add_argument("--supervised_tokens", type=int | None, default=None, help="of them, those to predict")
        parser.add_argument("--images", type=int, default=1, help="of a sample, where the data cannot be read")
        parser.add_argument(
            "--effective_batch", type=int | None, default=None, help="samples an optimizer step; sets accumulation"
        )
        parser.add_argument("--tflops", type=float | None, default=None, help="that one GPU reaches, for hours")
        parser.add_argument("--measured", action="store_true", help="find them in a few real steps on this machine")
        parser.add_argument("--records", type=int | None, default=None, help="of the data, where it cannot be read")
        parser.add_argument("--gpu_price", type=float | None, default=None, help="of one GPU for an hour")
        parser.add_argument("--json", type=str | None, default=None, help="write every number into this file")
        parser.add_argument(
            "--verify", action="store_true", help="run two small models and compare them with their predictions"
        )

    def before_instantiate_classes(self) -> None:
        """No folder is claimed, nothing is resumed."""
        model, trainer = self.config.model, self.config.trainer
        settle_trainer(trainer)
        refuse_together(self.config)
        if model.vision_tower != "freeze" or model.decoder != "lora":
            raise ValueError("plan.py plans LoRA on the decoder: without model.vision_tower and model.decoder")
        if self.config.rehearse:
            rehearse(self.config)
        set_epochs(trainer)

    def instantiate_classes(self) -> None:
        """Model and data, neither of which loads anything yet; no trainer, whose devices need not be here."""
        self.tuner = LlavaFineTuner(**self.config.model.as_dict())
        self.data = LlavaDataModule(**self.config.data.as_dict())

    def plan(self) -> Plan:
        """Predict the configured run.

        Raises:
            FileNotFoundError: There is no such model.
            ValueError: Something in the config cannot work; the message names the key and what is valid.
        """
        for key in ("text_tokens", "supervised_tokens", "images", "tflops", "records", "gpu_price"):
            if (self.config[key] or 0) < 0:
                raise ValueError(f"--{key} is {self.config[key]}; expected 0 or more")
        run = run_settings(self.config)
        config, found = find_config(self.config.model.path)
        decoder: Any = config.text_config
        schedule = self.tuner.fitted_schedule(decoder.num_hidden_layers)
        schedule.validate_for(decoder.num_hidden_layers)
        given = (self.config.text_tokens, self.config.supervised_tokens, self.config.images)
        sample, counted = read_sample(self.data, self.config.model.path, config, *given)
        kernel = (
            "eager, S x S probabilities are kept" if run.attention == "eager" else "a flash kernel, no S x S matrix"
        )
        notes: tuple[str, ...] = (f"model: {found}", f"tokens: {counted}", f"attention: {run.attention}, {kernel}")
        facts = model_facts(config, self.tuner)
        once: tuple[str, ...] = ()
        if run.cached:
            once = (
                "the vision tower runs once an image, before training: in the hours, each record's images counted once",
            )
        notes = (*notes, *once, *self._other_schedules(), *self._at_limit(facts, run, schedule, sample))
        return self._with_duration(make_plan(facts, run, schedule, sample, notes))

    def _with_duration(self, plan: Plan) -> Plan:
        """How long it takes, or what is missing to know."""
        records, tflops = self._records(), self.config.tflops
        samples = self._samples(plan.run, records)
        known = tflops or self.config.measured
        if samples is None or not known:
            needed = {"--records N": samples is None, "--tflops N (reached by one GPU) or --measured": not known}
            missing = " and ".join(name for name, lacks in needed.items() if lacks)
            return replace(plan, notes=(*plan.notes, f"for hours and cost give {missing}"))
        bare = plan
        if plan.run.cached:
            bare = make_plan(plan.facts, replace(plan.run, cached=False), plan.sides[-1].schedule, plan.sample)
        if self.config.measured:
            self.data.processor, self.data.cache_image_features = processor_of(self.config.model.path), None
            self.data.group_by_length = False  # the longest come first there, and these few are to be of any length
            seconds = seconds_a_sample(self.tuner, self.data, self.config.trainer)
            tflops = bare.sides[-1].flops.total / seconds / 1e12
        once = bare.sides[-1].flops.vision if plan.run.cached else 0.0
        return replace(plan, duration=Duration(samples, tflops, self.config.gpu_price, once * (records or samples)))

    def _records(self) -> int | None:
        """Records to train on; None where nobody knows."""
        records: int | None = self.config.records
        if records is not None:
            return records
        try:
            source = self.data.source("train")
        except (OSError, ValueError):
            return None
        return None if source is None else min(len(source), self.data.limits["train"] or len(source))

    def _samples(self, run: RunSettings, records: int | None) -> int | None:
        """Samples of the whole run, as `max_steps` or `max_epochs` ends it; None where nobody knows."""
        trainer, batch = self.config.trainer, run.batch_size * run.devices
        if records is not None and (limit := trainer.overfit_batches or trainer.limit_train_batches) is not None:
            records = (
                int(records * limit) if isinstance(limit, float) and limit <= 1 else min(records, int(limit) * batch)
            )
        by_steps = [trainer.max_steps * run.effective_batch] if trainer.max_steps > 0 else []
        if by_steps and records:  # an epoch's last step has what is left
            epochs, rest = divmod(trainer.max_steps, -(-records // run.effective_batch))
            by_steps = [epochs * records + rest * run.effective_batch]
        by_epochs = [records * trainer.max_epochs] if records is not None and (trainer.max_epochs or -1) > 0 else []
        return min([*by_steps, *by_epochs], default=None)

    def _other_schedules(self) -> tuple[str, ...]:
        """What steps under other schedules than model.schedule mean for the numbers."""
        modes = [name for name in MODES if self.config.pruning[name] is not None]
        return tuple(
            f"pruning.{name}: some steps run up to dense, so the dense column's memory and time{_MORE.get(name, '')}"
            for name in modes
        )

    def _at_limit(
        self, facts: ModelFacts, run: RunSettings, schedule: PruningSchedule, sample: Sample
    ) -> tuple[str, ...]:
        """What a batch of the longest rows that `data.max_length` lets through would take."""
        limit = self.data.max_length or 0
        text, notes, kinds = limit - sample.images * sample.image_tokens, list[str](), dict[str, dict[str, Any]]()
        if text > sample.longest_text:
            kinds[""] = {"longest_text": text}
        if 0 < sample.longest_alone < limit:
            kinds[" without images"] = {"longest_alone": limit}
        for kind, rows in kinds.items():
            full = make_plan(facts, run, schedule, replace(sample, **rows))
            peaks = ", ".join(f"{side.name} {full.peak(run.strategy, side) / GIB:.2f}" for side in full.sides)
            notes.append(f"rows{kind} of data.max_length {limit} need, in GiB on {run.strategy}: {peaks}")
        return tuple(notes)


def run_settings(config: Namespace) -> RunSettings:
    """What a parsed config says about the run.

    Raises:
        ValueError: The strategy is unknown, the attention cannot be pruned, or the batch does not come out.
    """
    trainer, attention = config.trainer, config.model.attn_implementation or "sdpa"
    if attention not in ATTENTION_IMPLEMENTATIONS:
        valid = ", ".join(ATTENTION_IMPLEMENTATIONS)
        raise ValueError(f"model.attn_implementation is {attention!r}; valid: {valid}")
    if config.gpu_memory <= 0:
        raise ValueError(f"--gpu_memory is {config.gpu_memory}; expected the GiB of one GPU, such as 80")
    devices = _number_of_devices(trainer.devices) * int(trainer.num_nodes)
    accumulate = int(trainer.accumulate_grad_batches)
    if config.effective_batch is not None:
        accumulate = _accumulation(config.effective_batch, config.data.batch_size, devices)
    return RunSettings(
        precision=str(trainer.precision or "32-true"),
        strategy=configured_strategy(strategy_name(trainer.strategy), devices),
        devices=devices,
        batch_size=config.data.batch_size,
        accumulate=accumulate,
        checkpointing=config.model.gradient_checkpointing,
        attention=attention,
        loss_chunk=config.model.loss_chunk,
        four_bit=config.model.quantize == "4bit",
        gpu_memory=config.gpu_memory,
        cached=bool(config.data.cache_image_features),
    )


def _accumulation(effective: int, batch_size: int, devices: int) -> int:
    """Micro-batches that make `effective` samples, or an error that lists what would."""
    step = batch_size * devices
    if effective < 1 or effective % step:
        fitting = [size for size in range(1, max(effective, 0) + 1) if effective % (size * devices) == 0]
        raise ValueError(
            f"--effective_batch {effective} is no multiple of data.batch_size {batch_size} x {devices} devices = "
            f"{step}; valid data.batch_size: {', '.join(map(str, fitting)) or 'none with so many devices'}"
        )
    return effective // step


def _number_of_devices(devices: Any) -> int:
    """Devices of one node; "auto" and -1 are taken as one, since this machine need not be the one that trains."""
    if isinstance(devices, list | tuple):
        return len(devices)
    text = str(devices)
    if text in ("auto", "-1"):
        return 1
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"trainer.devices is {devices!r}; expected a number of GPUs, such as --trainer.devices 8")
    return int(text)
