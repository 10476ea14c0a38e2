"""The README.md that goes with an adapter or a merged model: data, schedule and its cost, training, scores, loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from himap_train import __version__
from himap_train.checkpoints.run_facts import ADAPTED, RUN_DENSE, RunFacts
from himap_train.models.families import family_of_config
from himap_train.models.families.processing import PartsProcessor
from himap_train.pruning.schedule import PruningSchedule

TEXT_TOKENS = 115
"""Text of the sample that costs are given for where the run measured none: LLaVA-1.5's system prompt and a question."""
_SETTINGS = (
    ("model", ("lora_r", "lora_alpha", "lora_dropout", "lora_targets", "projector", "lora_lr", "projector_lr")),
    ("model", ("vision_tower", "decoder", "vision_lr", "decoder_lr", "use_dora", "use_rslora", "init_adapter")),
    ("model", ("weight_decay", "warmup_ratio", "loss_average", "quantize")),
    ("data", ("batch_size", "max_length", "image_aspect_ratio")),
    ("pruning", ("learnable", "elastic", "curriculum", "dense_steps")),
    ("trainer", ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision")),
    ("trainer", ("strategy", "devices", "num_nodes")),
)
_LOAD_PRUNED = """```python
from himap_train import load_checkpoint

model, processor = load_checkpoint("this-folder")                 # pruned as it was trained
model, processor = load_checkpoint("this-folder", schedule=None)  # dense
```"""
_LOAD_ADAPTER = "`PeftModel.from_pretrained` loads this folder too; the model then runs dense."
_LOAD_MERGED = """Without himap-train, dense:
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("this-folder")
processor = AutoProcessor.from_pretrained("this-folder")
```
Stock transformers, vLLM and SGLang load this folder as an ordinary model of its kind and run it **dense**: they have no
place for pruning inside the decoder. The schedule is in `config.json` under `himap`."""


def model_card(base: str, schedule: PruningSchedule, config: Any, run: RunFacts, merged: bool = False) -> str:
    """The card of an adapter folder or a merged model; what is not known is left out.

    Args:
        base: The model that it belongs to, or that it was.
        schedule: As it was trained.
        config: Configuration of the base model.
        run: What is known about the run.
        merged: A whole model.
    """
    front = yaml.safe_dump(_front("transformers" if merged else "peft", base, config), sort_keys=False).strip()
    how = "fine-tuned while image tokens are pruned" if not schedule.dense else "fine-tuned"
    title = f"{'' if merged else 'Adapter for '}{Path(base).name}, {how}"
    loading = [_kind(config), _LOAD_PRUNED, _LOAD_MERGED if merged else _LOAD_ADAPTER]
    sections = [
        ("", f"---\n{front}\n---\n# {title}"),
        ("Loading", "\n\n".join(loading)),
        ("Pruning schedule", f"{_schedule(schedule)}\n\n{_cost(schedule, config, run.rows)}{_elastic(run.config)}"),
        ("Scores", _scores(run.rows) + _run_dense(run.rows)),
        ("Data", _data(run.config.get("data") or {})),
        ("Training", _training(run.config)),
        ("Versions", _versions(run.versions)),
    ]
    return "\n\n".join(f"## {head}\n\n{text}" if head else text for head, text in sections if text) + "\n"


def _front(library: str, base: str, config: Any) -> dict[str, Any]:
    """What the hub reads. It refuses a card whose `base_model` is a folder on somebody's disk."""
    on_hub = base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).is_dir()
    named = {"base_model": base} if on_hub else {}
    tags = [family_of_config(config).name, "himap", "token-pruning"]
    return {"library_name": library, **named, "pipeline_tag": "image-text-to-text", "tags": tags}


def _kind(config: Any) -> str:
    """Which family the model is of, and what else its stock processor needs."""
    family = family_of_config(config)
    needs = "; `AutoProcessor` needs torchvision for it" if family.processor_class is PartsProcessor else ""
    return f"A model of family `{family.name}` (`model_type` {config.model_type}){needs}."


def _schedule(schedule: PruningSchedule) -> str:
    stages = yaml.safe_dump(schedule.to_dict(), sort_keys=False).strip()
    text = "`keep_ratio` is the fraction kept of the original image tokens."
    if schedule.by_sample:
        text += (
            " `keep: {mass: m}` keeps the fewest image tokens of each sample that hold the share m of the attention, "
            "between `at_least` and `at_most` of the original ones. With `attention_below: a` a stage acts on samples "
            "whose text gives the image less than the share a of its attention."
        )
    return f"{text}\n```yaml\n{stages}\n```"


