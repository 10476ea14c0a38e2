"""What the embedded LLaVA's decoder starts from: the class head of its vision tower.

The head's rows become word embeddings and output rows, and a few attention heads start as lookups over the same
directions. With random starts the decoder answers only from the frequency of answers for a long time. Shapes: B
images, T image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from himap_train.data.scene_text import COLOURS, COLUMNS, DIGITS, KINDS, PLURALS, ROWS
from himap_train.models.embedded_build import WIDTH

# The dense labels of a patch, and the words that the rows of the class head become.
HEADS: dict[str, tuple[str, ...]] = {
    "kind": (*KINDS, "card", "nothing"),
    "colour": COLOURS,
    "digit": DIGITS,
    "row": ROWS,
    "column": COLUMNS,
}
HEAD_WORDS = tuple(word for words in HEADS.values() for word in words)
# Starting strengths, chosen by looking at what the untrained decoder attends to: of a word's own class direction, of
# its output row, of the direction all words share, of the look for that direction, and of what each lookup copies.
WORD, READ, SHARED, RECENT = 3.0, 0.8, 2.8, 0.8
GAIN = {"kind": 2.0, "card": 2.0, "words": 4.0, "place": 2.0}


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


class Lookup:
    """The directions that the class head reads, by group; centred, so that they tell the words of a group apart."""

    def __init__(self, heads: PatchHeads) -> None:
        rows = {name: heads.linear.weight[[HEAD_WORDS.index(w) for w in HEADS[name]]] for name in HEADS}
        self.rows = {name: row - row.mean(0) for name, row in rows.items()}

    def basis(self, *names: str) -> Tensor:
        """Orthonormal rows that span the named groups, (n, D)."""
        stacked = torch.cat([self.rows[name] for name in names])
        return torch.linalg.svd(stacked, full_matrices=False).Vh[: len(stacked) - len(names)]


@torch.no_grad()
def start_features(model: LlavaForConditionalGeneration, heads: PatchHeads, features: Tensor) -> None:
    """Bring the projector's output to one scale: root mean square 0.5, and the faint directions of the place as strong.

    `features` (B, T, D) of some images as it made them before tell the scale.
    """
    place = Lookup(heads).basis("row", "column")
    projector = model.model.multi_modal_projector.linear_2
    scale = 0.5 / features.pow(2).mean().sqrt()
    for parameter in projector.parameters():
        strengthened = scale * (parameter + 1.5 * place.T @ (place @ parameter))
        parameter.copy_(strengthened)


@torch.no_grad()
def start_words(model: LlavaForConditionalGeneration, heads: PatchHeads, tokenizer: PreTrainedTokenizerFast) -> None:
    """Start word embeddings and output rows from the class head, as CLIP's training aligns words and images.

    Outside the head's directions every token gets a vector of its own and one that all words share.
    """
    lookup = Lookup(heads)
    everything = lookup.basis(*HEADS)
    embedding, output = model.model.language_model.embed_tokens.weight, model.lm_head.weight
    nn.init.normal_(embedding, std=0.45)
    embedding -= embedding @ everything.T @ everything
    nn.init.normal_(output, std=0.02)
    singular = {plural: kind for kind, plural in PLURALS.items()}
    for name, words in HEADS.items():
        for word, row in zip(words, lookup.rows[name], strict=True):
            direction = row / row.norm()
            for form in (word, *(plural for plural, kind in singular.items() if kind == word)):
                (token,) = tokenizer.encode(f" {form}", add_special_tokens=False)
                embedding[token] += WORD * direction
                if form == word:
                    output[token] = READ * direction


@torch.no_grad()
def start_attention(model: LlavaForConditionalGeneration, heads: PatchHeads, features: Tensor, first: int = 2) -> None:
    """Start four heads of three layers as lookups; found by chance, these come late, one after another.

    Layer `first`: a word looks for image tokens of its kind, or of its colour or digit, and copies where they are (and
    what is on them). Next layer: every token copies what the words around it hold. Next layer: a place looks for its
    image tokens and copies what they are. Equal query and key projections make a head look for what is like the token.
    Other layers start with little effect.
    """
    decoder, lookup = model.model.language_model, Lookup(heads)
    size = decoder.config.head_dim
    quarter = size // 4
    # Rotary embedding turns the first dimensions of each half too fast to compare tokens a hundred places apart.
    slow = [*range(quarter, 2 * quarter), *range(3 * quarter, 4 * quarter)]
    everything = lookup.basis(*HEADS)
    # A direction that all words are given and that image tokens have least.
    seen = features.flatten(0, 1).T @ features.flatten(0, 1) / features[..., 0].numel()
    shared = torch.linalg.eigh(seen + 100 * everything.T @ everything).eigenvectors[:, 0]
    decoder.embed_tokens.weight += SHARED * shared
    for layer in decoder.layers:
        layer.mlp.down_proj.weight *= 0.3
        layer.self_attn.o_proj.weight *= 0.3

    def start(layer: int, head: int, look: Tensor, dims: Sequence[int], names: Sequence[str], gain: float) -> None:
        attention, rows = decoder.layers[layer].self_attn, slice(head * size, (head + 1) * size)
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight[rows] = 0
            projection.weight[[head * size + d for d in dims[: len(look)]]] = look
        copies = torch.zeros(size, WIDTH)
        copies[: len(lookup.basis(*names))] = lookup.basis(*names)
        attention.v_proj.weight[rows] = copies
        attention.o_proj.weight[:, rows] = gain * copies.T

    start(first, 0, lookup.basis("kind"), slow, ("row", "column"), GAIN["kind"])
    start(first, 1, lookup.basis("colour", "digit"), slow, ("row", "column", "colour", "digit"), GAIN["card"])
    start(first + 1, 0, RECENT * shared.expand(4, -1), range(3, 7), tuple(HEADS), GAIN["words"])
    start(first + 2, 0, lookup.basis("row", "column"), slow, ("kind", "colour", "digit"), GAIN["place"])
