"""The command line of `finetune.py`: Lightning's CLI without subcommands; signatures are the schema of the YAML.

Three things differ from `LightningCLI`. A checkpoint never changes the config: Lightning would merge the
hyperparameters stored in it over what the user wrote. A run writes into one folder of its own. An unknown key names the
nearest valid one.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from himap_train.command_line import check_config_files, quiet_libraries
from himap_train.data.module import LlavaDataModule
from himap_train.models.loading import resolve_model
from himap_train.ranges import require_possible
from himap_train.storage import remove_leftovers
from himap_train.training.callbacks.accuracy import EvaluationSettings, GenerationAccuracy
from himap_train.training.callbacks.best import last_and_best, require_best
from himap_train.training.callbacks.checkpoints import (
    AtomicCheckpointIO,
    RememberConfig,
    newest_good,
    refuse_other_config,
)
from himap_train.training.callbacks.finite import GradientNorm
from himap_train.training.callbacks.interrupt import SaveOnInterrupt
from himap_train.training.callbacks.learn_ranking import LearnRanking
from himap_train.training.callbacks.learn_ratios import LearnKeepRatios
from himap_train.training.callbacks.progress import ProgressLines, Throughput
from himap_train.training.callbacks.step_seeds import StepSeeds
from himap_train.training.init_adapter import processor_of
from himap_train.training.module import LlavaFineTuner
from himap_train.training.run.folder import claim_folder
from himap_train.training.run.launch import AroundTraining, FineTuneTrainer, is_first_process
from himap_train.training.run.loggers import LoggerName, make_loggers, require_installed
from himap_train.training.run.measured_rows import MeasuredRows
from himap_train.training.run.parser import SuggestingParser, set_epochs
from himap_train.training.run.rehearsal import rehearsal_folder, rehearse
from himap_train.training.run.strategy_names import (
    as_list,
    own_callbacks,
    refuse_together,
    register_strategies,
    require_known,
    settle_trainer,
)
from himap_train.training.schedules.per_step import Measured, SchedulePerStep
from himap_train.training.schedules.settings import PruningSettings

TRAINER_DEFAULTS = {"gradient_clip_val": 1.0, "num_sanity_val_steps": 0, "enable_model_summary": False}
AUTO, _LAST = "auto", "last"
_NOT_IN_CONFIG = ("config", "resume", "rehearse")


class FinetuneCLI(LightningCLI):
    """Builds `model`, `datamodule` and `trainer` from YAML files and options.

    Args:
        args: The command line; None for that of this process.
        around: What is done before and after training, in all processes; see `AroundTraining`.

    Attributes:
        is_new: Whether this process has made the run's folder one, in the first process.
    """

    is_new = False

    def __init__(
        self,
        args: Sequence[str] | None = None,
        around: tuple[Callable[[FinetuneCLI], None], Callable[[FinetuneCLI], None]] | None = None,
    ) -> None:
        self.around = around
        check_config_files(sys.argv[1:] if args is None else args, groups=True)
        quiet_libraries()
        register_strategies()
        started = ["torchrun", "..."] if "TORCHELASTIC_RUN_ID" in os.environ else ["python"]
        self.command = [*started, *(sys.argv if args is None else ["recipes/finetune.py", *args])]
        super().__init__(
            LlavaFineTuner,
            LlavaDataModule,
            save_config_callback=None,  # see run_folder.record_run
            seed_everything_default=0,
            parser_class=SuggestingParser,
            parser_kwargs={"allow_abbrev": False},  # --trainer.max_step would silently be max_steps
            trainer_defaults=TRAINER_DEFAULTS,
            args=None if args is None else list(args),
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What belongs to neither model, data nor trainer."""
        parser.add_argument("--output", type=str, default="runs/finetune", help="folder of this run")
        parser.add_argument(
            "--keep", type=Literal["last", "best"], default="last", help="which weights become the adapter"
        )
        parser.add_argument("--save_every", type=int | None, default=None, help="optimizer steps between saves")
        parser.add_argument(
            "--loggers",
            type=list[LoggerName],
            default=["csv", "tensorboard"],
            help="where metrics go; see also `trainer.logger`",
        )
        parser.add_class_arguments(PruningSettings, "pruning")
        parser.add_class_arguments(EvaluationSettings, "evaluation")
        started_from = ("model.path", "model.init_adapter")
        parser.link_arguments(started_from, "data.processor", processor_of, apply_on="instantiate")
        parser.add_argument(
            "--resume",
            type=str,
            nargs="?",
            const=_LAST,
            help="go on from the last checkpoint in --output; `--resume auto`: from the newest good one there, or "
            "start anew where there is none; `--resume FILE`: from that one",
        )
        parser.add_argument(
            "--rehearse",
            type=Literal["embedded", "mine"],
            nargs="?",
            const="embedded",
            help="run everything once, small, on the embedded model and data; `--rehearse --data mine`: on that model "
            "and the first of your own records",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """As Lightning does; what cannot be is refused here, before a number becomes the seed.

        Raises:
            ValueError: A number cannot be, or a group of keys, for which Lightning takes anything, is no mapping.
        """
        super().parse_arguments(parser, args)
        for group in ("model", "data", "trainer", "pruning", "evaluation"):
            if not isinstance(self.config[group], Namespace):
                raise ValueError(f"{group} is {self.config[group]!r:.60}; expected a mapping of its keys")
        require_possible(self.config)

    def before_instantiate_classes(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        trainer = self.config.trainer
        require_known(trainer.strategy)
        settle_trainer(trainer)
        refuse_together(self.config)
        require_installed(self.config.loggers)
        if self.config.keep == "best":
            require_best(self.config.data.validation, self.config.pruning.learnable, trainer.limit_val_batches)
        if trainer.accelerator == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed would look for a GPU
        if self.config.rehearse:
            rehearse(self.config)
        set_epochs(trainer)
        resolve_model(self.config.model.path)  # ends within seconds where the weights cannot be reached
        self.output = Path(self.config.output)
        self.checkpoints = self.output / "checkpoints"
        self.resume_from = self._checkpoint_to_resume()
        if self.resume_from is not None:
            refuse_other_config(self.resume_from, self.resolved_config())
        if is_first_process():
            if self.config.rehearse:
                rehearsal_folder(self.output)
            own = self.resume_from is not None and self.resume_from.resolve().parent == self.checkpoints.resolve()
            claim_folder(self.output, resuming=self.config.resume == AUTO or own)
            for folder in (self.output, self.checkpoints):
                remove_leftovers(folder)

    def _checkpoint_to_resume(self) -> Path | None:
        if self.config.resume == AUTO:
            return newest_good(self.checkpoints)
        if self.config.resume in (None, _LAST):
            return self.checkpoints / "last.ckpt" if self.config.resume else None
        return Path(self.config.resume)

    def resolved_config(self) -> dict[str, Any]:
        """The whole config as plain values, without what belongs to this one call."""
        text = self.parser.dump(self.config, skip_none=False, format="yaml")
        return {key: value for key, value in yaml.safe_load(text).items() if key not in _NOT_IN_CONFIG}

    def instantiate_classes(self) -> None:
        """Model and data, neither of which loads weights yet, and the trainer."""
        super().instantiate_classes()
        self.settings: EvaluationSettings = self.config_init.evaluation
        self.pruning: PruningSettings = self.config_init.pruning
        self.pruning.check(self.model.schedule)
        self.model.processor = self.datamodule.processor  # asked about pictures as it is trained on them
        learns_ratios = self.pruning.learnable is not None
        self.measured = MeasuredRows(self.model, self.datamodule, self.settings, learns_ratios)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With the callbacks, loggers and checkpoint writer that every run has."""
        given: dict[str, Any] = dict(self._get(self.config_init, "trainer", default={}))
        settings: EvaluationSettings = self._get(self.config_init, "evaluation")
        generates = settings.during > 0 and self.config.data.validation is not None
        seed, pruning = int(self.config.seed_everything), self._get(self.config_init, "pruning")
        logged = given.get("logger") is not False and bool(given.get("logger") or self.config.loggers)
        callbacks: list[Any] = [
            *([AroundTraining(*(partial(do, self) for do in self.around))] if self.around else []),
            *own_callbacks(given.pop("callbacks", None), sys.stderr.isatty()),
            StepSeeds(seed),
            *_other_schedules(pruning, seed, lambda: self.datamodule.prompt_tokens),
            *([LearnRanking(ranking)] if (ranking := pruning.ranking(self.model.schedule)) else []),
            GradientNorm(self.checkpoints),
            Throughput(),
            *([LearningRateMonitor("step")] if logged else []),
            *([GenerationAccuracy(settings)] if generates else []),
            *([] if sys.stderr.isatty() else [ProgressLines()]),
            RememberConfig(self.resolved_config()),
            SaveOnInterrupt(self.checkpoints / "last.ckpt", self._how_to_resume()),
            *last_and_best(
                self.checkpoints,
                self.config.save_every,
                *(("val/accuracy", "max") if generates else ("val/loss", "min")),
            ),
        ]
        if given.get("logger") is None:
            given["logger"] = make_loggers(self.config.loggers, self.output)
        if not sys.stderr.isatty():
            given["enable_progress_bar"] = False
        given["plugins"] = [*as_list(given.pop("plugins", None)), AtomicCheckpointIO()]
        given["default_root_dir"] = str(self.output)
        return FineTuneTrainer(**{**given, **kwargs, "callbacks": callbacks})

    def _how_to_resume(self) -> str:
        given = [part for part in self.command if not part.startswith("--resume=")]
        if "--resume" in given:
            at = given.index("--resume")
            value = at + 1 < len(given) and not given[at + 1].startswith("--")
            del given[at : at + 1 + value]
        return shlex.join([*given, "--resume"])


def _other_schedules(pruning: PruningSettings, seed: int, measured: Measured) -> list[Callback]:
    """What lets steps run other schedules than the model's own, where the config asks for it."""
    if pruning.learnable is not None:
        return [LearnKeepRatios(pruning.learnable, pruning.tokens, measured)]
    if pruning.elastic is None and pruning.curriculum is None and pruning.dense_steps is None:
        return []
    return [SchedulePerStep(partial(pruning.plan, seed=seed), measured)]
