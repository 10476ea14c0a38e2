"""A decoder whose operations are counted, and schedules for it; the architecture that published figures are of."""

from __future__ import annotations

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from himap_train import PruningSchedule, PruningStage

LLAVA_7B = LlavaConfig(text_config=LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32))


def decoder(kv_heads: int = 8, layers: int = 12) -> LlavaForConditionalGeneration:
    """Wide enough that matrix products are what costs, as in a real one."""
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=688, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=kv_heads,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=4)
    config._attn_implementation = "sdpa"
    return LlavaForConditionalGeneration(config).eval()


def plan(*stages: tuple[int, str, float]) -> PruningSchedule:
    return PruningSchedule(
        stages=tuple(PruningStage(layer=at, criterion=how, keep_ratio=keep) for at, how, keep in stages)
    )


HIMAP = plan((2, "instruction", 0.5), (5, "image", 0.125))
