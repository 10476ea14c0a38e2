"""Where a model takes what from: saliency and attention between image and text by layer, knock-outs, and a schedule.

python recipes/information_flow.py                # the embedded model, 64 of its validation questions
python recipes/information_flow.py --checkpoint llava-hf/llava-1.5-7b-hf --dtype bfloat16 --data train.json
                                   --image-folder images --window 4 --batch-size 4 --output runs/flow
python recipes/evaluate.py --schedule runs/information_flow/schedule-0.40.yaml

docs/information_flow.md says what the numbers mean, and what they said on the embedded model.
"""

from __future__ import annotations

from himap_train.quick_help import answer_help

answer_help(__file__)

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from himap_train.analysis.flow_report import FLOW, KNOCKOUTS, MAP, PICTURE, print_cuts, save_flow, save_map
from himap_train.analysis.flow_table import cut_rows, flow_rows, image_over_instruction
from himap_train.analysis.knockout import knock_out, passes, windows
from himap_train.analysis.saliency import Formula, measure
from himap_train.bar import progress_bar
from himap_train.command_line import new_output_folder, run_command
from himap_train.evaluation.samples import open_samples
from himap_train.evaluation.tables import write_json
from himap_train.models.stock import base_model
from himap_train.search.flow import mean_image_to_text, reason, suggest
from himap_train.search.search_folder import print_flow, schedule_file, schedules_in
from himap_train.search.space import Space

FACTS = "flow.json"


def main(
    samples: int = 64,
    formula: Formula = "paper",
    knockouts: bool = True,
    window: int = 2,
    renormalise: bool = True,
    budget: float = 0.4,
    batch_size: int = 16,
    output: Path = Path("runs/information_flow"),
    overwrite: bool = False,
    seed: int = 0,
    **opened: Any,
) -> None:
    """Measure the information flow of a dense model, and what its answers lose without parts of it.

    Args:
        samples: Records with images and answers, drawn from the data; each turn of one counts for itself.
        formula: paper (Eq. 1), or published-code (what its authors' code computes instead).
        knockouts: Cut windows of layers too.
        window: Layers of a window.
        renormalise: What a cut takes is shared by what is left; false: it is lost.
        budget: flops_ratio of the suggested schedule.
        batch_size: Samples in a batch.
        output: Folder for tables, figures and the suggested schedule.
        overwrite: Replace results that are there.
        seed: Seed of the drawn samples, and of the cuts' controls.
        **opened: Options of `open_samples`.
    """
    files = (FLOW, KNOCKOUTS, FACTS, PICTURE, MAP, schedule_file(budget), *schedules_in(output))
    clear = new_output_folder(output, files, overwrite)
    model, _, drawn = open_samples(samples=samples, batch_size=batch_size, seed=seed, each_turn=True, **opened)
    config: Any = base_model(model).config
    layers = windows(config.text_config.num_hidden_layers, window) if knockouts else []
    if drawn.too_long:
        print(f"{drawn.too_long} turns are left out: with all before them they are longer than the context")
    with progress_bar("saliency", drawn.count) as advance:
        flows = measure(model, drawn, formula, advance)
    clear()
    rows, given = flow_rows(flows, formula), mean_image_to_text(flows)
    ratios = image_over_instruction(rows)
    save_flow(output, rows, [], [])
    facts = {**opened, "samples": drawn.count, **drawn.tokens, "too_long": drawn.too_long, "formula": formula}
    facts |= {"renormalise": renormalise, "seed": seed, "image_to_text": given, "image_over_instruction": ratios}
    write_json(output / FACTS, facts)
    try:
        save_map(output / MAP, drawn, flows)
    except ValueError as error:
        print(f"no {MAP}: {error}", file=sys.stderr)
    print_flow(given)
    told = ", ".join(f"{ratio:.3g} (normalised by {name})" for name, ratio in ratios.items())
    print(f"S_img / S_ins, what image tokens give over what the instruction gives: {told}")
    write_suggestion(given, config, budget, drawn.tokens, output)
    if knockouts:
        try:
            with progress_bar("knock-outs", len(drawn.batches) * passes(layers)) as advance:
                cuts = knock_out(model, drawn, layers, renormalise, seed, advance)
        except KeyboardInterrupt:
            print(f"interrupted; {output} has all but the knock-outs", file=sys.stderr)
            sys.exit(130)
        cut = cut_rows(cuts, flows)
        save_flow(output, rows, cut, cuts)
        print_cuts(cut)
    print(f"saved in {output}")


def write_suggestion(given: Sequence[float], config: Any, budget: float, tokens: dict[str, int], output: Path) -> None:
    """A schedule for a budget, by what image tokens give at each layer, where one can meet it."""
    try:
        stages = min(2, max(config.text_config.num_hidden_layers - 1, 1))
        space = Space(config, budget, tokens["image_tokens"], tokens["text_tokens"], stages)
    except ValueError as error:
        print(f"no schedule is suggested for --budget {budget}: {error}", file=sys.stderr)
        return
    schedule = space.schedule(suggest(given, space))
    if schedule is not None:
        why, file = reason(given, space, schedule), output / schedule_file(budget)
        file.write_text(f"# {why}\n{yaml.safe_dump(schedule.to_dict(), sort_keys=False)}", encoding="utf-8")
        print(f"suggested in {file}: it {why}")
    else:
        print(f"no schedule is suggested for --budget {budget}: whole tokens miss it by more than 1 %", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command(main))
