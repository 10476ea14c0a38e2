"""Fine-tune a LLaVA with LoRA while image tokens are pruned inside its decoder.

python recipes/finetune.py --config configs/quickstart.yaml                  # everything embedded, minutes on a CPU
python recipes/finetune.py --config configs/llava_himap.yaml --rehearse      # any config, once, small
python recipes/finetune.py --config configs/llava_himap.yaml --model.lora_lr 1e-4 --output runs/mine
python recipes/finetune.py --config runs/mine/config.yaml --resume           # after Ctrl-C or a crash
python recipes/finetune.py --config configs/llava_himap.yaml --config configs/deepspeed/zero2.yaml --trainer.devices 8
torchrun --nproc-per-node 8 recipes/finetune.py --config ...                 # see docs/multi_gpu.md
"""

from __future__ import annotations

from himap_train.quick_help import answer_help

answer_help(__file__)

import sys
from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException

from himap_train.analysis.report import write_report
from himap_train.analysis.samples import save_samples, take_samples
from himap_train.checkpoints.agreement import check_agreement
from himap_train.checkpoints.export import export_merged
from himap_train.checkpoints.load import save_adapter, write_card
from himap_train.command_line import USER_ERRORS
from himap_train.evaluation.compare import Row
from himap_train.evaluation.metrics import make_metrics
from himap_train.evaluation.tables import print_table, save_table
from himap_train.models.foresight import untrained
from himap_train.models.guard import check_trained_weights
from himap_train.models.lora import trainable_report
from himap_train.models.stock import base_model
from himap_train.models.whole import trained_in_place
from himap_train.training.callbacks.checkpoints import read_checkpoint
from himap_train.training.callbacks.interrupt import Interrupted
from himap_train.training.run.feature_cache import fill_feature_cache
from himap_train.training.run.finetune_cli import FinetuneCLI
from himap_train.training.run.folder import CONFIG, record_run, record_schedule, release_folder, set_aside_table
from himap_train.training.run.launch import end_children, is_first_process, report_error, say
from himap_train.training.run.loggers import describe_run
from himap_train.training.run.measured_rows import Schedules, model_config
from himap_train.training.run.unseen_tokens import unproduced_tokens_warning, unseen_tokens_warning
from himap_train.training.zero.gather import trained_state
from himap_train.versions import package_versions


def run(cli: FinetuneCLI) -> None:
    """The story of a run: check the data, load, measure, train, save, measure again."""
    check_data(cli)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.resume_from, weights_only=True)
    if cli.config.rehearse and is_first_process():
        # in fp32: what so few steps change may be lost by rounding
        merged = export_merged(cli.output / "adapter", cli.output / "merged", dtype="float32")
        agreement = check_agreement(cli.output / "adapter", merged)
        say(f"rehearsed: trained, saved, evaluated, exported; {agreement}")


def before_training(cli: FinetuneCLI, rows: list[Row]) -> None:
    """Write down what is run, cache image features, measure what it starts from, in a resumed run too."""
    tuner = cli.model
    if is_first_process():
        cli.is_new = not (cli.output / CONFIG).exists()
        set_aside_table(cli.output)
        record_run(cli.output, cli.resolved_config(), tuner.schedule)
        describe_run(cli.trainer.loggers, cli.resolved_config())
    say(trainable_report(tuner.peft_model), f"schedule: {tuner.schedule.to_dict()}")
    base, data = base_model(tuner.peft_model), cli.datamodule
    for warning in (
        unseen_tokens_warning(data.token_ids, base.get_input_embeddings().weight, data.processor),
        unproduced_tokens_warning(data.answer_ids, base.lm_head, data.processor),
    ):
        if warning:
            say(warning)
    fill_feature_cache(cli.trainer, tuner.peft_model, cli.datamodule)
    if cli.settings.before and trained_in_place(tuner.peft_model) and (cli.resume_from or tuner.init_adapter):
        say("not measured before training: weights of the base are no longer what they were")
    elif cli.settings.before:
        with tuner.peft_model.disable_adapter(), untrained(tuner.peft_model, tuner.schedule):
            measure(cli, cli.measured.before(), rows)


