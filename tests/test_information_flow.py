"""Information flow against stock Hugging Face: saliency by autograd and by differences, tables, and knock-outs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data_examples import encode
from tiny import tiny_llava, tiny_processor
from tiny_qwen import save_qwen
from tiny_tiles import TILED
from torch import Tensor

from himap_train import remove_pruning
from himap_train.analysis.pairs import kinds_of, softmax_attention, visible_pairs
from himap_train.analysis.saliency import answer_losses, measure
from himap_train.data.encode import IGNORED
from himap_train.data.scene_questions import SceneQuestions
from himap_train.evaluation.samples import EncodedSamples, read_samples
from himap_train.models.loading import load_llava

SCENES = SceneQuestions("validation", scenes=3, seed=3, turns=2)
KINDS_OF_MODELS = ("llava", "grouped", "qwen2_vl", "llava_next")


def made(kind: str, folder: Path, attn: str = "sdpa") -> tuple[Any, Any]:
    """A small model of a family and its processor."""
    if kind in ("llava", "grouped"):
        return tiny_llava(attn=attn, layers=3, kv_heads=4 if kind == "llava" else 2), tiny_processor()
    where = save_qwen(folder, kind, layers=3) if kind == "qwen2_vl" else TILED[kind].folder(folder, layers=3)
    return load_llava(where, attn_implementation=attn)


def single(samples: EncodedSamples) -> Any:
    (batch,) = samples.batches
    return batch


@pytest.mark.parametrize("kind", KINDS_OF_MODELS)
def test_saliency_is_what_autograd_gives_on_the_maps_of_eager_stock_layers(kind: str, tmp_path: Path) -> None:
    model, processor = made(kind, tmp_path, attn="eager")
    samples = read_samples(model, processor, SCENES, batch_size=4, each_turn=True)
    found = {(flow.id, flow.meta["turn"]): flow for flow in measure(model, samples)}
    published = {(flow.id, flow.meta["turn"]): flow for flow in measure(model, samples, "published-code")}
    remove_pruning(model)
    assert len(found) == 6 and sorted({turn for _, turn in found}) == ["1", "2"]
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    for index in range(len(SCENES)):
        sample = encode(SCENES[index], processor)
        supervised = sample["labels"] != IGNORED
        second = int((~supervised).nonzero().max()) + 1
        first = int((supervised & (torch.arange(len(supervised)) < second)).nonzero().max()) + 1
        for turn, end in (("1", first), ("2", len(supervised))):
            ids, labels = sample["input_ids"][:end], sample["labels"][:end].clone()
            if turn == "2":
                labels[:second] = IGNORED
            given = {**sample["images"][0], **({"mm_token_type_ids": (ids == processor.image_token_id)[None].int()}
                                               if kind == "qwen2_vl" else {})}  # fmt: skip
            out = model(input_ids=ids[None], labels=labels[None], output_attentions=True, **given)
            gradients = torch.autograd.grad(out.loss, out.attentions)
            image = ids == processor.image_token_id
            before = image.cumsum(0) == 0
            kinds = torch.stack([before, image, ~before & ~image & (labels == IGNORED), labels != IGNORED]).double()
            flow, other = found[sample["id"], turn], published[sample["id"], turn]
            assert torch.equal(flow.tokens, kinds.sum(1))
            assert torch.equal(flow.pairs, kinds @ torch.ones(end, end).double().tril() @ kinds.T)
            for layer, (weights, gradient) in enumerate(zip(out.attentions, gradients, strict=True)):
                weights, gradient = weights[0].detach().double(), gradient[0].double()
                saliency = (weights * gradient).sum(0).abs()
                squared = (weights**2 * gradient).abs().mean(0)
                mean = weights.mean(0)
                text_rows = kinds[2:].sum(0) @ saliency
                close = {"atol": 1e-6, "rtol": 2e-4}
                torch.testing.assert_close(flow.saliency[layer], kinds @ saliency @ kinds.T, **close)
                torch.testing.assert_close(other.saliency[layer], kinds @ squared @ kinds.T, **close)
                torch.testing.assert_close(flow.attention[layer], kinds @ mean @ kinds.T, **close)
                own = torch.stack([kinds @ saliency.diagonal(), kinds @ mean.diagonal()])
                torch.testing.assert_close(flow.own[layer], own, **close)
                torch.testing.assert_close(flow.image_to_text[layer], text_rows[image], **close)


class Nudged:
    """Attention written out, with something added to one weight of one layer after the softmax."""

    def __init__(self, visible: Tensor, layer: int, at: tuple[int, int, int], by: float) -> None:
        self.visible, self.layer, self.at, self.by = visible, layer, at, by

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        weights = softmax_attention(query, key, scaling, self.visible).clone()
        if layer == self.layer:
            weights[0, *self.at] += self.by
        return weights @ value


def test_saliency_is_what_finite_differences_of_the_loss_give() -> None:
    """The loss with a weight A + e and A - e of each head, in fp64, of what an image token gives to text."""
    model, processor = tiny_llava(layers=3, kv_heads=4), tiny_processor()
    model.double()
    batch = single(read_samples(model, processor, SceneQuestions("validation", scenes=1, seed=3)))
    (flow,) = measure(model, EncodedSamples([batch], 1, 16, 0, 0, 0))
    visible, kinds = visible_pairs(model, batch), kinds_of(model, batch)[0]
    image, text = kinds[1].nonzero()[:, 0], (kinds[2] + kinds[3]).nonzero()[:, 0]

    def loss(layer: int, at: tuple[int, int, int], by: float) -> float:
        with torch.no_grad():
            hidden = batch.states(model, Nudged(visible, layer, at, by))
            return float(answer_losses(model, hidden, batch.labels).sum())

    maps: dict[int, Tensor] = {}

    def keep(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        maps[layer] = softmax_attention(query, key, scaling, visible)
        return maps[layer] @ value

    with torch.no_grad():
        batch.states(model, keep)
    token, step = int(image[5]), 2e-3  # Llama norms in fp32, whatever the weights are: no smaller one
    for layer in range(3):
        given = 0.0
        for row in text.tolist():
            by_heads = [(loss(layer, (head, row, token), step) - loss(layer, (head, row, token), -step)) / (2 * step)
                        for head in range(4)]  # fmt: skip
            given += abs(sum(float(maps[layer][0, head, row, token]) * slope for head, slope in enumerate(by_heads)))
        assert given > 0
        assert float(flow.image_to_text[layer, 5]) == pytest.approx(given, rel=2e-3)
