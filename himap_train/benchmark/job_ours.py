"""The job as `recipes/finetune.py` runs it, on the stopwatch: `python -m himap_train.benchmark.job_ours JOB.json`."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import torch

from himap_train.benchmark.job_peers import Stopwatch
from himap_train.checkpoints.load import save_adapter
from himap_train.training.run.feature_cache import fill_feature_cache
from himap_train.training.run.finetune_cli import FinetuneCLI


def main() -> None:
    """Check the data, load, cache what the tower makes of it, train, save."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    watch, stack = Stopwatch(job["clock"]), ExitStack()

    def before(cli: FinetuneCLI) -> None:
        with watch.part("caching"):
            fill_feature_cache(cli.trainer, cli.model.peft_model, cli.datamodule)
        stack.enter_context(watch.steps(cli.model.peft_model))

    def after(cli: FinetuneCLI) -> None:
        stack.close()
        with watch.part("saving"):
            save_adapter(cli.model.peft_model, cli.output / "adapter", cli.model.schedule, cli.model.processor)

    with watch.part("start"):
        config = Path(sys.argv[1]).with_name("config.yaml")
        config.write_text(json.dumps(job["config"]), encoding="utf-8")
        cli = FinetuneCLI(["--config", str(config)], (before, after))
        cli.datamodule.setup("fit")
        cli.datamodule.check("train")
    cli.trainer.save_checkpoint = watch.timed("saving", cli.trainer.save_checkpoint)  # type: ignore[method-assign]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    watch.save(job["results"], sum(p.numel() for p in cli.model.peft_model.parameters() if p.requires_grad))


if __name__ == "__main__":
    main()
