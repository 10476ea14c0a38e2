"""Checkpoints of other models than LLaVA: names in files, export to stock classes, and bases of the wrong family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from export_toys import PRUNED, shaken
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import IMAGE_SIZE, PATCH_SIZE, tiny_llava, tiny_processor
from tiny_qwen import KINDS, save_qwen, tiny_qwen
from tiny_tiles import EVERY
from training_toys import finetune, save_tiny, tuner
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from himap_train.checkpoints.adapter import adapter_facts
from himap_train.checkpoints.agreement import check_agreement
from himap_train.checkpoints.export import export_adapter, export_merged
from himap_train.checkpoints.load import load_checkpoint, save_adapter
from himap_train.checkpoints.merge import parameter_name
from himap_train.checkpoints.same_base import base_facts, require_same_base
from himap_train.data.encode import Encoder
from himap_train.models.families import FAMILIES, family_of
from himap_train.models.install import install_pruning, pruning_of, remove_pruning
from himap_train.models.loading import load_llava
from himap_train.models.lora import attach_lora
from himap_train.models.published import find_config
from himap_train.pruning.schedule import PruningSchedule

pytestmark = pytest.mark.core

TEXT: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def vipllava() -> PreTrainedModel:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    return VipLlavaForConditionalGeneration(
        VipLlavaConfig(
            vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=4, vision_feature_layers=[-2, -1]
        )
    )


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "vipllava": vipllava,
    **{kind: partial(tiny_qwen, kind) for kind in KINDS},
}
_QWEN2 = {"model.language_model.": "model.", "model.visual.": "visual.", "lm_head.": "lm_head."}
PUBLISHED = {
    "vipllava": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",  # so CLIP and SigLIP lie there; loading takes it away
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    },
    "qwen2_vl": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen3_vl": {"": ""},
}
"""What a name in the module tree begins with, and in the files that lie on the hub."""


def published(name: str, kind: str) -> str:
    start, other = next((a, b) for a, b in PUBLISHED[kind].items() if name.startswith(a))
    return other + name.removeprefix(start)


def saved(kind: str, folder: Path, layout: str) -> Path:
    """A random model with its processor, its names in one of both layouts."""
    if kind == "vipllava":
        vipllava().save_pretrained(folder)
        tiny_processor().save_pretrained(folder)
    else:
        save_qwen(folder, kind)
    rename = published if layout == "published" else lambda name, kind: name
    weights = {rename(name, kind): value.contiguous() for name, value in stock(folder).state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def adapted(base: Path, projector: str = "train", vision: str = "freeze") -> PeftModel:
    torch.manual_seed(0)
    return shaken(attach_lora(load_llava(base)[0], r=4, alpha=8, projector=projector, vision=vision)).eval()


def stock(folder: Path) -> PreTrainedModel:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    left, right = found.state_dict(), expected.state_dict()
    assert left.keys() == right.keys()
    different = [name for name, value in right.items() if not torch.equal(left[name], value)]
    assert not different, different


@pytest.mark.parametrize("layout", ["published", "module tree"])
@pytest.mark.parametrize("kind", MODELS)
def test_merged_is_a_stock_model_of_the_same_class(kind: str, layout: str, tmp_path: Path) -> None:
    base = saved(kind, tmp_path / "base", layout)
    assert type(stock(base)) is type(MODELS[kind]())
    model = adapted(base)
    save_adapter(model, tmp_path / "a", PRUNED)
    loaded, processor = load_checkpoint(tmp_path / "a")
    assert pruning_of(loaded).schedule == PRUNED
    folder = export_merged(tmp_path / "a", tmp_path / "merged")
    assert load_file(folder / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    merged = stock(folder)
    assert_same(merged, remove_pruning(loaded).merge_and_unload(safe_merge=True))
    before, after = stock(base).state_dict(), merged.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    projector = {name for name in before if any(part in name for part in family_of(merged).projector_names)}
    assert moved == projector | {name for name in before if "language_model.layers" in name and "_proj.weight" in name}
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(merged).__name__] and config["himap"] == PRUNED.to_dict()
    assert pruning_of(load_checkpoint(folder)[0]).schedule == PRUNED
    card = (folder / "README.md").read_text()
    assert f"A model of family `{family_of(merged).name}` (`model_type` {kind})" in card
    assert ("needs torchvision" in card) == (kind != "vipllava") == ("llava" not in card.lower())
    assert type(processor) is type(load_llava(folder)[1])
    assert check_agreement(tmp_path / "a", folder).dense < 1e-4


@pytest.mark.parametrize("vision", ["lora", "train"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_trained_tower_is_merged_into_published_files(kind: str, vision: str, tmp_path: Path) -> None:
    base = saved(kind, tmp_path / "base", "published")
    model = adapted(base, vision=vision)
    save_adapter(model, tmp_path / "a", PRUNED)
    merged = stock(export_merged(tmp_path / "a", tmp_path / "merged"))
    moved = {name for name, value in stock(base).state_dict().items() if not value.equal(merged.state_dict()[name])}
    assert any(name.startswith(family_of(merged).vision_name) for name in moved)
    assert_same(merged, model.merge_and_unload(safe_merge=True))


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl", "internvl", "llava_onevision"])
def test_pictures_that_were_made_smaller_stay_so(kind: str, tmp_path: Path) -> None:
    """By the image processor in Python, as against want of memory: in the adapter and in the merged model."""
    save_qwen(tmp_path, kind) if kind.startswith("qwen") else EVERY[kind].folder(tmp_path)
    model, processor = load_llava(tmp_path)
    before = Encoder(processor).image_tokens((100, 60))
    if kind == "internvl":
        processor.image_processor.max_patches = 2
    elif kind == "llava_onevision":
        processor.image_processor.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints[:1]
    else:
        processor.image_processor.size = {"shortest_edge": 64, "longest_edge": 6 * 64}
    trained = Encoder(processor).image_tokens((100, 60))
    save_adapter(shaken(attach_lora(model, r=4, alpha=8)), tmp_path / "a", PruningSchedule(), processor)
    export_merged(tmp_path / "a", tmp_path / "merged")
    for folder in ("a", "merged"):
        assert Encoder(load_checkpoint(tmp_path / folder)[1]).image_tokens((100, 60)) == trained != before


@pytest.mark.parametrize("projector", ["train", "lora", "freeze"])
@pytest.mark.parametrize("kind", MODELS)
def test_adapters_with_the_names_of_earlier_releases_merge(kind: str, projector: str, tmp_path: Path) -> None:
    model = adapted(saved(kind, tmp_path / "base", "module tree"), projector)
    adapter = save_adapter(model, tmp_path / "a", PRUNED)
    start = "base_model.model."
    weights = {
        start + published(name.removeprefix(start), kind): value
        for name, value in load_file(adapter / "adapter_model.safetensors").items()
    }
    save_file(weights, adapter / "adapter_model.safetensors")
    assert_same(stock(export_merged(adapter, tmp_path / "merged")), model.merge_and_unload(safe_merge=True))


@pytest.mark.parametrize("kind", MODELS)
def test_every_name_is_that_of_the_module_tree_from_both_layouts(kind: str) -> None:
    model = MODELS[kind]()
    family = family_of(model)
    for name in model.state_dict():
        assert parameter_name(name, family) == parameter_name(published(name, kind), family) == name
    assert parameter_name("image_newline", family_of(tiny_llava())) == "model.image_newline"


def test_fresh_adapter_is_warned_about_unless_its_projector_was_trained(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    base = saved("qwen2_vl", tmp_path / "base", "published")
    for projector in ("train", "freeze"):
        fresh = attach_lora(load_llava(base)[0], r=4, alpha=8, projector=projector)
        load_checkpoint(save_adapter(fresh, tmp_path / projector, PRUNED))
    found = [str(warning.message) for warning in recwarn if "the adapter changes nothing" in str(warning.message)]
    assert len(found) == 1 and str(tmp_path / "freeze") in found[0]


def test_base_of_another_family_is_refused_by_name(tmp_path: Path) -> None:
    llava, qwen = save_tiny(tmp_path / "llava"), saved("qwen2_vl", tmp_path / "qwen", "published")
    on_llava, on_qwen = (
        save_adapter(adapted(Path(base)), tmp_path / name, PRUNED) for name, base in (("a", llava), ("b", qwen))
    )
    for adapter, base, there, trained_on in (
        (on_llava, str(qwen), "qwen2_vl", "llava"),
        (on_qwen, llava, "llava", "qwen2_vl"),
    ):
        message = f"(?s)is of family {there}, and the adapter was trained on .*, a model of family {trained_on}"
        for attempt in (
            lambda adapter=adapter, base=base: load_checkpoint(adapter, base=base),
            lambda adapter=adapter, base=base: export_merged(adapter, tmp_path / "never", base=base),
            lambda adapter=adapter, base=base: export_adapter(adapter, tmp_path / "never", base=base),
        ):
            with pytest.raises(ValueError, match=message):
                attempt()
    assert not (tmp_path / "never").exists()


def test_run_is_not_resumed_over_a_base_of_another_family(tmp_path: Path) -> None:
    """`--model.path` was changed before `--resume`."""
    module = tuner(save_tiny(tmp_path / "llava"))
    module.configure_model()
    on_qwen = adapter_facts(adapted(saved("qwen2_vl", tmp_path / "qwen", "published")), PRUNED)
    weights = {name: value for name, value in module.state_dict().items() if name in module.trained_names()}
    with pytest.raises(ValueError, match="is of family llava, and the adapter was trained on .*of family qwen2_vl"):
        module.on_load_checkpoint({"himap_adapter": on_qwen, "state_dict": weights})
    module.on_load_checkpoint({"state_dict": weights})


def test_facts_tell_bases_of_a_family_apart_and_those_of_old_adapters_still_compare() -> None:
    config = tiny_qwen("qwen2_vl").config
    facts = json.loads(json.dumps(base_facts(config)))
    assert facts["vision_config.spatial_merge_size"] == 2 and "vision_config.image_size" not in facts
    require_same_base(facts, config, "here", "there")
    config.vision_config.spatial_merge_size = 4
    with pytest.raises(ValueError, match=r"vision_config.spatial_merge_size: 2 then, 4 in here"):
        require_same_base(facts, config, "here", "there")
    data = Path(__file__).parent / "data/checkpoint_v0_1"
    old = json.loads((data / "adapter/base_model.json").read_text())["config"]
    llava = LlavaConfig.from_pretrained(data / "base")
    require_same_base(old, llava, "here", "there")
    llava.vision_config.patch_size = 16
    with pytest.raises(ValueError, match=r"vision_config.patch_size: \d+ then, 16 in here"):
        require_same_base(old, llava, "here", "there")


ORIGINAL = [
    {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "hidden_size": 4096},
    {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama", "mm_hidden_size": 1024},
    {"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral", "mm_hidden_size": 1024},
]


@pytest.mark.parametrize("written", ORIGINAL)
def test_original_llava_layout_names_its_converted_twin(
    written: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(written))
    message = "is in the original LLaVA layout .*converted twin on the hub, such as llava-hf/llava-1.5-7b-hf"
    for attempt in (load_llava, lambda path: find_config(str(path)), load_checkpoint):
        with pytest.raises(ValueError, match=message):
            attempt(tmp_path)
    options = ("--model.path", str(tmp_path), "--output", str(tmp_path / "run"), "--data.train", "embedded:train")
    assert finetune(*options, "--trainer.accelerator", "cpu") == 2
    assert "is in the original LLaVA layout" in capsys.readouterr().err


def test_other_models_are_told_which_are_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip-2"}))
    with pytest.raises(ValueError, match="a 'blip-2' model, which is of no family that can be pruned") as refused:
        load_llava(tmp_path)
    assert all(name in str(refused.value) for family in FAMILIES for name in family.model_types)
    config = LlavaConfig(
        vision_config=tiny_llava().config.vision_config, text_config=GemmaConfig(**TEXT, head_dim=8), image_token_id=4
    )
    gemma = LlavaForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"is a GemmaModel \(gemma\); pruning works in family llava with llama, mist"):
        install_pruning(gemma, PRUNED)
    shutil.rmtree(tmp_path)
    gemma.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pruning works in family llava with llama"):
        load_checkpoint(tmp_path)
