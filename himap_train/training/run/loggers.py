"""Loggers by name: Lightning's own, set up for a run's folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

LoggerName = Literal["csv", "tensorboard", "wandb", "mlflow"]


def require_installed(names: Iterable[str]) -> None:
    """Raises ValueError where a logger's package is not installed; says how to install it."""
    for name in names:
        if name in ("wandb", "mlflow") and find_spec(name) is None:
            raise ValueError(f"loggers: {name} is not installed; `pip install {name}`, or leave it out of --loggers")


def make_loggers(names: Iterable[LoggerName], output: Path) -> list[Logger]:
    """The loggers of a run, local files in its folder.

    Projects, servers and keys are read from the environment, as these packages do: `WANDB_PROJECT`, `WANDB_MODE`,
    `WANDB_API_KEY`; `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`. For anything else give `trainer.logger`.
    """
    makers = {
        "csv": lambda: CSVLogger(output, name="logs"),  # a new version_N each time: it deletes a file that is there
        "tensorboard": lambda: TensorBoardLogger(output, name="logs", version="tensorboard"),
        "wandb": lambda: WandbLogger(name=output.name, save_dir=output),
        "mlflow": lambda: _mlflow(output),
    }
    return [makers[name]() for name in dict.fromkeys(names)]


def _mlflow(output: Path) -> Logger:
    where = os.environ.get("MLFLOW_TRACKING_URI")
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "himap-train")
    return MLFlowLogger(experiment, run_name=output.name, tracking_uri=where, save_dir=str(output / "mlruns"))


def describe_run(loggers: Iterable[Logger], config: Mapping[str, Any]) -> None:
    """Tell the loggers that leave this machine what is run; on the others the config lies beside."""
    for logger in loggers:
        if isinstance(logger, WandbLogger | MLFlowLogger):
            logger.log_hyperparams(dict(config))
