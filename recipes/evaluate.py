"""Measure any checkpoint under any pruning schedule on any data set.

python recipes/evaluate.py                    # the embedded model, dense, on its test questions
python recipes/evaluate.py --schedule himap   # the same, pruned without training
python recipes/evaluate.py --checkpoint runs/elastic --budget 0.4   # one checkpoint at the cost that is wanted
python recipes/evaluate.py --checkpoint runs/mine --data test.json --image-folder images --output runs/mine/test
python recipes/evaluate.py --checkpoint llava-hf/llava-1.5-7b-hf --dtype bfloat16 --batch-size 8 --schedule himap
                           --benchmark pope --data lmms-lab/POPE --image-aspect-ratio pad
"""

from __future__ import annotations

from himap_train.quick_help import answer_help

answer_help(__file__)

import json
import sys
from pathlib import Path
from typing import Any

import torch

from himap_train.checkpoints.load import AS_SAVED, Dtype, load_with_schedule
from himap_train.command_line import new_output_folder, run_command
from himap_train.evaluation.benchmarks.export import SUBMISSIONS, export
from himap_train.evaluation.benchmarks.opening import Task, open_task
from himap_train.evaluation.budgeted import check_budget_argument, prompt_tokens, run_at_budget
from himap_train.evaluation.compare import Row, evaluate_row
from himap_train.evaluation.metrics import make_metrics
from himap_train.evaluation.tables import FILES, json_ready, print_table, save_table
from himap_train.models.families.base import AspectRatio
from himap_train.processes import require_one_process
from himap_train.pruning.reading import ScheduleArgument

PREDICTIONS = "predictions.jsonl"


def main(
    checkpoint: str = "embedded",
    data: str = "embedded:test",
    benchmark: str | None = None,
    answers: Path | None = None,
    prompt: str = "",
    answer_column: str = "",
    options_column: str = "",
    image_column: str = "",
    type_column: str = "",
    schedule: ScheduleArgument = AS_SAVED,
    budget: float | None = None,
    image_folder: str | None = None,
    follow_links: bool = False,
    image_aspect_ratio: AspectRatio | None = None,
    metrics: list[str] | None = None,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    name: str | None = None,
    seed: int = 0,
    dtype: Dtype = "auto",
    device: str = "auto",
    **settings: Any,
) -> None:
    r"""Answer the question of every record greedily, of a conversation its last one, and score the answers.

    Args:
        checkpoint: "embedded", a run or adapter folder, a merged folder, or any stock LLaVA (folder or hub name).
        data: embedded:test, a LLaVA file (.json, .jsonl), a Hugging Face data set (folder, .parquet, owner/name:split).
        benchmark: pope, textvqa, gqa, mme, ...: `data` is its file, as on the Hugging Face hub or as LLaVA has it.
        answers: Answer file of the benchmark, for LLaVA's question files.
        prompt: What is asked, with columns in braces: "{question}\nAnswer with one word."; for files of any columns.
        answer_column: Column of the accepted answers.
        options_column: Column with the list of options, which stand in the prompt as {options}.
        image_column: Column of the image where it is not `image` or `images`; several with commas.
        type_column: Column of the category, for scores of each.
        schedule: as-saved, none, a preset (himap, fastv, ...), a pruning.yaml, or the stages inline.
        budget: Run that schedule's layers at this flops_ratio of the mean prompt instead, 0.4 say; 1 is dense.
        image_folder: Where the data's image paths start; by default the folder of its file.
        follow_links: Symbolic links in the image folder may lead out of it.
        image_aspect_ratio: By default as the checkpoint was trained; "pad" makes images square first, as LLaVA-1.5 was.
        metrics: exact, gqa, vqa, textvqa (both need the annotators' answers, four or more), pope, mme, relaxed, anls,
            choice, choice-strict (as LLaVA's ScienceQA script), circular, cider; the first gives the score.
        max_new_tokens: Where an answer is cut; by default as the benchmark has it, or 16.
        limit: Only the first so many records.
        output: Folder for metrics.json, predictions.jsonl, table.md and accuracy.png.
        overwrite: Replace results that are there.
        name: Name of the row in the table; by default the checkpoint and the schedule.
        seed: For the criterion `random`.
        dtype: Dtype of the weights; "auto" as they are stored.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        **settings: Options of `himap_train.evaluation.evaluate.evaluate`.
    """
    require_one_process()
    check_budget_argument(budget, schedule)
    make_metrics(metrics or ["exact"])  # a misspelt name fails before anything is loaded
    columns = {"answer": answer_column, "options": options_column, "image": image_column, "type": type_column}
    task = open_task(data, benchmark, answers, image_folder, follow_links, prompt=prompt, **columns)
    if output is not None:
        clear = new_output_folder(output, (*FILES, PREDICTIONS, *SUBMISSIONS), overwrite)
    elif task.metrics == ("none",):
        raise ValueError(f"{data} has no answers, so they are only written down: name a folder with --output")
    model, processor = load_with_schedule(checkpoint, schedule, dtype, device)
    if budget is not None:
        run_at_budget(model, budget, *prompt_tokens(task.source, processor, image_aspect_ratio, limit))
    how = schedule if isinstance(schedule, str) else "own schedule" if schedule else "dense"
    torch.manual_seed(seed)
    row = evaluate_row(
        name or f"{checkpoint}, {how}{'' if budget is None else f' at {budget}'}",
        model,
        processor,
        task.source,
        max_new_tokens=task.max_new_tokens if max_new_tokens is None else max_new_tokens,
        metrics=metrics or task.metrics,
        limit=limit,
        image_aspect_ratio=image_aspect_ratio,
        progress=True,
        **settings,
    )
    if output is not None:
        clear()
    facts = {"checkpoint": checkpoint, "data": data, "benchmark": benchmark, "seed": seed}
    report(row, task, output, {**facts, "dtype": dtype, "device": device})


def report(row: Row, task: Task, output: Path | None, facts: dict[str, object]) -> None:
    """The table and all figures on the screen; the files in `output`."""
    print(f"schedule: {row.schedule.to_dict()}")
    print_table([row])
    for figure, value in row.result.figures.items():
        if figure.split("/")[0] != row.result.metric:  # those are in the table
            print(f"{figure}: {value:.4f}")
    if row.result.image_tokens_per_layer:
        print(f"image tokens, average over layers: {row.result.image_tokens_per_layer.mean:.1f}")
    if row.result.skipped:
        print(f"skipped records: {len(row.result.skipped)}")
    if output is None:
        return
    save_table([row], output, facts)
    with (output / PREDICTIONS).open("w", encoding="utf-8") as file:
        for answer in row.result.predictions:
            file.write(json.dumps(json_ready(answer), ensure_ascii=False) + "\n")
    if task.export:
        own = task.own(row.result.predictions)
        print(f"for the judge or server: {export(task.export, own, task.facts, output)}")
    print(f"saved in {output}")


if __name__ == "__main__":
    sys.exit(run_command(main))
