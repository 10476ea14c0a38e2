"""Information flow against stock Hugging Face: saliency by autograd and by differences, tables, and knock-outs."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data_examples import encode, encode_prompt
from PIL import Image
from recipes_cli import run_recipe
from tiny import tiny_llava, tiny_processor
from tiny_qwen import save_qwen
from tiny_tiles import TILED
from torch import Tensor
from training_toys import save_tiny

from himap_train import PruningSchedule, PruningStage, install_pruning, remove_pruning
from himap_train.analysis.flow_table import flow_rows, image_over_instruction
from himap_train.analysis.knockout import Cut, cut_pairs, knock_out, windows
from himap_train.analysis.pairs import kinds_of, softmax_attention, visible_pairs
from himap_train.analysis.saliency import SampleFlow, answer_losses, measure
from himap_train.data.batches import collate
from himap_train.data.encode import IGNORED
from himap_train.data.records import Conversation, Turn
from himap_train.data.scene_questions import SceneQuestions
from himap_train.evaluation.answering import answer_batch
from himap_train.evaluation.budgeted import prompt_tokens
from himap_train.evaluation.samples import read_samples
from himap_train.models.families import family_of
from himap_train.models.loading import load_config, load_llava
from himap_train.pruning.reading import read_schedule
from himap_train.search.flow import mean_image_to_text

SCENES = SceneQuestions("validation", scenes=3, seed=3, turns=2)
KINDS_OF_MODELS = ("llava", "grouped", "qwen2_vl", "llava_next")


def made(kind: str, folder: Path, attn: str = "sdpa") -> tuple[Any, Any]:
    """A small model of a family and its processor."""
    if kind in ("llava", "grouped"):
        return tiny_llava(attn=attn, layers=3, kv_heads=4 if kind == "llava" else 2), tiny_processor()
    where = save_qwen(folder, kind, layers=3) if kind == "qwen2_vl" else TILED[kind].folder(folder, layers=3)
    return load_llava(where, attn_implementation=attn)


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


class Listed:
    """A source of given records."""

    def __init__(self, *records: Conversation) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Conversation:
        return self.records[index]


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
    model, processor = tiny_llava(layers=2, kv_heads=4), tiny_processor()
    model.double()
    short = Conversation("short", SCENES[0].images, (Turn("user", "<image>\nHm?"), Turn("assistant", "no")))
    samples = read_samples(model, processor, Listed(short))
    (flow,), (batch,) = measure(model, samples), samples.batches
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
    for layer in range(2):
        given = 0.0
        for row in text.tolist():
            by_heads = [(loss(layer, (head, row, token), step) - loss(layer, (head, row, token), -step)) / (2 * step)
                        for head in range(4)]  # fmt: skip
            given += abs(sum(float(maps[layer][0, head, row, token]) * slope for head, slope in enumerate(by_heads)))
        assert given > 0
        assert float(flow.image_to_text[layer, 5]) == pytest.approx(given, rel=2e-3)


def test_the_model_is_as_it_was_afterwards() -> None:
    model = tiny_llava(layers=2)
    model.lm_head.weight.requires_grad_(False)
    model.model.language_model.layers[1].train()
    samples = read_samples(model, tiny_processor(), SCENES)
    measure(model, samples)
    layers = model.model.language_model.layers
    assert [layer.training for layer in layers] == [False, True]
    assert not any("forward" in layer.__dict__ for layer in layers)
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == ["lm_head.weight"]


def test_nothing_takes_the_place_of_the_attention_of_a_pruned_decoder() -> None:
    model = tiny_llava(layers=2)
    (batch,) = read_samples(model, tiny_processor(), SCENES).batches
    install_pruning(model, PruningSchedule((PruningStage(1, "random", 0.5),)))
    with pytest.raises(ValueError, match="own_attention means nothing to a pruned decoder"):
        batch.states(model, lambda *given: None)


def test_samples_longer_than_a_sliding_window_are_refused() -> None:
    model = tiny_llava("mistral", layers=2)
    samples = read_samples(model, tiny_processor(), SCENES)
    model.config.text_config.sliding_window = model.model.language_model.config.sliding_window = 20
    with pytest.raises(ValueError, match="in a sliding window of 20"):
        measure(model, samples)


def test_on_the_embedded_model_text_takes_from_the_image_in_layers_2_to_4() -> None:
    model, processor = load_llava("embedded")
    flow = mean_image_to_text(measure(model, read_samples(model, processor, SceneQuestions("validation", scenes=14))))
    assert sum(flow[2:5]) > 0.5 * sum(flow)
    assert sum(flow[6:]) < 0.2 * sum(flow)


def test_the_picture_is_of_the_first_record_though_ids_repeat() -> None:
    """Batches are in order of length."""
    model, processor = load_llava("embedded")

    class Repeated:
        """Three scenes that are all called 0, the longest question first."""

        scenes = SceneQuestions("validation", scenes=3)
        asked = sorted(scenes, key=lambda found: -len(found.turns[0].text))[:3]

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            return replace(self.asked[index], id="0")

    drawn = read_samples(model, processor, Repeated())
    assert drawn.first.turns == Repeated.asked[0].turns and drawn.first_place > 0
    place, width = drawn.first_place, drawn.batches[0].texts["input_ids"].shape[1]
    alone = drawn.encoder.encode(drawn.first)["input_ids"]
    assert torch.equal(drawn.batches[0].texts["input_ids"][place][: len(alone)], alone) and len(alone) <= width


def test_budgets_are_of_prompts_however_long_the_answers() -> None:
    model, processor = load_llava("embedded")
    source = SceneQuestions("validation", scenes=7)

    class Long:
        """The same questions, answered with many words."""

        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, index: int) -> Any:
            found = source[index]
            return replace(found, turns=(*found.turns[:-1], replace(found.turns[-1], text="red " * 60)))

    short, long = (read_samples(model, processor, one) for one in (source, Long()))
    assert short.tokens == long.tokens and long.supervised > 50 * 7
    assert short.tokens == dict(zip(("image_tokens", "text_tokens"), prompt_tokens(source, processor), strict=True))


# ---- tables ----


def table(*given: Any) -> dict[tuple[str, int, str], SimpleNamespace]:
    """Rows of `flow_rows` by group, layer and flow."""
    return {(row["group"], row["layer"], row["flow"]): SimpleNamespace(**row) for row in flow_rows(*given)}


def made_flow(name: str, meta: dict[str, str], scale: float = 1.0) -> SampleFlow:
    """Two layers; 2 tokens of the system, 4 of the image, 2 of the instruction, 1 of the answer, in this order."""
    tokens = torch.tensor([2.0, 4.0, 2.0, 1.0]).double()
    pairs = torch.outer(tokens, tokens).tril(-1) + torch.diag(tokens * (tokens + 1) / 2)
    saliency = scale * torch.arange(1.0, 33.0).double().view(2, 4, 4) * (pairs > 0)
    saliency[1, :2] = 0  # the last layer's rows that predict nothing
    attention = pairs / 9
    own = torch.stack([saliency.diagonal(dim1=1, dim2=2), attention.diag().expand(2, 4)], 1) / 2
    to_text = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 6.0, 0.0]]).double()
    return SampleFlow(name, meta, tokens, pairs, saliency, attention.expand(2, 4, 4), own, to_text)


def test_flows_under_three_normalisations() -> None:
    rows = {key[1:]: row for key, row in table([made_flow("a", {})]).items()}
    assert len(rows) == 16
    # Layer 0 holds 1 to 16, target by source; image tokens give 6 to themselves, 10 to instruction, 14 to the answer.
    found = rows[0, "S_vv"]
    assert (found.none, found.sources, found.pairs, found.zero) == (6, 6 / 4, 6 / 10, "")
    assert found.attention == pytest.approx(10 / 9 / 4)
    found = rows[0, "S_vt"]
    assert (found.none, found.sources, found.pairs) == (24, 24 / 4, 24 / 12)
    assert found.attention == pytest.approx(12 / 9 / 3)
    assert (rows[0, "S_tt"].none, rows[0, "S_tt"].pairs) == (11 + 15 + 16, 42 / (3 + 2 + 1))
    assert rows[0, "S_img"].none == 6 + 10 + 14 and rows[0, "S_ins"].sources == (11 + 15) / 2
    found = rows[0, "S_vv_others"]
    assert (found.none, found.pairs) == (3, 3 / 6) and found.attention == pytest.approx(5 / 9 / 4)
    assert rows[1, "S_vt"].none == 26 + 30
    ratios = image_over_instruction(flow_rows([made_flow("a", {})]))
    assert ratios["none"] == pytest.approx((30 + 26 + 30) / (26 + 27 + 31))
    assert ratios["sources"] == pytest.approx(ratios["none"] * 2 / 4)


def test_what_is_zero_says_why() -> None:
    flow = made_flow("a", {})
    zeros = {key[1:]: row.zero for key, row in table([flow]).items()}
    assert {key for key, zero in zeros.items() if zero == "causality"} == {(0, "S_tv"), (1, "S_tv")}
    assert {key for key, zero in zeros.items() if zero == "last layer"} == {(1, "S_vv"), (1, "S_vv_others")}
    none = replace(flow, tokens=flow.tokens * torch.tensor([0, 1, 1, 1]), pairs=flow.pairs.clone())
    none.pairs[:, 0] = 0
    rows = table([none])
    assert [rows["all", layer, "S_sys"].zero for layer in (0, 1)] == ["no such tokens"] * 2


def test_the_published_code_sums_what_a_kind_takes() -> None:
    rows = {key[1:]: row.none for key, row in table([made_flow("a", {})], "published-code").items()}
    assert (rows[0, "S_img"], rows[0, "S_ins"]) == (5 + 6, 9 + 10 + 11)
    assert rows[0, "S_vt"] == 24


def test_groups_are_types_and_turns_where_there_are_several() -> None:
    flows = [made_flow("a", {"type": "where", "turn": "1"}), made_flow("b", {"turn": "2"}, 3.0)]
    groups = {group: row.none for (group, *rest), row in table(flows).items() if rest == [0, "S_vv"]}
    assert groups == {"all": 12, "turn 1": 6, "turn 2": 18}
    flows.append(made_flow("c", {"type": "count", "turn": "1"}, 5.0))
    groups = {group: row.none for (group, *rest), row in table(flows).items() if rest == [0, "S_vv"]}
    assert groups == {"all": 18, "type count": 30, "type where": 6, "turn 1": 18, "turn 2": 18}
    even, one = (table(flows)["all", layer, "S_vt"] for layer in (0, 1))
    assert (even.tenth, even.effective) == (0.25, pytest.approx(1.0))
    assert (one.tenth, one.effective) == (1.0, pytest.approx(0.25))


# ---- knock-outs ----


def test_cuts_and_their_controls() -> None:
    kinds = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 3, -1])
    kinds = torch.stack([(kinds == kind).float() for kind in range(4)])[None]
    visible = torch.ones(10, 10).tril().bool()[None]
    cuts = {name: pairs[0] for name, pairs in cut_pairs(kinds, visible, torch.Generator().manual_seed(0)).items()}
    assert not any(bool((pairs & ~visible[0]).any() or pairs.diagonal().any()) for pairs in cuts.values())
    assert cuts["image-to-text"].sum(1).tolist() == [0] * 6 + [4] * 3 + [0]
    assert cuts["image-to-text"].sum(0).tolist() == [0, 0, 3, 3, 3, 3, 0, 0, 0, 0]
    assert cuts["image-to-image"].sum(1).tolist() == [0, 0, 0, 1, 2, 3, 0, 0, 0, 0]
    for control, cut in (("random-to-text", "image-to-text"), ("random-to-image", "image-to-image")):
        assert torch.equal(cuts[control].sum(1), cuts[cut].sum(1))
        assert not torch.equal(cuts[control], cuts[cut])
    rows = cuts["image-to-random"].any(1)
    assert int(rows.sum()) == 3 and not cuts["image-to-random"][:, [0, 1, 6, 7, 8, 9]].any()


@pytest.mark.parametrize("kind", ["grouped", "qwen2_vl"])
def test_a_cut_is_what_a_mask_does_to_the_stock_model(kind: str, tmp_path: Path) -> None:
    model, processor = made(kind, tmp_path)
    (batch,) = read_samples(model, processor, SCENES).batches
    install_pruning(model, PruningSchedule())
    visible = visible_pairs(model, batch)
    taken = cut_pairs(kinds_of(model, batch), visible, torch.Generator().manual_seed(0))["image-to-text"]
    kept = visible & ~taken
    with torch.no_grad():
        cut = batch.states(model, Cut(kept, visible, range(3), renormalise=True))
        first = batch.states(model, Cut(kept, visible, range(1), renormalise=True))
        lost = batch.states(model, Cut(kept, visible, range(3), renormalise=False))
        none = batch.states(model, Cut(visible, visible, range(3), renormalise=False))
        whole = batch.states(model)
        remove_pruning(model)
        bias = torch.where(kept, 0.0, torch.finfo(torch.float32).min)[:, None]
        texts = {**batch.texts, "attention_mask": bias}
        texts.pop("labels")
        family = family_of(model)
        given = family.forward_inputs(model.config, batch.texts["input_ids"], batch.sizes) | batch.sizes
        if kind == "qwen2_vl":  # which counts positions by a mask of two dimensions
            given["position_ids"] = model.model.get_rope_index(
                input_ids=batch.texts["input_ids"], attention_mask=batch.texts["attention_mask"], **given
            )[0]
        stock = model.model(**texts, mm_encoder_outputs={"image": batch.encoded}, **given).last_hidden_state
    real = batch.texts["attention_mask"].bool()
    torch.testing.assert_close(cut[real], stock[real], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(none[real], whole[real], atol=2e-5, rtol=1e-4)
    text = taken.any(2)
    assert float((first - cut)[text].abs().amax()) > 1e-2, "a window ends"
    assert float((lost - cut)[text].abs().amax()) > 1e-2, "what is cut is lost, not shared"
    before = kinds_of(model, batch)[:, 1].bool()
    torch.testing.assert_close(cut[before], whole[before], atol=2e-5, rtol=1e-4)


def test_answers_are_right_where_greedy_decoding_gives_them() -> None:
    model, processor = load_llava("embedded")
    source = SceneQuestions("validation", scenes=6)
    none, cut = knock_out(model, read_samples(model, processor, source, batch_size=3), [range(8)])[:2]
    assert (none.cut, none.layers, none.overlap) == ("none", range(0), 0.0) and none.consistent.all()
    assert (cut.cut, cut.layers) == ("image-to-text", range(8))
    assert cut.accuracy < none.accuracy and not cut.consistent.all()
    encoded = [encode_prompt(source[index], processor) for index in range(6)]
    batch = collate(encoded, 0, padding_side="left")
    answers, _ = answer_batch(model, processor, batch, 8)
    right = [answer == sample["answer"] for answer, sample in zip(answers, encoded, strict=True)]
    assert sum(right) == int(none.right.sum())


def test_windows() -> None:
    assert windows(8, 2) == [*(range(start, start + 2) for start in range(7)), range(8)]
    assert windows(32, 8)[:3] == [range(0, 8), range(4, 12), range(8, 16)]
    assert windows(6, 6) == [range(6)]
    assert windows(9, 4)[-3:] == [range(4, 8), range(5, 9), range(9)]
    with pytest.raises(ValueError, match="give 1 to 8"):
        windows(8, 9)


# ---- recipes/information_flow.py ----


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "llava_next"])
def test_the_recipe_leaves_tables_figures_and_a_schedule(kind: str, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if kind == "llava":
        checkpoint = save_tiny(folder)
    else:
        checkpoint = save_qwen(folder, kind) if kind == "qwen2_vl" else TILED[kind].folder(folder)
    out = tmp_path / "out"
    options = ["--checkpoint", checkpoint, "--data", "embedded:validation?scenes=3&turns=2", "--output", out]
    window, number = (3, 5) if kind == "llava" else (6, 1)
    assert run_recipe("information_flow", *options, "--window", window, "--budget", 0.9) == 0
    said = capsys.readouterr().out
    assert "S_img / S_ins" in said and "image-to-random" in said
    names = ["flow.csv", "flow.json", "flow.png", "knockouts.csv", "map.png", "schedule-0.90.yaml"]
    assert sorted(path.name for path in out.iterdir()) == names
    flow, cuts = (list(csv.DictReader((out / name).open())) for name in ("flow.csv", "knockouts.csv"))
    assert {row["group"] for row in flow} >= {"all", "turn 1", "turn 2"}
    assert {row["zero"] for row in flow if row["flow"] == "S_tv" and row["group"] == "all"} == {"causality"}
    assert len([row for row in cuts if row["group"] == "all"]) == 1 + 5 * number
    schedule = read_schedule(out / "schedule-0.90.yaml")
    facts = json.loads((out / "flow.json").read_text())
    cost = schedule.cost(load_config(checkpoint), facts["image_tokens"], facts["text_tokens"])
    assert cost.flops_ratio == pytest.approx(0.9, rel=0.02)
    assert Image.open(out / "map.png").width > 1000
    assert run_recipe("information_flow", *options) == 2, "results that are there stay"
