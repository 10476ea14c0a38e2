"""What the benchmark is made of: pairs, peers that compute what they stand for, bounds and shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cost_toys import LLAVA_7B
from torch import Tensor

from himap_train import PruningSchedule, PruningStage, install_pruning, record_pruning, remove_pruning
from himap_train.benchmark import contenders as methods_module
from himap_train.benchmark import timing
from himap_train.benchmark.bench import Settings, decode_ratio, step_flops, weight_bytes
from himap_train.benchmark.contenders import METHODS, find_method, without_choice
from himap_train.benchmark.measurements import AXES, planned
from himap_train.benchmark.peers import (
    fastv_attention_maps,
    masking,
    peer_decoder,
    pyramiddrop_ranking,
)
from himap_train.benchmark.sizes import SIZES, build_model, find_size, model_config
from himap_train.benchmark.tasks import cache_bytes, inference_task
from himap_train.benchmark.timing import Pairs, Spread, Task, time_once, time_pairs
from himap_train.benchmark.workload import Workload, make_batch
from himap_train.models.attention import register_attention
from himap_train.models.features import hidden_states
from himap_train.pruning.presets import PRESETS

CPU = torch.device("cpu")
SMALL = Workload(batch=2, image_tokens=40, text_before=5, text_after=12)


def test_pairs_alternate_and_only_the_run_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def task(name: str, seconds: float) -> Task:
        def work(amount: float, label: str | None = None) -> None:
            clock[0] += amount * (1 + len(calls))  # later runs are slower
            calls.extend([label] if label else [])

        return Task(run=lambda: work(seconds, name), prepare=lambda: work(100.0), parts=4)

    pairs = time_pairs(task("dense", 4.0), task("pruned", 8.0), rounds=3, device=CPU)
    assert calls == ["dense", "pruned", "dense", "pruned", "pruned", "dense", "dense", "pruned"]
    assert (pairs.first, pairs.second) == ([3.0, 6.0, 7.0], [8.0, 10.0, 16.0])
    assert pairs.ratio.median == pytest.approx(16 / 7)


def test_what_choosing_takes_is_against_the_same_counts_of_the_first_tokens() -> None:
    himap, first = (find_method(name, 8) for name in ("himap", "first-k"))
    other = without_choice(himap)
    assert other is not None and [stage.criterion for stage in other.schedule.stages] == ["first-k"] * 2
    places = [[(stage.layer, stage.keep) for stage in method.schedule.stages] for method in (himap, other)]
    assert places[0] == places[1] and other.name == "himap"
    assert without_choice(first) is without_choice(find_method("masking", 8)) is without_choice(find_method("dense", 8))
    assert Spread(1.25, 1.0, 2.0).share() == Spread(pytest.approx(0.2), 0.0, 0.5)


def test_a_task_runs_inside_its_context() -> None:
    with torch.enable_grad():
        seen: list[bool] = []
        time_once(Task(lambda: seen.append(torch.is_grad_enabled()), torch.no_grad), CPU)
        assert seen == [False] and torch.is_grad_enabled()


@pytest.mark.parametrize(("measure", "prepared", "ran"), [("prefill", 0, 1), ("decode", 1, 16), ("generate", 0, 64)])
def test_inference_tasks_run_as_many_passes_as_they_say(measure: str, prepared: int, ran: int) -> None:
    model = build_model(find_size("tiny"))
    passes: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    task = inference_task(measure, model, find_method("himap", 4), make_batch(model, SMALL))
    with task.within():
        task.prepare()
        assert len(passes) == prepared
        task.run()
    assert len(passes) == prepared + ran and task.parts == (ran if measure == "decode" else 1)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_spread_is_median_and_quartiles(count: int) -> None:
    values = [float(value) ** 2 for value in range(count)]
    low, median, high = np.percentile(values, [25, 50, 75])
    assert Spread.of(values) == Spread(pytest.approx(median), pytest.approx(low), pytest.approx(high))
    assert Pairs([2.0] * count, values).ratio.median == pytest.approx(median / 2)


def states_of(model: Any, batch: Any, labels: bool) -> Tensor:
    given = {"input_ids": batch.input_ids, "labels": batch.labels if labels else None}
    with torch.no_grad():
        return hidden_states(model, **given, **batch.images())


def peer_states(model: Any, batch: Any, labels: bool, peer: Any, schedule: PruningSchedule, attention: str) -> Tensor:
    masks = {"image_token_mask": batch.input_ids == model.config.image_token_id}
    masks["supervised_mask"] = batch.labels != -100 if labels else None
    with torch.no_grad(), peer_decoder(model, peer, schedule, attention):
        return model.model(input_ids=batch.input_ids, **batch.images(), **masks).last_hidden_state


@pytest.mark.parametrize("labels", [False, True], ids=["prompt", "training"])
@pytest.mark.parametrize("name", ["masking", "fastv-attention-maps"])
def test_a_peer_computes_what_its_preset_does_here(name: str, labels: bool) -> None:
    """Two ways to the same numbers: hidden or removed, by attention maps or by a few rows."""
    model = build_model(find_size("tiny"))
    batch = make_batch(model, SMALL)
    method = find_method(name, 4)
    peer, attention = {
        "masking": (masking, register_attention("sdpa")),
        "fastv-attention-maps": (fastv_attention_maps, "eager"),
    }[name]
    found = peer_states(model, batch, labels, peer, method.schedule, attention)
    expected = states_of(install_pruning(model, method.schedule), batch, labels)
    kept = expected.abs().sum(-1) > 0
    assert 0 < int(kept.sum()) < kept.numel()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_pyramiddrops_ranking_removes_what_its_schedule_says_and_counts_positions_anew() -> None:
    model = build_model(find_size("tiny"))
    batch = make_batch(model, SMALL)
    everything = PruningSchedule((PruningStage(2, "last_token", 1.0),), positions="renumber")
    assert torch.equal(
        peer_states(model, batch, True, pyramiddrop_ranking, everything, "sdpa"),
        states_of(remove_pruning(model), batch, True),
    )
    found = peer_states(model, batch, True, pyramiddrop_ranking, find_method("pyramiddrop", 4).schedule, "sdpa")
    image = batch.input_ids == model.config.image_token_id
    kept = found.abs().sum(-1) > 0
    assert kept[~image].all() and (kept & image).sum(1).tolist() == [40 // 8] * 2


def test_peers_and_methods_leave_the_model_as_it_was() -> None:
    model = build_model(find_size("tiny"))
    batch = make_batch(model, SMALL)
    before = states_of(model, batch, False)
    for name in METHODS:
        with find_method(name, 4).active(model):
            pass
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert torch.equal(states_of(model, batch, False), before)


def test_every_preset_and_peer_can_be_measured_by_name() -> None:
    assert {*PRESETS, *methods_module._PEERS} - set(METHODS) == {"none"}
    with pytest.raises(ValueError, match="did you mean 'himap'"):
        find_method("himpa", 12)


def test_bounds_are_those_of_the_cost_model() -> None:
    schedule, config = PruningSchedule.from_preset("himap"), LLAVA_7B
    cost = schedule.cost(config)
    flops = [
        step_flops("prefill", kind, config, Workload(), lora_parameters=[0] * 32)
        for kind in (PruningSchedule(), schedule)
    ]
    assert flops[1] / flops[0] == pytest.approx(cost.flops_ratio)
    # A cache of as many bytes as there are weights: half of the traffic shrinks.
    dense = PruningSchedule().cost(config).kv_bytes
    ratio = decode_ratio(schedule, config, Workload(), weights=dense, bytes_per_value=2)
    assert ratio == pytest.approx((1 + cost.kv_bytes_ratio) / 2)


@pytest.mark.parametrize(
    ("measure", "attention", "products"),
    [("prefill", "sdpa", 2), ("training_step", "sdpa", 7), ("training_step", "eager", 6)],
)
def test_a_causal_bound_leaves_out_what_is_hidden(measure: str, attention: str, products: int) -> None:
    """Pair by pair of query and key, for one layer after the other: products of scores and values, of which a flash
    kernel's backward has five, and eager attention's four.
    """
    config, workload = LLAVA_7B, Workload(image_tokens=20, text_before=3, text_after=6)
    text = config.text_config
    schedule = PruningSchedule((PruningStage(2, "stride", 0.5), PruningStage(20, "stride", 0.1)))
    full, causal = (
        step_flops(measure, schedule, config, workload, lora_parameters=[0] * 32, causal=causal, attention=attention)
        for causal in (False, True)
    )
    pairs = 0
    for tokens in [29] * 2 + [19] * 18 + [11] * 12:
        pairs += sum(1 for query in range(tokens) for key in range(tokens) if key > query)
    assert full - causal == pytest.approx(products * 2 * pairs * text.hidden_size)


def test_cache_and_weights_are_counted_in_bytes() -> None:
    model = build_model(find_size("tiny"), dtype=torch.bfloat16)
    batch = make_batch(model, SMALL)
    with torch.no_grad():
        cache = model(input_ids=batch.input_ids, **batch.images(), use_cache=True).past_key_values
    assert cache_bytes(cache) == 4 * 2 * 2 * 57 * 64 * 2  # layers, keys and values, rows, tokens, width, bytes
    layer = 4 * 64 * 64 + 3 * 64 * 172 + 2 * 64
    assert weight_bytes(model) == 2 * (4 * layer + 264 * 64)


def test_shapes_have_llavas_proportions() -> None:
    seven = SIZES["llava-1.5-7b"]
    for name in ("laptop", "100m"):
        size = SIZES[name]
        assert size.mlp / size.width == pytest.approx(seven.mlp / seven.width)
        assert size.lora_rank / size.width == seven.lora_rank / seven.width
        assert size.tower_width / size.width == seven.tower_width / seven.width
    with torch.device("meta"):
        count = sum(p.numel() for p in build_model(SIZES["100m"], device="meta").parameters())
    assert count == pytest.approx(1e8, rel=0.1)
    text: Any = model_config(seven).text_config
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (4096, 11008, 32)


def test_series_change_one_thing() -> None:
    settings, workload = Settings(find_size("laptop")), Workload()
    found = {axis: planned(settings, workload, ["himap"], ["prefill"], axis) for axis in AXES}
    assert [point.workload.image_tokens for point in found["image_tokens"]] == [144, 288, 576, 1152, 2880]
    assert [point.settings.size.layers for point in found["depth"]] == [6, 12, 24]
    assert all(point.workload.text_tokens == point.value for point in found["text_tokens"])
    assert all(point.workload.batch == point.value and point.settings == settings for point in found["batch"])
    assert all(point.workload.mixed and point.workload.batch == 4 for point in found["dynamic_resolution"])
    with pytest.raises(ValueError, match="did you mean 'depth'"):
        planned(settings, workload, ["himap"], ["prefill"], "dept")


def test_mixed_samples_have_their_own_tokens_and_padding_before_them() -> None:
    workload, model = Workload(6, 50, 5, 12, mixed=True), build_model(find_size("tiny"))
    counts = [50, 40, 30, 20, 10, 50]
    assert [sample.image_tokens for sample in workload.samples] == counts and workload.tokens == sum(counts) + 6 * 17
    batch = make_batch(model, workload)
    mask = batch.given["attention_mask"]
    assert mask.sum(1).tolist() == [count + 17 for count in counts] and bool(mask[:, -1].all())
    image = batch.input_ids == model.config.image_token_id
    assert image.sum(1).tolist() == counts and not (image & ~mask.bool()).any()
    alone = make_batch(model, Workload(1, 30, 5, 12))
    row = batch.input_ids[2:3, mask[2].bool()]
    method = find_method("himap", 4)
    with torch.no_grad(), method.active(model):
        given = {"labels": batch.labels, "input_ids": batch.input_ids}
        mixed = hidden_states(model, **given, **batch.for_states())[2, mask[2].bool()]
        encoded = {"mm_encoder_outputs": {"image": replace_features(alone, batch.features[2])}}
        single = hidden_states(model, input_ids=row, labels=batch.labels[2:3, mask[2].bool()], **encoded)[0]
    torch.testing.assert_close(mixed, single, atol=1e-4, rtol=1e-4)


def replace_features(batch: Any, features: Tensor) -> Any:
    encoded = batch.images()["mm_encoder_outputs"]["image"]
    encoded.pooler_output = [features]
    return encoded


def test_bounds_of_mixed_samples_are_those_of_each() -> None:
    schedule, mixed = PruningSchedule.from_preset("himap"), Workload(2, 50, 5, 12, mixed=True)
    bytes_of = [schedule.cost(LLAVA_7B, image_tokens=count, text_tokens=17).kv_bytes for count in (50, 40)]
    dense = [PruningSchedule().cost(LLAVA_7B, image_tokens=count, text_tokens=17).kv_bytes for count in (50, 40)]
    assert decode_ratio(schedule, LLAVA_7B, mixed, 10**6, 2) == (10**6 + sum(bytes_of)) / (10**6 + sum(dense))


def test_dense_has_what_pruned_rows_have_and_removes_nothing() -> None:
    model = build_model(find_size("tiny"))
    batch = make_batch(model, SMALL)
    stock = states_of(model, batch, False)
    with find_method("dense", 4).active(model), record_pruning(model) as trace:
        found = states_of(model, batch, False)
    assert [len(row) for stage in trace.kept for row in stage] == [57, 57]
    torch.testing.assert_close(found, stock)
    with find_method("stock", 4).active(model):
        assert torch.equal(states_of(model, batch, False), stock)


@pytest.mark.parametrize("change", [{"batch": 0}, {"image_tokens": 0}, {"text_after": 1}, {"text_before": 0}])
def test_impossible_shapes_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="cannot be run"):
        Workload(**change)
