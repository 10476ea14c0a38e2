"""Against what the published reference implementation of HiMAP computes on a small random decoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import IMAGE_ID, Case
from naive import naive_forward
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from himap_train import PruningSchedule, PruningStage, install_pruning, record_pruning
from himap_train.models.features import hidden_states

pytestmark = pytest.mark.core

REFERENCE = Path(__file__).parent / "data" / "himap_reference.npz"
STATES = {"atol": 1e-3, "rtol": 0.0}  # fp32: what the design asks for
FIRST_TEXT_ID = 10
META = "hidden heads kv_heads inner layers system image text layer1 layer2 keep1 keep2".split()


@dataclass
class Reference:
    meta: dict[str, int]
    arrays: dict[str, Tensor]
    kept: list[Tensor]

    def schedule(self, counts: bool) -> PruningSchedule:
        layers = (self.meta["layer1"], self.meta["layer2"])
        keep = [self.meta["keep1"], self.meta["keep2"]]
        sizes = [{"keep_count": k} if counts else {"keep_ratio": k / self.meta["image"]} for k in keep]
        return PruningSchedule(
            stages=(
                PruningStage(layer=layers[0], criterion="instruction", **sizes[0]),
                PruningStage(layer=layers[1], criterion="image", **sizes[1]),
            )
        )

    def model(self, attn: str) -> LlavaForConditionalGeneration:
        """Its decoder inside a LLaVA; text columns are looked up, image columns are fed as features."""
        meta = self.meta
        text = LlamaConfig(
            vocab_size=128,
            hidden_size=meta["hidden"],
            intermediate_size=meta["inner"],
            num_hidden_layers=meta["layers"],
            num_attention_heads=meta["heads"],
            num_key_value_heads=meta["kv_heads"],
        )
        vision = CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8
        )
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_ID)
        config._attn_implementation = attn
        model = LlavaForConditionalGeneration(config).eval()
        weights = {name[2:]: value for name, value in self.arrays.items() if name.startswith("w:")}
        missing, unexpected = model.model.language_model.load_state_dict(weights, strict=False)
        assert (missing, unexpected) == (["embed_tokens.weight"], [])
        embeds = self.arrays["inputs_embeds"]
        model.get_input_embeddings().weight.data[FIRST_TEXT_ID : FIRST_TEXT_ID + len(embeds)] = embeds
        return model

    def case(self) -> Case:
        ids = torch.arange(FIRST_TEXT_ID, FIRST_TEXT_ID + len(self.arrays["inputs_embeds"]))[None]
        image = slice(self.meta["system"], self.meta["system"] + self.meta["image"])
        ids[:, image] = IMAGE_ID
        labels = torch.full_like(ids, -100)
        return Case(ids, torch.ones_like(ids), labels, [self.arrays["inputs_embeds"][image]])


@pytest.fixture(scope="module")
def reference() -> Reference:
    arrays = np.load(REFERENCE, allow_pickle=False)
    meta = dict(zip(META, arrays["meta"].tolist(), strict=True))
    tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    kept = [tensors["kept_positions_after_stage1"], tensors["kept_positions_after_stage2"]]
    assert len(tensors["inputs_embeds"]) == meta["system"] + meta["image"] + meta["text"]
    assert [len(columns) for columns in kept] == [50 - 36 + meta["keep1"], 50 - 36 + meta["keep2"]]
    return Reference(meta, tensors, kept)


def test_the_oracle_agrees_with_the_reference(reference: Reference) -> None:
    model, case = reference.model("eager"), reference.case()
    with torch.no_grad():
        out = naive_forward(model, reference.schedule(counts=True), **case.naive())
    for stage, expected in zip(out.kept, reference.kept, strict=True):
        assert stage[0].tolist() == expected.tolist()
    states = out.hidden[0, reference.kept[1]]
    torch.testing.assert_close(states, reference.arrays["last_hidden_state_pruned"], **STATES)


@pytest.mark.parametrize("counts", [True, False], ids=["keep_count", "keep_ratio"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_kept_tokens_and_states_are_the_references(reference: Reference, attn: str, counts: bool) -> None:
    model, case = reference.model(attn), reference.case()
    install_pruning(model, reference.schedule(counts))
    with torch.no_grad(), record_pruning(model) as trace:
        states = hidden_states(model, **case.inputs())[0]
    assert len(trace.kept) == 2
    for stage, expected in zip(trace.kept, reference.kept, strict=True):
        assert stage[0].tolist() == expected.tolist()
    torch.testing.assert_close(states[reference.kept[1]], reference.arrays["last_hidden_state_pruned"], **STATES)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_dense_states_are_the_references(reference: Reference, attn: str) -> None:
    model, case = reference.model(attn), reference.case()
    install_pruning(model, PruningSchedule())
    with torch.no_grad():
        states = hidden_states(model, **case.inputs())[0]
    torch.testing.assert_close(states, reference.arrays["last_hidden_state_full"], **STATES)