def _cost(schedule: PruningSchedule, config: Any, measured: list[dict[str, Any]]) -> str:
    """What a prefill costs, pruned beside dense: of the mean sample that the run measured, if it did."""
    tokens, text, sample = family_of_config(config).tokens_of_config(config), TEXT_TOKENS, "One image"
    if measured and measured[-1].get("image_tokens") and measured[-1].get("text_tokens"):
        tokens, text = round(measured[-1]["image_tokens"]), round(measured[-1]["text_tokens"])
        sample = "The mean question of the scores below"
    cost = schedule.cost(config, image_tokens=tokens, text_tokens=text)
    layers = cost.image_tokens_per_layer
    starts = [layer for layer, count in enumerate(layers) if layer == 0 or count != layers[layer - 1]]
    ends = [*(start - 1 for start in starts[1:]), len(layers) - 1]
    spans = [f"layers {a}-{b}" if a < b else f"layer {a}" for a, b in zip(starts, ends, strict=True)]
    kept = ", ".join(f"{layers[start]} in {span}" for start, span in zip(starts, spans, strict=True))
    kv, dense_kv = cost.kv_bytes / 1e6, cost.kv_bytes / cost.kv_bytes_ratio / 1e6
    rows = [
        ("image tokens", kept, str(tokens)),
        ("decoder FLOPs of the prefill", f"{cost.flops:.3g}", f"{cost.dense_flops:.3g}"),
        ("ratio (`flops_ratio`)", f"{cost.flops_ratio:.3f}", "1"),
        ("KV cache after the prefill, MB", f"{kv:.3g}", f"{dense_kv:.3g}"),
        ("ratio", f"{cost.kv_bytes_ratio:.3f}", "1"),
    ]
    pruned = "pruned, at most" if cost.upper_bound else "pruned"
    return f"{sample}, {tokens} image tokens and {text} text tokens:\n\n" + _table(("", pruned, "dense"), rows)


def _elastic(config: Mapping[str, Any]) -> str:
    """At which budgets the model runs."""
    elastic = (config.get("pruning") or {}).get("elastic")
    if not elastic:
        return ""
    low, high = elastic["budgets"]
    dense = " and dense" if elastic["dense_share"] else ""
    return (
        f"\n\nTrained at every budget (`flops_ratio`) from {low} to {high}{dense}: the same layers with other ratios, "
        "`python recipes/evaluate.py --budget 0.5`, or `schedule.at_budget(model.config, 0.5)`."
    )


def _scores(rows: list[dict[str, Any]]) -> str:
    """The run's own table, in short."""
    lines = []
    for row in rows:
        overall, cost = row["overall"], _measured_ratio(row)
        lines.append((row["name"], _percent(overall), str(overall["count"]), cost))
    metric = rows[0]["metric"] if rows else ""
    return _table(("", f"{metric}, %", "samples", "flops_ratio"), lines) if rows else ""


def _percent(overall: Mapping[str, Any]) -> str:
    """A score and its standard error; either may be unknown."""
    score, error = (overall.get(key) for key in ("score", "standard_error"))
    return "-" if score is None else f"{100 * score:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _run_dense(rows: list[dict[str, Any]]) -> str:
    """What the weights lose or gain in engines that do not prune, where the run measured it."""
    measured = {row["name"]: row["overall"].get("score") for row in rows}
    pruned, dense = measured.get(ADAPTED), measured.get(RUN_DENSE)
    if pruned is None or dense is None:
        return ""
    change = f"{'gains' if dense >= pruned else 'loses'} {100 * abs(dense - pruned):.1f} points"
    scores = f"{100 * dense:.1f} % for {100 * pruned:.1f} %"
    return f"\n\nRun dense, as engines without pruning do, this model {change}: {scores}."


def _measured_ratio(row: Mapping[str, Any]) -> str:
    """`flops_ratio` over the samples; runs of earlier versions have that of a sample of mean length alone."""
    measured, cost = row.get("flops_ratio"), row.get("cost")
    if measured is None:
        return f"{cost['flops_ratio']:.3f}" if cost else "-"
    return f"{measured['mean']:.3f}" + (f" ± {measured['sd']:.3f}" if cost and cost.get("upper_bound") else "")


def _data(data: Mapping[str, Any]) -> str:
    named = [(name, data.get(name)) for name in ("train", "validation", "test", "train_limit")]
    return _table(("", ""), [(name, f"`{value}`") for name, value in named if value is not None])


def _training(config: Mapping[str, Any]) -> str:
    values = [
        (f"{group}.{key}", f"`{config[group][key]}`")
        for group, keys in _SETTINGS
        for key in keys
        if (config.get(group) or {}).get(key) is not None
    ]
    seed = config.get("seed_everything")
    table = _table(("", ""), [*values, *([("seed_everything", f"`{seed}`")] if seed is not None else [])])
    quantized = (config.get("model") or {}).get("quantize")
    note = "\n\nTrained over quantised weights (QLoRA); scores above are with those, merging is into the original ones."
    return table + (note if quantized else "")


def _versions(versions: Mapping[str, str]) -> str:
    trained = ", ".join(f"{name} {value}" for name, value in versions.items())
    return f"Exported with himap-train {__version__}." + (f" Trained with {trained}." if trained else "")


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """GitHub Markdown; nothing for no rows."""
    lines = [header, tuple(":--" for _ in header), *rows] if rows else []
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
