"""What the embedded LLaVA's decoder starts from: the class head of its vision tower. And how it grows.

The head's rows become word embeddings and output rows, and three attention heads of every layer start as lookups over
the same directions. With random starts the decoder answers only from the frequency of answers for a long time.
Shapes: B images, T image tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from himap_train.embedded.build import WIDTH
from himap_train.embedded.scene_text import COLOURS, COLUMNS, DIGITS, KINDS, PLURALS, ROWS, WORDS

# The dense labels of a patch, and the words that the rows of the class head become.
HEADS: dict[str, tuple[str, ...]] = {
    "kind": (*KINDS, "card", "nothing"),
    "colour": COLOURS,
    "digit": DIGITS,
    "row": ROWS,
    "column": COLUMNS,
}
HEAD_WORDS = tuple(word for words in HEADS.values() for word in words)
# What each look-up head compares; and by how much a word's attention logit for the image tokens of its own class of
# the first group exceeds that for others.
LOOKUPS = (("kind",), ("colour", "digit"), ("row", "column"))
GAP = 5.0


class PatchHeads(nn.Module):
    """One linear classifier a label over the projector's output; its rows later start the word embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, len(HEAD_WORDS), bias=False)

    def forward(self, features: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Sum of the heads' cross-entropies, and for each head the fraction of patches that are right."""
        loss, right = features.new_zeros(()), {}
        for (name, _), logits in zip(
            HEADS.items(), self.linear(features).float().split([len(w) for w in HEADS.values()], dim=-1), strict=True
        ):
            target = labels[name]
            loss = loss + nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)
            valid = target != -100
            right[name] = (logits.argmax(-1) == target)[valid].float().mean().item()
        return loss, right


@torch.no_grad()
def scale_features(model: LlavaForConditionalGeneration, features: Tensor) -> None:
    """Scale the projector such that `features`, (B, T, D) as it made them before, would have root mean square 0.5."""
    scale = 0.5 / features.pow(2).mean().sqrt()
    for parameter in model.model.multi_modal_projector.linear_2.parameters():
        parameter *= scale


@torch.no_grad()
def start_words(model: LlavaForConditionalGeneration, heads: PatchHeads, tokenizer: PreTrainedTokenizerFast) -> None:
    """Start word embeddings and output rows from the class head, at the scale of `scale_features`.

    It is what CLIP's training does for the words of a real LLaVA. Without it the decoder has to find out by chance
    which word belongs to which feature, and stays at chance for long.
    """
    embedding, output = model.model.language_model.embed_tokens.weight, model.lm_head.weight
    nn.init.normal_(embedding, std=0.5)
    nn.init.normal_(output, std=0.02)
    singular = {plural: kind for kind, plural in PLURALS.items()}
    for word in WORDS:
        if (head := singular.get(word, word)) in HEAD_WORDS:
            row = _scaled(heads.linear.weight[HEAD_WORDS.index(head)])
            (token,) = tokenizer.encode(f" {word}", add_special_tokens=False)
            embedding[token] = 0.5 * row
            output[token] = 0.03 * row


@torch.no_grad()
def start_attention(model: LlavaForConditionalGeneration, heads: PatchHeads, features: Tensor) -> None:
    """Start the first three heads of every layer as lookups: a token looks for tokens that are like it in one respect.

    Words are like the image tokens of what they name (`start_words`), so looking things up by content and by place
    need not be found by chance; without it these come late, one after another. `features` (B, T, D) of some images.
    """
    seen, size = _scaled(features.flatten(0, 1)), model.model.language_model.config.head_dim
    looks = [_lookup(heads, names, seen, size) for names in LOOKUPS]
    for layer in model.model.language_model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            for head, look in enumerate(looks):
                projection.weight[head * size : (head + 1) * size] = look + 0.01 * torch.randn(look.shape)


def _scaled(rows: Tensor) -> Tensor:
    """Rows (..., D) brought to root mean square 1."""
    return rows / rows.pow(2).mean(-1, keepdim=True).sqrt()


def _lookup(heads: PatchHeads, names: tuple[str, ...], seen: Tensor, size: int) -> Tensor:
    """Query and key projection, (size, D), of an attention head that compares the named groups.

    `seen` (N, D) image tokens tell how strong it must be for a difference of `GAP`.
    """
    rows = dict(zip(HEADS, heads.linear.weight.split([len(words) for words in HEADS.values()]), strict=True))
    centred = torch.cat([rows[name] - rows[name].mean(0) for name in names])
    _, strength, basis = torch.linalg.svd(centred, full_matrices=False)
    basis = basis[: int((strength > 1e-3 * strength[0]).sum())]
    words = rows[names[0]]
    logits = (_scaled(words) @ basis.T) @ (seen @ basis.T).T / size**0.5
    classes = (seen @ words.T).argmax(-1)
    gaps = [logits[c][classes == c].mean() - logits[c][classes != c].mean() for c in classes.unique()]
    # Rotary embedding turns the first dimensions of each half too fast to compare tokens a hundred places apart.
    slow_first = [d for i in reversed(range(size // 2)) for d in (i, i + size // 2)]
    look = torch.zeros(size, WIDTH)
    look[slow_first[: len(basis)]] = (GAP / torch.stack(gaps).mean()).sqrt() * basis
    return look


def shrink(model: LlavaForConditionalGeneration, count: int) -> None:
    """Leave the decoder its first `count` layers."""
    decoder = model.model.language_model
    decoder.layers = decoder.layers[:count]
    decoder.config.num_hidden_layers = count


@torch.no_grad()
def grow(model: LlavaForConditionalGeneration) -> None:
    """Put a new layer behind each layer of the decoder: random, but it adds nothing yet."""
    decoder, config = model.model.language_model, model.model.language_model.config
    layers: list[nn.Module] = []
    for layer in decoder.layers:
        new = LlamaDecoderLayer(config, 0)
        for parameter in new.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.05)
        nn.init.zeros_(new.self_attn.o_proj.weight)
        nn.init.zeros_(new.mlp.down_proj.weight)
        layers += [layer, new]
    decoder.layers = nn.ModuleList(layers)
    config.num_hidden_layers = len(layers)
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index
