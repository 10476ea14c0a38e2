"""A grid of schedules on one model: accuracy, FLOPs, time and memory of every row, as a table and as heat maps.

python recipes/ablate.py --limit 350                # HiMAP's Table 4 on the embedded model, with its controls
python recipes/ablate.py --preset kr --limit 350    # where to remove and how much
python recipes/ablate.py --layers [[1,2],[3,4]] --ratios [[0.5],[0.25,0.125]] --criteria [[instruction],[image]]
python recipes/ablate.py --checkpoint llava-hf/llava-1.5-7b-hf --dtype bfloat16 --data scienceqa.json --preset table4

Rows that are there already are not run again: the same command goes on where it was stopped.
"""

from __future__ import annotations

from himap_train.quick_help import answer_help

answer_help(__file__)

import sys
from functools import partial
from pathlib import Path
from typing import Any

from himap_train.benchmark.ablation import CONTROLS, read_grids, schedules_of
from himap_train.benchmark.ablation_results import ablation_table, draw_heat_maps, lines_of, panels_of
from himap_train.benchmark.ablation_rows import ROWS, as_of, measured, require_rankings, run_all, runs_of, timed_batch
from himap_train.benchmark.timing import Clock
from himap_train.checkpoints.load import load_with_schedule
from himap_train.command_line import new_output_folder, run_command
from himap_train.data.sources import open_source
from himap_train.evaluation.metrics import make_metrics
from himap_train.models.families.base import AspectRatio
from himap_train.models.install import remove_pruning
from himap_train.models.stock import base_model

TABLE, PICTURE = "ablation.md", "heat_maps.png"


def main(
    data: str = "embedded:test",
    preset: str = "table4",
    layers: list[list[int | dict[str, Any]]] | None = None,
    ratios: list[list[float]] | None = None,
    criteria: list[list[str | dict[str, Any]]] | None = None,
    controls: list[str] = list(CONTROLS),  # noqa: B006, B008 - never changed; the default that --help shows
    skip_impossible: bool = False,
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    image_folder: str | None = None,
    image_aspect_ratio: AspectRatio | None = None,
    metrics: list[str] = ["exact"],  # noqa: B006
    batch_size: int = 64,
    max_new_tokens: int = 16,
    limit: int | None = None,
    max_skipped: int | float = 0.01,
    rounds: int = 5,
    timed_prompts: int = 8,
    clock: Clock = "wall",
    output: Path = Path("runs/ablation"),
    overwrite: bool = False,
    **loading: Any,
) -> None:
    """Measure every schedule of a grid, training-free or as the checkpoint was adapted.

    Args:
        data: embedded:test, a LLaVA file (.json, .jsonl), a Hugging Face data set (folder, .parquet, owner/name:split).
        preset: table4 (the paper's criteria and pairs of them), kr (layers and ratios), same-criterion, depth (one
            layer for all, or one for each sample).
        layers: In place of the preset's: for each stage its choices, [[1,2],[3,4]]; all are crossed. A choice may be
            {first: 1, last: 4, attention_below: 0.7}, the first of these where a sample has read its image.
        ratios: The same of what each stage keeps of the original image tokens.
        criteria: The same of what ranks them; a name, or a mapping with parameters.
        controls: Criteria that look at nothing, run at all the same layers and ratios; [] for none.
        skip_impossible: Leave out crossings that cannot be, which are an error otherwise.
        seeds: One run each of what is drawn by chance; the first for all else.
        image_folder: Where the data's image paths start; by default the folder of its file.
        image_aspect_ratio: By default as the checkpoint was trained; "pad" makes images square first, as LLaVA-1.5 was.
        metrics: As in evaluate.py; the first gives the score.
        batch_size: Questions in a batch.
        max_new_tokens: Where an answer is cut.
        limit: Only the first so many records.
        max_skipped: Unusable records that are tolerated: a number, or a fraction below 1. They are not scored.
        rounds: Pairs with dense that each time is the median of.
        timed_prompts: Prompts in the batch that is timed.
        clock: On a CPU, "wall", or "cpu" for the time of this process alone (one thread, on a machine that is shared).
        output: Folder for rows.json, ablation.md and heat_maps.png.
        overwrite: Measure anew what is there; weights and data files that have changed since are measured anew anyway.
        **loading: Options of `load_with_schedule`.
    """
    make_metrics(metrics)  # a misspelt name fails before anything is loaded
    if "none" in metrics[:1] or not seeds:
        raise ValueError(f"metrics {metrics}, seeds {seeds}: an ablation compares scores, over one seed or more")
    grids = read_grids(preset, layers=layers, ratios=ratios, criteria=criteria)
    schedules_of(grids, controls, None, False, skip_impossible)
    if min(rounds, timed_prompts) < 1:
        raise ValueError(f"rounds {rounds}, timed_prompts {timed_prompts}: both must be at least 1")
    source = open_source(data, image_folder, split="test")
    model, processor = load_with_schedule(schedule="none", **loading)
    remove_pruning(model)
    depth = base_model(model).config.text_config.num_hidden_layers
    schedules = schedules_of(grids, controls, depth, layers is None, skip_impossible)
    require_rankings(model, schedules)
    evaluation = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "metrics": metrics, "limit": limit}
    evaluation |= {"image_aspect_ratio": image_aspect_ratio, "max_skipped": max_skipped}
    batch = timed_batch(model, processor, source, timed_prompts, limit, image_aspect_ratio=image_aspect_ratio)
    facts = {**loading, "data": data, "image_folder": image_folder}
    facts["data_as_of"] = as_of(data, "*.parquet", "*.arrow", "*.jsonl")
    facts["checkpoint_as_of"] = as_of(loading.get("checkpoint", ""), "*.safetensors")
    settings: dict[str, Any] = {**facts, "timed_prompts": timed_prompts, "rounds": rounds, "clock": clock, **evaluation}
    runs = runs_of(schedules, seeds)
    how: dict[str, Any] = {"model": model, "processor": processor, "source": source, "batch": batch, **evaluation}
    if overwrite:
        new_output_folder(output, (ROWS, TABLE, PICTURE), overwrite)()
    try:
        rows = run_all(runs, partial(measured, rounds=rounds, clock=clock, **how), output, settings)
    except KeyboardInterrupt:
        how_on = "the same command" + (" without --overwrite" if overwrite else "")
        print(f"interrupted; {output / ROWS} has what was measured: {how_on} goes on", file=sys.stderr)
        sys.exit(130)
    lines = lines_of(rows)
    text = ablation_table(lines)
    (output / TABLE).write_text(text, encoding="utf-8")
    if panels := panels_of(lines):  # where two things were varied
        label = f"{rows[0]['metric']} score, % (dense {lines[0].scores[0]:.1f})"
        draw_heat_maps(panels, label).savefig(output / PICTURE, dpi=120)
    else:
        (output / PICTURE).unlink(missing_ok=True)  # of another grid
    print(f"{text}\nsaved in {output}")


if __name__ == "__main__":
    sys.exit(run_command(main))
