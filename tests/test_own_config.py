"""A pruned model's config is its own: models that share the object, and whoever asks or saves it, see the stock one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import make_case
from tiny import tiny_llava
from torch import Tensor
from transformers import Cache, LlavaForConditionalGeneration
from transformers.cache_utils import QuantizedLayer
from transformers.utils import output_capturing

from himap_train import PruningSchedule, PruningStage, install_pruning, remove_pruning
from himap_train.models import attention
from himap_train.models.install import pruning_of

pytestmark = pytest.mark.core

SCHEDULE = PruningSchedule((PruningStage(2, "instruction", 0.5), PruningStage(4, "image", 0.125)))
ROWS = ("t3 i16 t4", "t9", "t2 i9 t3 i16 t5")


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


def logits(model: Any, **more: Any) -> Tensor:
    out: Tensor = model(**make_case(model, ROWS, "left").inputs(), **more).logits
    return out


def kept(model: Any) -> list[int]:
    logits(model)
    pruning = pruning_of(model)
    assert pruning is not None and pruning.last is not None
    return pruning.last.kept


# ---- sharing ----


@pytest.mark.parametrize("config_of", [lambda model: model.config, lambda model: copy.deepcopy(model.config)])
def test_model_of_the_same_config_stays_stock_and_can_be_pruned(config_of: Callable[[Any], Any]) -> None:
    pruned = install_pruning(tiny_llava(), SCHEDULE)
    other = LlavaForConditionalGeneration(config_of(pruned)).eval()
    assert other.model.language_model.config._attn_implementation == "sdpa"
    other.load_state_dict(pruned.state_dict())
    assert torch.equal(logits(other), logits(tiny_llava()))
    expected = logits(pruned)
    assert torch.equal(logits(install_pruning(other, SCHEDULE)), expected)
    remove_pruning(pruned)
    assert torch.equal(logits(other), expected) and torch.equal(logits(pruned), logits(tiny_llava()))


def test_saved_and_shown_config_is_stock(tmp_path: Path) -> None:
    model = install_pruning(tiny_llava(), SCHEDULE)
    assert model.config.text_config._attn_implementation == "sdpa"
    assert "himap" not in json.dumps(model.config.to_dict(), default=str) + repr(model.config)
    model.save_pretrained(tmp_path)
    assert "himap" not in (tmp_path / "config.json").read_text()
    read = LlavaForConditionalGeneration.from_pretrained(tmp_path, config=model.config)
    assert torch.equal(logits(install_pruning(read, SCHEDULE)), logits(model))


@pytest.mark.parametrize("schedule", [SCHEDULE, PruningSchedule()], ids=["himap", "empty"])
@pytest.mark.parametrize("copied", [False, True])
def test_attention_can_be_changed_and_is_given_back(schedule: PruningSchedule, copied: bool) -> None:
    model = install_pruning(tiny_llava(), schedule)
    model = copy.deepcopy(model) if copied else model
    expected = logits(install_pruning(tiny_llava(attn="eager"), schedule))
    model.set_attn_implementation("eager")
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(install_pruning(model, schedule)), expected)
    decoder = remove_pruning(model).model.language_model
    assert decoder.config._attn_implementation == "eager"
    assert torch.equal(logits(model), logits(tiny_llava(attn="eager")))
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model), logits(tiny_llava()))


def test_attention_that_cannot_be_pruned_is_refused_when_it_runs() -> None:
    model = install_pruning(tiny_llava(), SCHEDULE)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="'flex_attention' cannot be pruned"):
        logits(model)


def test_changes_of_the_config_reach_the_decoder() -> None:
    model = install_pruning(tiny_llava(), SCHEDULE)
    full = kept(model)
    model.config.text_config.num_hidden_layers = 3  # as early exits do
    assert kept(model) == full[:1]


# ---- options of the config ----


def test_attention_maps_asked_for_in_the_config_are_refused() -> None:
    model = tiny_llava(attn="eager")
    model.config.text_config.output_attentions = True
    expected = model(**make_case(model, ROWS, "left").inputs()).attentions
    empty = install_pruning(model, PruningSchedule())(**make_case(model, ROWS, "left").inputs()).attentions
    assert all(torch.equal(*pair) for pair in zip(empty, expected, strict=True))
    with pytest.raises(ValueError, match="output_attentions is not available.*config asks for it"):
        logits(install_pruning(model, SCHEDULE))


@pytest.mark.skipif(
    not hasattr(output_capturing, "select_hidden_states"), reason="before 5.23 the stock decoder counted otherwise"
)
@pytest.mark.parametrize("where", ["call", "config"])
def test_hidden_states_can_be_chosen(where: str) -> None:
    stock, model = tiny_llava(), install_pruning(tiny_llava(), SCHEDULE)
    found = []
    for asked in (True, [0, 2], [-1]):
        for each in (stock, model):
            options = {"output_hidden_states": asked} if where == "call" else {}
            each.config.text_config.output_hidden_states = asked if where == "config" else False
            found.append(each(**make_case(each, ROWS, "left").inputs(), **options).hidden_states)
        expected, states = found[-2:]
        assert [state is None for state in states] == [state is None for state in expected]
        assert torch.equal(states[0], expected[0]) if expected[0] is not None else True


# ---- what the attention function is given ----


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_more_arguments_by_place_are_those_of_the_stock_function(name: str) -> None:
    stock, module = attention._STOCK[name][0], tiny_llava().model.language_model.layers[0].self_attn
    ours = attention.AttentionInterface()[attention.register_attention(name)]
    query, key, value = torch.randn(3, 1, 4, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    key, value = key[:, :2], value[:, :2]
    more = (0.0, 0.3) if name == "sdpa" else (0.3, 0.0)  # dropout and scaling stand in other places
    expected = stock(module, query, key, value, None, *more)[0]
    assert torch.equal(ours(module, query, key, value, None, *more)[0], expected)


# ---- quantised caches ----


class Rounded(QuantizedLayer):  # type: ignore[misc]
    """Keys and values rounded to steps of 2^-20: too fine to change an answer, too coarse to be a copy."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return (tensor * 2**20).round()

    def _dequantize(self, tensor: Tensor) -> Tensor:
        return tensor / 2**20


@pytest.mark.parametrize("residual", [4, 128])
def test_quantised_cache_stays_quantised_behind_a_stage(residual: int) -> None:
    model = install_pruning(tiny_llava(), SCHEDULE)
    call = make_case(model, ROWS, "left").inputs() | {"max_new_tokens": 10, "do_sample": False}
    cache = Cache(layers=[Rounded(residual_length=residual) for _ in model.model.language_model.layers])
    made = model.generate(**call, past_key_values=cache)
    assert torch.equal(made, model.generate(**call))
    assert all(isinstance(layer, Rounded) for layer in cache.layers)
    prefilled = [layer._quantized_keys.shape[2] for layer in cache.layers]
    assert prefilled[0] > prefilled[2] > prefilled[4]
