"""Fine-tune a LLaVA with LoRA while image tokens are pruned inside its decoder.

python recipes/finetune.py --config configs/quickstart.yaml                  # everything embedded, minutes on a CPU
python recipes/finetune.py --config configs/llava_himap.yaml --rehearse      # any config, once, small
python recipes/finetune.py --config configs/llava_himap.yaml --model.lora_lr 1e-4 --output runs/mine
python recipes/finetune.py --config runs/mine/config.yaml --resume           # after Ctrl-C or a crash
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from himap_train.agreement import check_agreement
from himap_train.checkpoint import read_schedule, save_adapter
from himap_train.evaluation.command_line import USER_ERRORS
from himap_train.evaluation.compare import Row, compare
from himap_train.evaluation.report import print_table, save_table
from himap_train.export.folders import export_merged
from himap_train.models.loading import resolve_model
from himap_train.models.lora import trainable_report
from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.cli import FinetuneCLI
from himap_train.training.interrupt import Interrupted
from himap_train.training.run_folder import package_versions, record_run


def run(cli: FinetuneCLI) -> None:
    """The story of a run: load, check the data, measure, train, save, measure again."""
    tuner, data, trainer = cli.model, cli.datamodule, cli.trainer
    resolve_model(tuner.path)  # ends within seconds where the weights cannot be reached
    check_data(cli)
    tuner.configure_model()
    record_run(cli.output, cli.resolved_config(), tuner.schedule)
    print(trainable_report(tuner.peft_model), f"schedule: {tuner.schedule.to_dict()}", sep="\n")

    pruned = read_schedule(cli.settings.schedule) if cli.settings.schedule else tuner.schedule
    rows = measure(cli, {"dense": None, "training-free pruned": pruned}) if cli.settings.before else []
    trainer.fit(tuner, datamodule=data, ckpt_path=cli.resume_from, weights_only=True)
    if cli.config.keep == "best":
        take_best(cli)
    adapter = save_adapter(tuner.peft_model, cli.output / "adapter", tuner.schedule, tuner.processor)
    print(f"saved {adapter}")
    if cli.settings.after:
        rows += measure(cli, rows_after(tuner.schedule, pruned))
    if rows and trainer.is_global_zero:
        save_table(rows, cli.output, {"config": cli.resolved_config(), "versions": package_versions()})
        print_table(rows)
    if cli.config.rehearse:
        merged = export_merged(adapter, cli.output / "merged")
        print(f"rehearsed: trained, saved, evaluated, exported; {check_agreement(adapter, merged)}")


def check_data(cli: FinetuneCLI) -> None:
    """Count, look for images, measure lengths before an hour is spent; raises where too much is broken."""
    data = cli.datamodule
    data.processor = cli.load_processor()
    data.setup("fit")
    report = data.check("train")
    if report is not None:
        print(report)
        report.require_usable(data.max_skipped)


def rows_after(trained: PruningSchedule, pruned: PruningSchedule) -> dict[str, PruningSchedule | None]:
    """Names and schedules of what is measured after training."""
    if trained.stages:
        return {"adapted pruned": pruned, "adapted, evaluated dense": None}
    return {"fine-tuned dense": None, "fine-tuned dense, then pruned": pruned}


def measure(cli: FinetuneCLI, schedules: dict[str, PruningSchedule | None]) -> list[Row]:
    """A row of the table for each schedule, on the test data, or the validation data where there is none."""
    tuner, data = cli.model, cli.datamodule
    split = next((split for split in ("test", "validation") if data.source(split) is not None), None)
    if split is None:
        return []
    wanted = {name: schedule for name, schedule in schedules.items() if schedule is None or schedule.stages}
    limits = [limit for limit in (cli.settings.limit, data.limits[split]) if limit is not None]
    settings = cli.settings.for_data(data, min(limits, default=None))
    tuner.to(cli.trainer.strategy.root_device)
    with cli.trainer.precision_plugin.forward_context():
        return compare(tuner.peft_model, tuner.processor, data.source(split), wanted, **settings)


def take_best(cli: FinetuneCLI) -> None:
    """Put the weights of `best.ckpt` into the model."""
    best: dict[str, Any] = torch.load(cli.checkpoints / "best.ckpt", map_location="cpu", weights_only=True)
    cli.model.on_load_checkpoint(best)
    cli.model.load_state_dict(best["state_dict"], strict=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 2 after an error that the user can mend; 130 after Ctrl-C."""
    try:
        run(FinetuneCLI(argv))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
