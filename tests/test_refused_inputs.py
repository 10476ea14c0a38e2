"""What a pruned decoder cannot compute correctly is refused with the way out, as is a model that cannot be loaded."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llava, tiny_processor
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from himap_train import PruningSchedule, PruningStage, install_pruning, load_llava, remove_pruning
from himap_train.models import loading
from himap_train.models.install import pruning_of
from himap_train.pruning.keep import keep_from_ratio

pytestmark = pytest.mark.core

SCHEDULE = PruningSchedule((PruningStage(2, "instruction", 0.5),))
IDS = torch.tensor([[1, *[4] * 16, 7, 8, 9]])


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def inputs(**more: Any) -> dict[str, Any]:
    features = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": IDS,
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=[features])},
        **more,
    }


REFUSED = {
    "maps": ({"output_attentions": True}, "output_attentions is not available"),
    "4d": ({"attention_mask": torch.ones(1, 1, 20, 20)}, "attention_mask as \\(batch, length\\)"),
    "long": ({"attention_mask": torch.ones(1, 25)}, "has 25 columns, cache and new tokens make 20"),
    "packed": ({"position_ids": torch.arange(20)[None] % 10, "use_cache": False}, "packed rows"),
    "packed for flash": ({"cu_seq_lens_q": torch.tensor([0, 10, 20])}, "packed rows .cu_seq_lens_q."),
    "typo": ({"image_tokens_mask": IDS == 4}, "image_tokens_mask means nothing to .* family llava"),
    "of another family": ({"deepstack_visual_embeds": [torch.zeros(16, 32)]}, "deepstack_visual_embeds means nothing"),
    "bidirectional": ({"is_causal": False}, "is_causal means nothing"),
    "video": ({"pixel_values_videos": torch.zeros(1, 3, 32, 32)}, "family llava .* there are pixel_values_videos"),
    "encoded video": ({"mm_encoder_outputs": {"video": IDS}}, "family llava .* there are video"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_inputs_are_refused(name: str) -> None:
    given, message = REFUSED[name]
    model = install_pruning(tiny_llava(), SCHEDULE)
    model(**inputs())
    with pytest.raises(ValueError, match=message):
        model(**inputs(**given))


def test_what_heads_and_trainers_hand_down_is_not_refused() -> None:
    model = install_pruning(tiny_llava(), SCHEDULE)
    expected = model(**inputs()).logits
    known = {"num_items_in_batch": 3, "ignore_index": -100, "return_dict": True, "is_causal": True}
    assert torch.equal(model(**inputs(**known, output_attentions=False, typo=None)).logits, expected)


def test_under_an_empty_schedule_the_stock_forward_decides() -> None:
    model = install_pruning(tiny_llava(), PruningSchedule())
    model(**inputs(image_tokens_mask=IDS == 4))


def test_static_cache_is_refused() -> None:
    model = install_pruning(tiny_llava(), SCHEDULE)
    with pytest.raises(ValueError, match="cannot fill a StaticCache.*DynamicCache"):
        model(**inputs(past_key_values=StaticCache(config=model.config.text_config, max_cache_len=64)))


def test_sliding_window_is_refused_where_it_would_cut() -> None:
    model = install_pruning(tiny_llava("mistral"), SCHEDULE)
    model.config.text_config.sliding_window = 20
    model(**inputs())
    model.config.text_config.sliding_window = 19
    with pytest.raises(ValueError, match="20 tokens, more than the decoder's sliding window of 19"):
        model(**inputs())


def test_image_behind_a_filled_cache_is_refused() -> None:
    model = install_pruning(tiny_llava(), SCHEDULE)
    cache = model(input_ids=torch.tensor([[1, 7, 8]]), use_cache=True, past_key_values=DynamicCache()).past_key_values
    with pytest.raises(ValueError, match="image tokens behind a filled KV cache"):
        model(**inputs(past_key_values=cache))


def test_decoder_that_does_not_know_its_image_tokens_is_refused() -> None:
    model = install_pruning(tiny_llava(), SCHEDULE)
    merged = model.get_input_embeddings()(IDS)
    with pytest.raises(ValueError, match="not told where the image tokens are"):
        model.model(inputs_embeds=merged)
    with pytest.raises(ValueError, match="pass image_token_mask"):
        model(inputs_embeds=merged)
    model(inputs_embeds=merged, image_token_mask=IDS == 4)
    with pytest.raises(ValueError, match="one entry per token"):
        model(inputs_embeds=merged, image_token_mask=IDS[:, 1:] == 4)


def test_copy_runs_on_its_own_weights() -> None:
    model = install_pruning(tiny_llava(), SCHEDULE)
    twin = copy.deepcopy(model)
    before = model(**inputs()).logits
    assert torch.equal(twin(**inputs()).logits, before)
    twin.model.language_model.norm.weight.mul_(2)
    assert torch.equal(model(**inputs()).logits, before)
    assert not torch.equal(twin(**inputs()).logits, before)


def test_installed_model_can_be_pickled() -> None:
    model = install_pruning(tiny_llava(), SCHEDULE)
    before = model(**inputs()).logits
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(**inputs()).logits, before)
    assert pruning_of(twin).last == pruning_of(model).last


def test_attention_chosen_after_installing_is_respected() -> None:
    model = install_pruning(tiny_llava(attn="sdpa"), SCHEDULE)
    model.set_attn_implementation("eager")
    expected = install_pruning(tiny_llava(attn="eager"), SCHEDULE)(**inputs()).logits
    assert torch.equal(model(**inputs()).logits, expected)
    assert remove_pruning(model).config.text_config._attn_implementation == "eager"
    assert model.model.language_model.config is model.config.text_config


@pytest.mark.parametrize("ratio, kept", [(0.145, 15), (0.285, 29), (0.575, 58), (0.0049, 1), (0.0, 0)])
def test_written_ratios_round_half_up(ratio: float, kept: int) -> None:
    assert keep_from_ratio(ratio, torch.tensor([100])).tolist() == [kept]


def test_what_is_not_there_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="no folder ./nowhere.*configs/quickstart.yaml"):
        load_llava("./nowhere")
    with pytest.raises(FileNotFoundError, match="no hub id"):
        load_llava("a/b/c")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match="no config.json .it holds notes.txt"):
        load_llava(tmp_path)

    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(loading, "get_session", no_network)
    with pytest.raises(FileNotFoundError, match="nobody/nothing is neither in the local cache nor reachable"):
        load_llava("nobody/nothing")


def test_what_is_no_llava_cannot_be_loaded(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a 'llama' model, which is of no family .*known: llava"):
        load_llava(tmp_path)


def test_processor_facts_that_old_checkpoints_leave_out(tmp_path: Path) -> None:
    model = tiny_llava()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no usable processor"):
        load_llava(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    config = json.loads(file.read_text())
    for key in ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy"):
        del config[key]
    file.write_text(json.dumps(config))
    loaded, processor = load_llava(tmp_path)
    assert (processor.patch_size, processor.num_additional_image_tokens) == (8, 1)
    assert processor.vision_feature_select_strategy == "default"
    assert not loaded.training