def after_training(cli: FinetuneCLI, rows: list[Row]) -> None:
    """Save the adapter, measure, print the table."""
    tuner = cli.model
    if cli.config.keep == "best":
        take_best(cli)
    weights = trained_state(tuner.peft_model)
    if is_first_process():
        record_schedule(cli.output, tuner.schedule)  # learned keep ratios are known only now
        folder, processor = cli.output / "adapter", cli.datamodule.processor
        say(f"saved {save_adapter(tuner.peft_model, folder, tuner.schedule, processor, weights)}")
    if cli.settings.after:
        measure(cli, cli.measured.after(), rows)
    if rows and is_first_process():
        write_card(cli.output / "adapter", model_config(tuner))  # now that there are scores
        print_table(rows)
    report(cli, rows)


def report(cli: FinetuneCLI, rows: list[Row]) -> None:
    """Take some samples, in all processes, and write the report."""
    tuner = cli.model
    source, schedule, settings = cli.measured.shown()
    with cli.trainer.precision_plugin.forward_context():
        samples = take_samples(tuner.peft_model, tuner.processor, source, schedule, rows, **settings)
    if is_first_process():
        save_samples(samples, cli.output)
        say(f"report: {write_report(cli.output)}")


def measure(cli: FinetuneCLI, schedules: Schedules, rows: list[Row]) -> None:
    """Add a row for each schedule; each is on the disk as soon as it is measured."""
    for row in cli.measured.measure(schedules, cli.trainer):
        rows.append(row)
        if is_first_process():
            save_table(rows, cli.output, {"config": cli.resolved_config(), "versions": package_versions()})


def check_data(cli: FinetuneCLI) -> None:
    """Count, look for images, measure lengths before an hour is spent; raises where too much is broken."""
    data = cli.datamodule
    make_metrics(cli.settings.metrics)  # an unknown one is not found out at the first validation
    data.setup("fit")
    report = data.check("train") if is_first_process() else None
    if report is not None:
        say(report)
        report.require_usable(data.max_skipped)
    if is_first_process():
        config = model_config(cli.model)
        schedule = cli.model.fitted_schedule(config.text_config.num_hidden_layers)
        cli.pruning.check_possible(schedule, config, data.prompt_tokens)
        cli.measured.check_budgets()


def take_best(cli: FinetuneCLI) -> None:
    """Put the weights of `best.ckpt` into the model; the last ones stay where nothing was validated."""
    file = cli.checkpoints / "best.ckpt"
    if not cli.trainer.strategy.broadcast(file.is_file()):
        say("keep is best, but nothing was validated (trainer.check_val_every_n_epoch?), so the last weights are kept")
        return
    best = read_checkpoint(file)
    check_trained_weights(set(best["state_dict"]), cli.model.trained_names())
    cli.trainer.strategy.load_model_state_dict(best, strict=False)
    cli.model.take_ranking(best)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 2 after an error that the user can mend; 130 after Ctrl-C, 143 after SIGTERM.

    What comes before and after training happens in the processes that train, on the model as it is spread over them.
    """
    cli: FinetuneCLI | None = None
    rows: list[Row] = []
    try:
        cli = FinetuneCLI(argv, (lambda cli: before_training(cli, rows), lambda cli: after_training(cli, rows)))
        run(cli)
    except Interrupted as stop:
        if not is_first_process():
            return 0  # any other status makes launchers kill the first process while it writes its message
        print(stop, file=sys.stderr)
        return stop.status
    except SystemExit:
        if cli is None or not cli.trainer.interrupted:
            raise
        print("interrupted; the same command with --resume auto goes on", file=sys.stderr)  # Lightning's own way to end
        return 130
    except (*USER_ERRORS, MisconfigurationException) as error:
        if cli is not None and cli.is_new and cli.trainer.global_step == 0:
            release_folder(cli.output)
        report_error(error)
        return 2
    finally:
        if cli is not None:
            end_children(cli.trainer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
