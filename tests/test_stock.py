"""An empty schedule and `remove_pruning` are the stock model to the last bit; other decoders are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import RAGGED, RAGGED_ANSWERS, make_case
from tiny import tiny_llava
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    PreTrainedConfig,
)

from himap_train import PruningSchedule, PruningStage, install_pruning, record_pruning, remove_pruning
from himap_train.models.features import hidden_states
from himap_train.models.install import pruning_of

pytestmark = pytest.mark.core

HIMAP = PruningSchedule(
    stages=(
        PruningStage(layer=2, criterion="instruction", keep_ratio=0.5),
        PruningStage(layer=4, criterion="image", keep_ratio=0.125),
    )
)


def never_installed(model: LlavaForConditionalGeneration) -> None:
    """The reference run."""


def install_empty(model: LlavaForConditionalGeneration) -> None:
    install_pruning(model, PruningSchedule())


def install_and_remove(model: LlavaForConditionalGeneration) -> None:
    install_pruning(model, HIMAP)
    model.generate(**make_case(model, RAGGED, "left").inputs(), max_new_tokens=2, do_sample=False)
    remove_pruning(model)


def everything(model: LlavaForConditionalGeneration, side: str) -> dict[str, Tensor]:
    """Logits, loss, gradients and generated ids with their scores."""
    case, prompt = make_case(model, RAGGED_ANSWERS, side), make_case(model, RAGGED, "left")
    out = model(**case.inputs(labels=True))
    out.loss.backward()
    found = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {"logits": out.logits, "loss": out.loss}
    for beams in (1, 2):
        made = model.generate(
            **prompt.inputs(), max_new_tokens=4, do_sample=False, num_beams=beams, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        found |= {f"ids, {beams} beams": made.sequences, f"scores, {beams} beams": torch.stack(made.scores)}
    return found


@pytest.mark.parametrize("change", [install_empty, install_and_remove])
@pytest.mark.parametrize(("text", "attn", "side"), [
    ("llama", "sdpa", "left"), ("llama", "eager", "right"), ("mistral", "sdpa", "right"), ("qwen2", "sdpa", "left"),
])  # fmt: skip
def test_bit_identical_to_stock(text: str, attn: str, side: str, change: Any) -> None:
    model = tiny_llava(text, layers=5, attn=attn)
    change(model)
    found = everything(model, side)
    expected = everything(tiny_llava(text, layers=5, attn=attn), side)
    assert found.keys() == expected.keys() and len(expected) > 40
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("change", [install_empty, install_and_remove])
def test_without_a_mask_too(change: Any) -> None:
    """Stock attention takes another path when nothing is padded and no mask is given."""
    model, stock = tiny_llava(), tiny_llava()
    change(model)
    inputs = make_case(model, ["t3 i16 t4"]).inputs()
    inputs.pop("attention_mask")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)


def test_remove_leaves_nothing_behind() -> None:
    model, stock = tiny_llava(), tiny_llava()
    install_and_remove(model)
    assert pruning_of(model) is None
    assert model.config.to_dict() == stock.config.to_dict()
    assert model.config.text_config._attn_implementation == stock.config.text_config._attn_implementation
    for (name, ours), (_, theirs) in zip(model.named_modules(), stock.named_modules(), strict=True):
        assert ours.__dict__.keys() == theirs.__dict__.keys(), name
        assert type(ours) is type(theirs), name
    remove_pruning(model)  # twice does no harm


def test_weights_and_names_do_not_change_while_installed() -> None:
    model, stock = install_pruning(tiny_llava(), HIMAP), tiny_llava()
    assert type(model) is LlavaForConditionalGeneration
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert all(torch.equal(value, stock.state_dict()[name]) for name, value in model.state_dict().items())


def test_two_models_do_not_share_their_pruning() -> None:
    pruned, dense = install_pruning(tiny_llava(), HIMAP), tiny_llava()
    case = make_case(dense, RAGGED)
    with torch.no_grad():
        first = pruned(**case.inputs()).logits
        assert torch.equal(dense(**case.inputs()).logits, tiny_llava()(**case.inputs()).logits)
        assert not torch.equal(first, dense(**case.inputs()).logits)


def test_a_copy_prunes_by_itself() -> None:
    model = install_pruning(tiny_llava(), HIMAP)
    case = make_case(model, RAGGED)
    with torch.no_grad():
        expected = hidden_states(model, **case.inputs())
        twin = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        with record_pruning(twin) as trace:
            found = hidden_states(twin, **case.inputs())
    assert torch.equal(found, expected)
    assert len(trace.kept) == 2


def test_a_saved_pruned_model_loads_as_stock(tmp_path: Any) -> None:
    install_pruning(tiny_llava(), HIMAP).save_pretrained(tmp_path)
    loaded, stock = LlavaForConditionalGeneration.from_pretrained(tmp_path), tiny_llava()
    case = make_case(stock, RAGGED)
    with torch.no_grad():
        assert torch.equal(loaded(**case.inputs()).logits, stock(**case.inputs()).logits)


@pytest.mark.parametrize("config", [GemmaConfig, PhiConfig])
def test_another_decoder_is_refused_with_those_that_work(config: type[PreTrainedConfig]) -> None:
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8
    )
    text = config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=4))
    with pytest.raises(ValueError) as error:
        install_pruning(model, HIMAP)
    message = str(error.value).lower()
    assert all(name in message for name in ("llama", "mistral", "qwen2", text.model_type))


def test_another_model_is_refused() -> None:
    with pytest.raises((TypeError, ValueError), match="(?i)llava"):
        install_pruning(torch.nn.Linear(2, 2), HIMAP)
