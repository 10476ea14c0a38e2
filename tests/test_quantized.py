"""Pruning, LoRA and export over quantised decoder weights: int8 layers that run anywhere, bitsandbytes where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_toys import PRUNED, shaken
from safetensors.torch import load_file
from tiny import tiny_llava
from torch import Tensor, nn
from training_toys import ToyData, collate, quiet_trainer, sample, save_tiny, tuner
from transformers import LlavaForConditionalGeneration

from himap_train.checkpoints.export import export_merged
from himap_train.checkpoints.load import load_checkpoint, save_adapter
from himap_train.models import loading, quantize
from himap_train.models.families.llava import Llava
from himap_train.models.features import hidden_states
from himap_train.models.install import install_pruning, record_pruning
from himap_train.models.lora import attach_lora, is_linear, trainable_report
from himap_train.models.stock import base_model
from himap_train.models.versions import checkpoint_activations


class Int8Linear(nn.Linear):
    """Weights as int8 with a scale a row, made fp32 when they are used."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def dequantized(self) -> Tensor:
        return self.weight.float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantized(), self.bias)


def pair(text: str = "llama") -> tuple[LlavaForConditionalGeneration, LlavaForConditionalGeneration]:
    """A model whose decoder layers are int8, and one in fp32 with the values that those stand for."""
    quantized, plain = tiny_llava(text), tiny_llava(text)
    for name, module in list(quantized.model.language_model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            layer = Int8Linear(module)
            quantized.model.language_model.layers.set_submodule(name, layer)
            plain.model.language_model.layers.get_submodule(name).weight.data = layer.dequantized()
    assert sum(isinstance(module, Int8Linear) for module in quantized.modules()) == 6 * 7
    return quantized, plain


def batch() -> dict[str, Any]:
    made = collate([sample(0), sample(1, answer=6)])
    return {key: made[key] for key in ("input_ids", "attention_mask", "images", "labels")}


def inputs() -> dict[str, Any]:
    """As the model itself takes them."""
    made = batch()
    return made.pop("images") | made


@pytest.mark.parametrize("text", ["llama", "qwen2"])
@torch.no_grad()
def test_pruner_keeps_the_same_tokens_over_quantised_layers(text: str) -> None:
    outputs = []
    for model in pair(text):
        install_pruning(model, PRUNED)
        with record_pruning(model) as trace:
            logits = model(**inputs()).logits
        kept = [[row.tolist() for row in stage] for stage in trace.kept]
        outputs.append((logits, kept, model.generate(**{**inputs(), "labels": None}, max_new_tokens=4)))
    (found, kept, tokens), (expected, expected_kept, expected_tokens) = outputs
    assert kept == expected_kept and len(kept[0][0]) < batch()["input_ids"].shape[1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(tokens, expected_tokens)
    stock = install_pruning(tiny_llava(text), PRUNED)(**inputs()).logits
    assert not torch.allclose(found, stock, atol=1e-3)  # the quantisation is not without effect


def test_lora_over_quantised_layers_has_the_gradients_of_plain_ones() -> None:
    gradients = []
    for model in pair():
        adapted = install_pruning(shaken(attach_lora(model, r=4, alpha=8)), PRUNED)
        checkpoint_activations(base_model(adapted).model.language_model)
        adapted.train()
        before = {name: p.clone() for name, p in adapted.named_parameters() if not p.requires_grad}
        hidden_states(adapted, **batch()).square().sum().backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
        assert all(torch.equal(p, before[name]) for name, p in adapted.named_parameters() if not p.requires_grad)
        assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    found, expected = gradients
    assert found.keys() == expected.keys() and len(found) == 6 * 7 * 2 + 4
    for name, gradient in expected.items():
        assert gradient is not None and gradient.any(), name
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-4)


def test_adapter_trained_over_quantised_weights_merges_into_the_original(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    quantized, _ = pair()
    quantized.config._name_or_path = quantized.name_or_path = base
    adapted = shaken(attach_lora(quantized, r=4, alpha=8))
    save_adapter(adapted, tmp_path / "a", PRUNED)
    merged = LlavaForConditionalGeneration.from_pretrained(export_merged(tmp_path / "a", tmp_path / "merged"))
    layer = "model.language_model.layers.3.mlp.up_proj"
    adapter = adapted.base_model.model.get_submodule(layer)
    update = 2.0 * adapter.lora_B["default"].weight @ adapter.lora_A["default"].weight
    original = tiny_llava().get_submodule(layer).weight
    assert torch.equal(merged.get_submodule(layer).weight, original + update)


class Packed(nn.Module):
    """A quantised layer that is no nn.Linear, as GPTQ's and AWQ's are."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 4


def test_which_modules_count_as_linear() -> None:
    assert is_linear(nn.Linear(2, 2)) and is_linear(Int8Linear(nn.Linear(2, 2))) and is_linear(Packed())
    model = tiny_llava()
    kinds = {type(module) for module in model.modules() if is_linear(module)}
    assert kinds == {nn.Linear}
    assert not is_linear(nn.Embedding(2, 2)) and not is_linear(nn.Conv2d(2, 2, 1))


def test_without_bitsandbytes_or_cuda_both_ways_out_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tuner(save_tiny(tmp_path / "base"), quantize="4bit")
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install .*qlora.*or .*--model.quantize null"):
        module.configure_model()
    monkeypatch.setattr(quantize, "find_spec", lambda name: object())
    monkeypatch.setattr(quantize, "version", lambda name: "0.50")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs a CUDA device.*run it where there is one, or .*--model.quantize null"):
        module.configure_model()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = quantize.quantization_config(Llava(), torch.float16)
    assert config.llm_int8_skip_modules == ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.float16
    assert quantize.quantization_config(Llava(), "auto").bnb_4bit_compute_dtype == torch.bfloat16


def test_qlora_with_bitsandbytes_from_training_to_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes has kernels for the CPU, slow ones: the whole way but for the device."""
    bnb: Any = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(loading, "quantization_config", quantize.nf4_config)
    base = save_tiny(tmp_path / "base", hidden=64)
    module = tuner(base, quantize="4bit", gradient_checkpointing=True)
    trainer = quiet_trainer(tmp_path, max_steps=3)
    trainer.fit(module, ToyData())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    model = module.peft_model
    packed = [name for name, layer in model.named_modules() if isinstance(layer, bnb.nn.Linear4bit)]
    assert len(packed) == 6 * 7 and all("language_model.layers" in name for name in packed)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    weights = [p for p in model.parameters() if isinstance(p, bnb.nn.Params4bit)]
    assert len(weights) == 42 and {p.dtype for p in weights} == {torch.uint8}
    line = next(line for line in trainable_report(model).splitlines() if "decoder" in line)
    decoder = sum(p.numel() for p in tiny_llava(hidden=64).model.language_model.parameters())
    assert line.split()[-1] == f"{decoder:,}"
    folder = export_merged(tmp_path / "last.ckpt", tmp_path / "merged")
    found, before = load_file(folder / "model.safetensors"), load_file(Path(base) / "model.safetensors")
    moved = {name for name in found if not torch.equal(found[name], before[name])}
    assert len(moved) == 42 + 4
    assert all((found[name] - before[name]).abs().max() < 0.2 for name in moved)
    load_checkpoint(folder)
