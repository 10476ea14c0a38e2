"""Cached decoding against the naive masked decoder, which runs the whole sequence again for every token."""

from __future__ import annotations

import pytest
import torch
from cases import RAGGED, make_case
from decoding import LOGITS, STEPS, decode, himap, naive_decode, random_tokens
from naive import naive_generate
from tiny import tiny_llava

from himap_train import install_pruning, record_pruning

pytestmark = pytest.mark.core


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
    with torch.no_grad():
        uncached = model(**case.inputs()).logits[:, -1].argmax(dim=-1)
    assert torch.equal(uncached, expected[:, 0])


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
