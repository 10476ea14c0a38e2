"""The rows of a run's table: what is measured before and after training, and at which budgets."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from himap_train.data.check_report import DataReport
from himap_train.evaluation.budgeted import prompt_tokens, require_budget
from himap_train.evaluation.compare import Row, compare
from himap_train.models.loading import resolve_model
from himap_train.pruning.reading import fitted_schedule
from himap_train.pruning.schedule import PruningSchedule
from himap_train.training.run.command_line import FinetuneCLI
from himap_train.training.schedules.requirements import require_ratios

Schedules = dict[str, PruningSchedule | None]


def rows_before(cli: FinetuneCLI) -> Schedules:
    """Names and schedules of what is measured before training."""
    name, schedule = "training-free pruned", evaluated_schedule(cli, model_config(cli))
    return {"dense": None, name: schedule, **at_budgets(cli, name, schedule)}


def rows_after(cli: FinetuneCLI) -> Schedules:
    """Names and schedules of what is measured after training."""
    schedule = evaluated_schedule(cli, model_config(cli))
    if cli.model.schedule.stages:
        name, rows = "adapted pruned", {"adapted pruned": schedule, "adapted, evaluated dense": None}
    else:
        name = "fine-tuned dense, then pruned"
        rows = {"fine-tuned dense": None, name: schedule}
    return {**rows, **at_budgets(cli, name, schedule)}


def at_budgets(cli: FinetuneCLI, name: str, schedule: PruningSchedule) -> Schedules:
    """A row for each of `evaluation.budgets`, for the mean prompt of the data that is measured."""
    found = measured_source(cli)
    if not cli.settings.budgets or found is None:
        return {}
    source, limit = found
    tokens = prompt_tokens(source, cli.datamodule.processor, cli.datamodule.image_aspect_ratio, limit)
    config = model_config(cli)
    return {f"{name} at {budget}": schedule.at_budget(config, budget, *tokens) for budget in cli.settings.budgets}


def measure(cli: FinetuneCLI, schedules: Schedules) -> list[Row]:
    """A row of the table for each schedule."""
    found = measured_source(cli)
    if found is None:
        return []
    source, limit = found
    wanted = {name: schedule for name, schedule in schedules.items() if schedule is None or schedule.stages}
    settings = cli.settings.for_data(cli.datamodule, limit)
    with cli.trainer.precision_plugin.forward_context():
        return compare(cli.model.peft_model, cli.model.processor, source, wanted, **settings)


def measured_source(cli: FinetuneCLI) -> tuple[Any, int | None] | None:
    """The test data, or the validation data where there is none, and how many of its records are used."""
    data = cli.datamodule
    split = next((split for split in ("test", "validation") if data.source(split) is not None), None)
    if split is None:
        return None
    limits = [limit for limit in (cli.settings.limit, data.limits[split]) if limit is not None]
    return data.source(split), min(limits, default=None)


def evaluated_schedule(cli: FinetuneCLI, config: Any) -> PruningSchedule:
    """That of the pruned rows, for a model of this config."""
    layers, given = config.text_config.num_hidden_layers, cli.settings.schedule
    if not given:
        own: PruningSchedule = cli.model.fitted_schedule(layers)
        return own
    return fitted_schedule(given, layers)


def model_config(cli: FinetuneCLI) -> Any:
    """The model's configuration, before and after it is loaded."""
    if cli.model.llava is not None:
        return cli.model.llava.config
    return AutoConfig.from_pretrained(resolve_model(cli.model.path))


def prepare_budgets(cli: FinetuneCLI, report: DataReport | None) -> None:
    """Refuse budgets that cannot be met.

    Args:
        cli: Whose data have been set up.
        report: Of the data check; None for a stream.

    Raises:
        ValueError: Naming the key, the budget and the least possible one.
    """
    settings = cli.pruning.learnable or cli.pruning.elastic
    if settings is None and not cli.settings.budgets:
        return
    config = model_config(cli)
    if settings is not None:
        tokens = cli.pruning.tokens(report.mean_tokens() if report else None)
        schedule = cli.model.fitted_schedule(config.text_config.num_hidden_layers)
        settings.check_possible(schedule, config, tokens)
    if cli.settings.budgets:
        schedule = evaluated_schedule(cli, config)
        require_ratios("evaluation.budgets", schedule)
        for budget in cli.settings.budgets:
            require_budget("evaluation.budgets", budget)
        try:
            at_budgets(cli, "", schedule)
        except ValueError as error:
            raise ValueError(f"evaluation.budgets: {error}") from error
