"""The KV cache of a pruned prefill: its lengths, beams, reordered batches."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
import torch
from cases import RAGGED, Case, make_case
from decoding import LOGITS, SCORES, STEPS, himap, naive_decode, next_positions, prompt_positions, random_tokens
from naive import naive_forward, naive_logits
from packaging.version import Version
from tiny import tiny_llava
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration

from himap_train import PruningSchedule, PruningStage, install_pruning, record_pruning

pytestmark = pytest.mark.core


def cache_lengths(cache: Any) -> list[int]:
    return [layer.keys.shape[-2] for layer in cache.layers]


def test_cache_lengths_are_those_of_the_schedule() -> None:
    model = install_pruning(tiny_llava(), himap())
    case = make_case(model, ["t3 i16 t4"])
    with torch.no_grad():
        cache = model(**case.inputs(), use_cache=True).past_key_values
    assert cache_lengths(cache) == [23, 23, 15, 15, 9, 9]
    assert cache.get_seq_length() == 23
    made = model.generate(**case.inputs(), max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True)
    assert cache_lengths(made.past_key_values) == [n + STEPS - 1 for n in (23, 23, 15, 15, 9, 9)]


def test_cache_of_a_ragged_batch_is_as_long_as_its_longest_row() -> None:
    model = install_pruning(tiny_llava(), himap())
    case = make_case(model, RAGGED, "left")
    with torch.no_grad(), record_pruning(model) as trace:
        cache = model(**case.inputs(), use_cache=True).past_key_values
    longest = [max(len(row) for row in stage) for stage in trace.kept]
    assert cache_lengths(cache) == [35, 35, longest[0], longest[0], longest[1], longest[1]]
    assert longest == [10 + 13, 10 + 3]


def naive_sequence_scores(
    model: LlavaForConditionalGeneration, plan: PruningSchedule, case: Case, row: int, made: Tensor
) -> Tensor:
    """Mean log-probability (N,) of continuations `made` (N, steps) of one row."""
    columns = case.columns(row)
    has_image = (case.input_ids == 4).any(dim=1)
    features = case.features[int(has_image[:row].sum()) : int(has_image[: row + 1].sum())] * len(made)
    ids = torch.cat([case.input_ids[row, columns].expand(len(made), -1), made], dim=1)
    with torch.no_grad():
        out = naive_forward(model, plan, ids, torch.ones_like(ids), features, prompt=len(columns))
        logp = naive_logits(model, out.hidden[:, len(columns) - 1 : -1]).log_softmax(dim=-1)
    return logp.gather(2, made[..., None])[..., 0].mean(dim=1)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_beams_with_left_padding_equal_the_oracle_and_the_row_alone(positions: str) -> None:
    model, plan, beams = install_pruning(tiny_llava(), himap(positions)), himap(positions), 3
    rows = ("t3 i16 t4", "t9", "i7 t1", "t5 i12")  # one image a row: stock beams mix up more
    case = make_case(model, rows, "left")
    options = {
        "max_new_tokens": STEPS, "num_beams": beams, "num_return_sequences": beams, "do_sample": False,
        "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    made = model.generate(**case.inputs(), **options)
    sequences = made.sequences[:, case.input_ids.shape[1] :].reshape(len(rows), beams, STEPS)
    scores = made.sequences_scores.reshape(len(rows), beams)
    for row, spec in enumerate(rows):
        expected = naive_sequence_scores(model, plan, case, row, sequences[row])
        torch.testing.assert_close(scores[row], expected, **SCORES)
        alone_case = make_case(model, [spec], seed=row)
        alone = model.generate(**alone_case.inputs(), **options)
        assert torch.equal(alone.sequences[:, alone_case.input_ids.shape[1] :], sequences[row])


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("change", ["reorder", "repeat", "select"])
def test_decoding_goes_on_after_the_batch_was_reordered(change: str, positions: str) -> None:
    model, plan = tiny_llava(), himap(positions)
    case, tokens = make_case(model, RAGGED, "left"), random_tokens(len(RAGGED))
    expected = naive_decode(model, plan, case, tokens)
    install_pruning(model, plan)
    with torch.no_grad():
        numbers = prompt_positions(case.attention_mask)
        cache = model(**case.inputs(), position_ids=numbers, use_cache=True).past_key_values
        if change == "reorder":
            order = torch.tensor([3, 1, 1, 4, 0])
            cache.reorder_cache(order)
        elif change == "repeat":
            order = torch.arange(len(RAGGED)).repeat_interleave(2)
            cache.batch_repeat_interleave(2)
        else:
            order = torch.tensor([4, 2])
            cache.batch_select_indices(order)
        mask = case.attention_mask[order]
        for step in range(STEPS):
            part = tokens[order, step : step + 1]
            mask = torch.cat([mask, torch.ones_like(part)], dim=1)
            out = model(
                input_ids=part,
                attention_mask=mask,
                position_ids=next_positions(mask),
                past_key_values=cache,
                use_cache=True,
            )
            torch.testing.assert_close(out.logits[:, -1], expected[order, step + 1], **LOGITS)


def test_two_generations_in_between_do_not_disturb_each_other() -> None:
    """What decoding remembers lives on the cache: two caches of one model may be used in turn."""
    model, plan = tiny_llava(), himap()
    cases = [make_case(model, RAGGED, "left"), make_case(model, ("i30 t4", "t2 i5 t1"), "left", seed=7)]
    tokens = [random_tokens(len(case.input_ids)) for case in cases]
    expected = [naive_decode(model, plan, case, part) for case, part in zip(cases, tokens, strict=True)]
    install_pruning(model, plan)
    with torch.no_grad():
        masks = [case.attention_mask for case in cases]
        numbers = [prompt_positions(mask) for mask in masks]
        caches = [
            model(**case.inputs(), position_ids=number, use_cache=True).past_key_values
            for case, number in zip(cases, numbers, strict=True)
        ]
        for step in range(3):
            for i, cache in enumerate(caches):
                part = tokens[i][:, step : step + 1]
                masks[i] = torch.cat([masks[i], torch.ones_like(part)], dim=1)
                positions = next_positions(masks[i])
                out = model(input_ids=part, attention_mask=masks[i], position_ids=positions, past_key_values=cache)
                torch.testing.assert_close(out.logits[:, -1], expected[i][:, step + 1], **LOGITS)


@pytest.mark.parametrize("plan", [himap(), PruningSchedule((PruningStage(0, "first-k", 0.5),))], ids=str)
def test_a_window_that_nothing_leaves_changes_nothing(plan: PruningSchedule) -> None:
    """Mistral's caches have layers that slide, of which a stage makes one that does not."""
    model = install_pruning(tiny_llava("mistral"), plan)
    case, options = make_case(model, RAGGED, "left"), {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    found = model.generate(**case.inputs(), **options)[:, -3:]
    for row, spec in enumerate(RAGGED):
        alone = make_case(model, [spec], seed=row).inputs()
        assert torch.equal(model.generate(**alone, **options)[0, -3:], found[row])


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_a_cache_that_was_reset_serves_another_schedule(positions: str) -> None:
    model, first = tiny_llava(), himap(positions=positions)
    case = make_case(model, RAGGED, "left")

    def decoded(cache: DynamicCache) -> Tensor:
        with torch.no_grad():
            model(**case.inputs(), past_key_values=cache, use_cache=True)
            mask = torch.nn.functional.pad(case.attention_mask, (0, 1), value=1)
            return model(input_ids=torch.full((len(mask), 1), 9), attention_mask=mask, past_key_values=cache).logits

    used = DynamicCache(config=model.config.text_config)
    install_pruning(model, first)
    decoded(used)
    used.reset()
    install_pruning(model, PruningSchedule((PruningStage(3, "instruction", 0.5),)))
    assert torch.equal(decoded(used), decoded(DynamicCache(config=model.config.text_config)))


def test_a_static_cache_is_refused_by_name() -> None:
    model = install_pruning(tiny_llava(), himap())
    inputs = make_case(model, RAGGED, "left").inputs()
    with pytest.raises(ValueError, match="cache"):
        model.generate(**inputs, max_new_tokens=2, do_sample=False, cache_implementation="static")


def test_generating_while_checkpointing_is_right_or_says_what_to_do() -> None:
    """Stock layers dropped the cache then up to 5.23, and stock generate made nonsense of it without a word."""
    model = install_pruning(tiny_llava(), himap())
    call = {**make_case(model, RAGGED, "left").inputs(), "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**call)
    model.train().gradient_checkpointing_enable()
    if Version(version("transformers")) >= Version("5.24"):
        assert torch.equal(model.generate(**call), expected)
    else:
        with pytest.raises(ValueError, match="eval"):
            model.generate(**call)


def test_an_image_behind_a_filled_cache_is_refused() -> None:
    model = install_pruning(tiny_llava(), himap())
    with torch.no_grad():
        cache = model(**make_case(model, ["t3 i16 t4"]).inputs(), use_cache=True).past_key_values
        more = make_case(model, ["t2 i16 t3"]).inputs() | {"attention_mask": torch.ones(1, 44, dtype=torch.long)}
        with pytest.raises(ValueError, match="chosen once"):
            model(**more, past_key_values=cache)


def test_looking_up_the_prompt_gives_the_greedy_answer() -> None:
    """Assisted decoding feeds several tokens and takes some back from the cache."""
    model = install_pruning(tiny_llava(), himap())
    case, options = make_case(model, ["t3 i16 t4"]), {"max_new_tokens": 8, "do_sample": False}
    greedy = model.generate(**case.inputs(), **options)
    assert torch.equal(model.generate(**case.inputs(), **options, prompt_lookup_num_tokens=3), greedy)
