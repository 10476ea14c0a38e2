"""Cached decoding against the naive masked decoder, which runs the whole sequence again for every token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import RAGGED, Case, make_case
from naive import naive_forward, naive_generate, naive_logits
from tiny import tiny_llava
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from himap_train import PruningSchedule, PruningStage, install_pruning, record_pruning

LOGITS = {"atol": 1e-3, "rtol": 1e-4}  # fp32; logits of this model are of the order of 10
SCORES = {"atol": 1e-4, "rtol": 1e-4}
STEPS = 5


def himap(positions: str = "keep", first: str = "instruction", second: str = "image") -> PruningSchedule:
    stages = (
        PruningStage(layer=2, criterion=first, keep_ratio=0.5),
        PruningStage(layer=4, criterion=second, keep_ratio=0.125),
    )
    return PruningSchedule(stages=stages, positions=positions)


def next_positions(mask: Tensor) -> Tensor:
    return mask.sum(dim=1, keepdim=True) - 1


def prompt_positions(mask: Tensor) -> Tensor:
    """As `generate` numbers a padded prompt; without them the model counts the padding too."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def decode(
    model: LlavaForConditionalGeneration, case: Case, tokens: Tensor, chunk: int, give_positions: bool
) -> tuple[Tensor, Any]:
    """Prefill, then `tokens` (B, N) in chunks, with the cache -> logits (B, N + 1, V) from the last prompt row on."""
    inputs, mask = case.inputs(), case.attention_mask
    if give_positions:
        inputs["position_ids"] = prompt_positions(mask)
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        logits = [out.logits[:, -1:]]
        for start in range(0, tokens.shape[1], chunk):
            part = tokens[:, start : start + chunk]
            mask = torch.cat([mask, torch.ones_like(part)], dim=1)
            positions = (mask.cumsum(dim=1) - 1)[:, -part.shape[1] :]
            extra = {"position_ids": positions} if give_positions else {}
            cache = out.past_key_values
            out = model(input_ids=part, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
            logits.append(out.logits)
    return torch.cat(logits, dim=1), out.past_key_values


def naive_decode(model: LlavaForConditionalGeneration, plan: PruningSchedule, case: Case, tokens: Tensor) -> Tensor:
    """The same logits from one pass of the oracle."""
    prompt = case.input_ids.shape[1]
    ids, mask = (
        torch.cat([case.input_ids, tokens], dim=1),
        torch.cat([case.attention_mask, torch.ones_like(tokens)], dim=1),
    )
    with torch.no_grad():
        out = naive_forward(model, plan, ids, mask, case.features, prompt=prompt)
    return naive_logits(model, out.hidden[:, prompt - 1 :])


def random_tokens(rows: int, length: int = STEPS) -> Tensor:
    return torch.randint(5, 264, (rows, length), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("give_positions", [True, False], ids=["position_ids", "no-position_ids"])
@pytest.mark.parametrize(
    ("text", "attn"), [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa"), ("qwen2", "sdpa")]
)
def test_token_by_token_equals_the_oracle(text: str, attn: str, give_positions: bool, positions: str) -> None:
    model, plan = tiny_llava(text, attn=attn), himap(positions)
    case, tokens = make_case(model, RAGGED, "left"), random_tokens(len(RAGGED))
    expected = naive_decode(model, plan, case, tokens)
    found, _ = decode(install_pruning(model, plan), case, tokens, 1, give_positions)
    torch.testing.assert_close(found, expected, **LOGITS)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_several_tokens_at_once_equal_the_oracle(positions: str) -> None:
    model, plan = tiny_llava(), himap(positions)
    case, tokens = make_case(model, RAGGED, "left"), random_tokens(len(RAGGED), 6)
    expected = naive_decode(model, plan, case, tokens)
    found, _ = decode(install_pruning(model, plan), case, tokens, 3, give_positions=True)
    torch.testing.assert_close(found, expected, **LOGITS)


@pytest.mark.parametrize(
    "rows", [("t3 i16 t4",), ("t2 i16",), RAGGED, ("t5", "t9")], ids=["one", "image-last", "ragged", "text"]
)
@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_greedy_generate_equals_the_oracle(rows: tuple[str, ...], positions: str) -> None:
    model, plan = tiny_llava(), himap(positions, "last_token", "image_debiased")
    case = make_case(model, rows, "left")
    expected = naive_generate(model, plan, case.naive(), STEPS)
    install_pruning(model, plan)
    made = model.generate(**case.inputs(), max_new_tokens=STEPS, do_sample=False)
    assert torch.equal(made[:, case.input_ids.shape[1] :], expected)
    uncached = [model(**case.inputs()).logits[:, -1].argmax(dim=-1)]
    assert torch.equal(uncached[0], expected[:, 0])


def test_generate_from_pixels_equals_the_oracle() -> None:
    model, plan = tiny_llava("qwen2"), himap()
    case = make_case(model, ("t3 i16 t4", "t9", "t2 i16 t2 i16 t5"), "left")
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        case.features = list(model.get_image_features(pixels).pooler_output)
    expected = naive_generate(model, plan, case.naive(), STEPS)
    inputs = {"input_ids": case.input_ids, "attention_mask": case.attention_mask, "pixel_values": pixels}
    made = install_pruning(model, plan).generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    assert torch.equal(made[:, case.input_ids.shape[1] :], expected)


def test_tokens_are_chosen_once_in_the_prefill() -> None:
    model = install_pruning(tiny_llava(), himap())
    case = make_case(model, RAGGED, "left")
    with torch.no_grad(), record_pruning(model) as prefill:
        model(**case.inputs())
    with record_pruning(model) as whole:
        model.generate(**case.inputs(), max_new_tokens=STEPS, do_sample=False)
    assert [[row.tolist() for row in stage] for stage in whole.kept] == [
        [row.tolist() for row in s] for s in prefill.kept
    ]


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


def test_sampling_and_stopping_work_as_in_stock() -> None:
    model = install_pruning(tiny_llava(), himap())
    case = make_case(model, RAGGED, "left")
    torch.manual_seed(0)
    first = model.generate(**case.inputs(), max_new_tokens=STEPS, do_sample=True, num_return_sequences=2)
    torch.manual_seed(0)
    second = model.generate(**case.inputs(), max_new_tokens=STEPS, do_sample=True, num_return_sequences=2)
    assert first.shape == (10, 35 + STEPS) and torch.equal(first, second)
    greedy = model.generate(**case.inputs(), max_new_tokens=STEPS, do_sample=False)[:, 35:]
    stop = int(greedy[1, 1])
    stopped = model.generate(**case.inputs(), max_new_tokens=STEPS, do_sample=False, eos_token_id=stop)[1, 35:]
    end = greedy[1].tolist().index(stop) + 1
    assert stopped[:end].tolist() == greedy[1, :end].tolist() and not stopped[end:].any()
