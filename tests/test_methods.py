"""Methods through the decoder, in ragged batches, against brute force; and what holds for all of them."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import RAGGED, RAGGED_ANSWERS, make_case
from checks import assert_equals_naive
from hypothesis import example, given, settings
from hypothesis import strategies as st
from naive import even_runs, farthest_first
from tiny import tiny_llava

from himap_train import Count, Mass, PruningSchedule, PruningStage, Ratio, install_pruning, load_llava, record_pruning
from himap_train.data.scene_questions import SceneQuestions
from himap_train.models.foresight import make_scorers
from himap_train.pruning import methods
from himap_train.pruning.layout import build_layout
from himap_train.pruning.methods import METHODS, coverage, divprune, read_method
from himap_train.pruning.methods.base import Reads, Seen, with_scores
from himap_train.pruning.methods.divprune import farthest_first as batched_farthest_first
from himap_train.pruning.places import Places, TokenGrid

NEW = ("first-k", "divprune", "average-pool", "coverage", "dart", "image_stratified", "sparsevlm", "visionzip")
NO_ATTENTION = [name for name, method in METHODS.items() if method.reads not in (Reads.ATTENTION, Reads.KEYS)]


def schedule(*stages: tuple[int, Any, Any], **more: Any) -> PruningSchedule:
    keeps = ((layer, by, {"keep_count" if isinstance(size, int) else "keep_ratio": size}) for layer, by, size in stages)
    return PruningSchedule(tuple(PruningStage(layer, by, **size) for layer, by, size in keeps), **more)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labels", [False, True], ids=["prompt", "labels"])
@pytest.mark.parametrize("name", NEW)
def test_new_methods_equal_the_oracle(name: str, labels: bool, side: str) -> None:
    model = tiny_llava()
    case = make_case(model, RAGGED_ANSWERS if labels else RAGGED, side, seed=2)
    assert_equals_naive(model, schedule((2, name, 0.5), (4, name, 0.2)), case, labels)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("name", [*NEW, "stride"])
def test_behind_another_stage_and_by_count(name: str, positions: str) -> None:
    model = tiny_llava()
    case = make_case(model, RAGGED, "left", seed=4)
    assert_equals_naive(model, schedule((1, "instruction", 0.7), (3, name, 5), positions=positions), case)
    assert_equals_naive(model, schedule((1, name, 11), (3, "image", 4), positions=positions), case)


@pytest.mark.parametrize("name", ["divprune", "coverage", "learned"])
def test_autocast_chooses_what_inference_chooses(name: str) -> None:
    """Features have much in common, so that cosines in bfloat16 say little."""
    model = tiny_llava()
    decoder, width = model.model.language_model, model.config.text_config.hidden_size
    generator = torch.Generator().manual_seed(0)
    kinds, own, common = (torch.randn(1, n, width, generator=generator) for n in (20, 200, 1))
    states = kinds.repeat_interleave(10, 1) + 0.7 * own + 4 * common
    image = torch.arange(200).unsqueeze(0) < 180
    chosen = []
    for mixed in (False, True):
        install_pruning(model, schedule((0, name, 20)))
        torch.manual_seed(0)
        make_scorers(model, model.model.language_model.himap_pruning.schedule)
        with record_pruning(model) as trace, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            decoder(inputs_embeds=states, image_token_mask=image)
        chosen.append(trace.kept[0][0].tolist())
    assert chosen[0] == chosen[1] and len(chosen[0]) == 40


def test_where_none_stays_nothing_is_chosen_or_merged() -> None:
    model = tiny_llava()
    case = make_case(model, RAGGED, "left")
    for name in (*NEW, "instruction", "image", "last_token"):
        assert_equals_naive(model, schedule((2, name, 0.0)), case)


def test_all_that_there_is_changes_nothing() -> None:
    """To the last bit: a mean over one token is that token."""
    model = tiny_llava()
    case = make_case(model, RAGGED, "left")
    with torch.no_grad():
        stock = model(**case.inputs()).logits
        for name in METHODS:
            install_pruning(model, schedule((2, name, 1.0)))
            assert torch.equal(
                model(**case.inputs()).logits[case.attention_mask.bool()], stock[case.attention_mask.bool()]
            )


@pytest.mark.parametrize("labels", [False, True], ids=["prompt", "labels"])
@pytest.mark.parametrize(
    "criterion",
    [
        {"name": "coverage", "text_weight": 0},
        {"name": "coverage", "image_weight": 0, "text_temperature": 0.1},
        *({"name": name, "window": 2} for name in ("instruction", "last_token", "image", "image_debiased")),
        {"name": "image", "window": 3},
        {"name": "sparsevlm", "recycle": 1},
        {"name": "sparsevlm", "recycle": 0, "window": 2},
        {"name": "image_stratified", "window": 2},
        {"name": "visionzip", "contextual": 0.6},
        {"name": "visionzip", "contextual": 0.0},
        {"name": "dart", "image_pivots": 2, "text_pivots": 0},
        {"name": "dart", "image_pivots": 1, "text_pivots": 4},
        {"name": "coverage", "text_weight": 2.0, "text_temperature": 0.05, "image_temperature": 0.5},
    ],
    ids=str,
)
def test_parameters_equal_the_oracle(criterion: dict[str, Any], labels: bool) -> None:
    model = tiny_llava()
    case = make_case(model, RAGGED_ANSWERS if labels else RAGGED, "left", seed=6)
    assert_equals_naive(model, schedule((2, criterion, 0.6), (4, criterion, 3)), case, labels)


def test_choices_made_in_blocks_equal_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divprune, "_BLOCK", 5)
    monkeypatch.setattr(coverage, "_ROWS", 3)
    model = tiny_llava()
    for name in ("divprune", "coverage"):
        assert_equals_naive(model, schedule((2, name, 0.5), (4, name, 0.2)), make_case(model, RAGGED, "left", seed=2))
    states = torch.nn.functional.normalize(torch.randn(2, 13, 4), dim=2)
    found = divprune.all_cosines(states)
    torch.testing.assert_close(found, states @ states.transpose(1, 2))
    assert torch.equal(found, found.transpose(1, 2)) and divprune.computed_pairs(13) == 5 * 13 + 5 * 8 + 3 * 3


def test_several_clusters_of_recycled_tokens_equal_the_oracle() -> None:
    """Of 101 tokens that leave 30 and four of the places that stay become four means."""
    model = tiny_llava()
    case = make_case(model, ["t3 i144 t6", "t2 i81 t4", "t1 i9 t2"], "left", seed=8)
    kept = assert_equals_naive(model, schedule((2, "sparsevlm", 0.3), (4, "sparsevlm", 0.15)), case)
    assert [len(row) - 9 for row in (kept[0][0], kept[1][0])] == [43, 22]


@settings(max_examples=60, deadline=None)
@example(seed=127, tokens=2, number=0, first=1)  # all others of a token come first
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 14), number=st.integers(0, 15), first=st.integers(0, 3))
def test_farthest_points_one_by_one(seed: int, tokens: int, number: int, first: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, 5, generator=draw, dtype=torch.float64)
    must = sorted(torch.randperm(tokens, generator=draw)[: min(first, tokens)].tolist())
    number = max(min(number, tokens), len(must))
    distance = 1 - torch.cosine_similarity(states[:, None], states[None], dim=2)[None]  # nearest neighbours tie
    real = torch.ones(1, tokens, dtype=torch.bool)
    flags = torch.zeros(1, tokens, dtype=torch.bool)
    flags[0, must] = True
    distance[0, :, must] = torch.inf
    order = batched_farthest_first(distance, real, flags, number)[0]
    found = [int((order == step).nonzero()) for step in range(number)]
    assert found == farthest_first(states, list(range(tokens)), must, number)[:number]
    assert (order >= number).sum() == tokens - number


@settings(max_examples=100, deadline=None)
@given(tokens=st.integers(1, 40), data=st.data())
def test_pooled_runs_are_even_and_cover_all(tokens: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, tokens))
    layout, counts = build_layout(
        torch.ones(1, tokens + 1, dtype=torch.bool).index_fill_(1, torch.tensor([tokens]), False)
    )
    method, seen = read_method("average-pool"), Seen(layout, counts)
    kept = torch.tensor([[count]])
    ranks = method.choose(seen, kept)
    keep = (ranks < count) & layout.image
    pool = method.pool(seen, keep, kept)
    assert pool is not None and int(keep.sum()) == count
    runs = even_runs(list(range(tokens)), count)
    for run in runs:
        assert pool.keeper[0, run].tolist() == [run[(len(run) - 1) // 2]] * len(run)
        torch.testing.assert_close(pool.share[0, run], torch.full((len(run),), 1 / len(run)))
    assert {len(run) for run in runs} <= {tokens // count, -(-tokens // count)}


def test_llavoltas_stride_is_an_average_pool() -> None:
    """Kernel and stride 8 of 1-D pooling over 144 tokens, as torch computes it."""
    model = tiny_llava()
    case = make_case(model, ["t3 i144 t4"])
    install_pruning(model, schedule((0, "average-pool", 0.125)))
    seen: list[torch.Tensor] = []
    model.model.language_model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**case.inputs())
    pooled = torch.nn.functional.avg_pool1d(torch.stack(case.features).transpose(1, 2), 8, 8).transpose(1, 2)
    torch.testing.assert_close(seen[0][:, 3:21], pooled)


@pytest.mark.parametrize("name", METHODS)
def test_written_and_read_again(name: str) -> None:
    stage = PruningStage(2, name, 0.5)
    assert PruningStage.from_dict(stage.to_dict()) == stage == PruningStage(2, {"name": name}, keep=Ratio(0.5))
    assert stage.criterion == name and str(stage.method) == name


def test_parameters_are_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import dataclass
    from typing import ClassVar

    @dataclass(frozen=True)
    class Weighted(METHODS["first-k"]):  # type: ignore[misc, valid-type]
        name: ClassVar[str] = "weighted"
        weight: float = 0.5

    monkeypatch.setitem(methods.METHODS, "weighted", Weighted)
    stage = PruningStage(2, {"name": "weighted", "weight": 0.25}, 0.5)
    assert stage.to_dict() == {"layer": 2, "criterion": {"name": "weighted", "weight": 0.25}, "keep_ratio": 0.5}
    assert PruningStage.from_dict(stage.to_dict()) == stage and stage.criterion == "weighted(weight=0.25)"
    with pytest.raises(ValueError, match="weighted has the unknown key 'wieght'; did you mean 'weight'"):
        PruningStage(2, {"name": "weighted", "wieght": 0.25}, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"layer": 2, "criterion": "instuction", "keep_ratio": 0.5},
            "'instuction' is unknown; did you mean 'instruction",
        ),
        ({"layer": 2, "criterion": {"nme": "image"}, "keep_ratio": 0.5}, "criterion has no 'name'; found .*'nme'"),
        (
            {"layer": 2, "criterion": {"name": "image", "a": 1}, "keep_ratio": 0.5},
            "criterion image has the unknown key 'a'",
        ),
        ({"layer": 2, "keep_ratio": 0.5}, "no criterion; valid: instruction"),
        (
            {"layer": 2, "criterion": {"name": "coverage", "text_temperature": 0}, "keep_ratio": 0.5},
            "coverage: text_temperature is 0; expected a number above 0",
        ),
        (
            {"layer": 2, "criterion": {"name": "dart", "image_pivots": 0}, "keep_ratio": 0.5},
            "dart: image_pivots is 0; expected an integer of 1 or more",
        ),
        (
            {"layer": 2, "criterion": {"name": "image", "window": -2}, "keep_ratio": 0.5},
            "image: window is -2; expected the side of a window",
        ),
        (
            {"layer": 2, "criterion": {"name": "sparsevlm", "recycle": 1.5}, "keep_ratio": 0.5},
            "sparsevlm: recycle is 1.5; expected 0 to 1",
        ),
        (
            {"layer": 2, "criterion": {"name": "visionzip", "contextual": 2}, "keep_ratio": 0.5},
            "visionzip: contextual is 2; expected 0 to 1",
        ),
        (
            {"layer": 2, "criterion": {"name": "image_stratified", "window": 0}, "keep_ratio": 0.5},
            "image_stratified: window is 0; expected 1 or more",
        ),
        (
            {"layer": 2, "criterion": {"name": "image", "window": 2}, "keep": Mass(0.9)},
            "chooses by more than its scores, so there is no mass to keep",
        ),
        ({"layer": 0, "criterion": "dart", "keep_ratio": 0.5}, "'dart', which reads the keys of the layer before"),
        (
            {"layer": 2, "criterion": {"name": "coverage", "image_weight": -1}, "keep_ratio": 0.5},
            "coverage: image_weight is -1; expected 0 or more",
        ),
        (
            {"layer": 2, "criterion": {"name": "coverage", "image_weight": 0, "text_weight": 0.0}, "keep_ratio": 0.5},
            "text_weight and image_weight are 0",
        ),
        ({"layer": 0, "criterion": "image", "keep_ratio": 0.5}, "layer 0 is before the decoder.*uniform.*divprune"),
        ({"layer": -1, "criterion": "image", "keep_ratio": 0.5}, "layer is -1; expected an integer of 0 or more"),
        ({"layer": 2, "criterion": "divprune", "keep": Mass(0.9)}, "reads no attention, so there is no mass to keep"),
        ({"layer": 2, "criterion": "image", "keep": Ratio(0.5), "keep_count": 3}, "give exactly one of them"),
        ({"layer": 2, "criterion": "image", "keep_ratio": 1.5}, "keep_ratio is 1.5; expected 0 to 1.*at layer 2"),
        ({"layer": 2, "criterion": "image", "keep_count": 2.5}, "keep_count is 2.5; expected an integer.*at layer 2"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruningStage(**arguments)


@pytest.mark.parametrize("keep", [Ratio(0.3), Count(7), Mass(0.9, at_least=0.1, at_most=0.5)])
def test_keep_rules_round_trip(keep: Any) -> None:
    stage = PruningStage(3, "image", keep=keep)
    assert PruningStage.from_dict(stage.to_dict()).keep == keep


def test_costs_of_choosing_count() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4)
    nothing = schedule((2, "first-k", 0.25)).cost(config, 100, 20).flops
    extra = {name: schedule((2, name, 0.25)).cost(config, 100, 20).flops - nothing for name in METHODS}
    assert extra["divprune"] == 2 * 100 * 100 * 64 and extra["average-pool"] == 2 * 100 * 64
    assert extra["sparsevlm"] == 2 * extra["instruction"]
    assert extra["coverage"] == 2 * 120 * 100 * 64
    assert extra["visionzip"] == 2 * 100 * 4 * 64
    assert extra["dart"] == 2 * 15 * 100 * 64
    assert extra["instruction"] == 2 * 20 * 120 * 64 and extra["last_token"] == 2 * 120 * 64
    assert extra["image"] == extra["image_debiased"] == extra["image_stratified"] == 2 * 100 * 120 * 64
    assert extra["random"] == extra["uniform"] == 0
    first = schedule((0, "divprune", 0.25)).cost(config, 100, 20)
    assert first.image_tokens_per_layer == (25,) * 8
    assert schedule((0, "divprune", 0.0)).cost(config, 100, 20).flops < first.flops


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].reads is not Reads.NOTHING])
def test_what_it_costs_is_what_pytorch_counts(name: str) -> None:
    """The matrix products of choosing alone, on the whole forward's counter, with and without the choice."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_llava(kv_heads=4, hidden=64)
    case = make_case(model, ["t1 i60 t40"])
    found = {}
    for by in (name, "first-k"):
        install_pruning(model, schedule((2, by, 0.25)))
        make_scorers(model, schedule((2, by, 0.25)))
        # The counter knows no CPU kernel of attention.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(**case.inputs())
        found[by] = counter.get_total_flops()
    plan = {by: schedule((2, by, 0.25)).cost(model.config, 60, 41).flops for by in found}
    counted, planned = found[name] - found["first-k"], plan[name] - plan["first-k"]
    # Image rows come before the text, whose columns their blocks leave out: the plan is an upper bound there.
    assert counted <= planned * 1.01 and counted >= planned * (0.85 if name.startswith("image") else 0.95)


def test_nothing_outside_methods_compares_a_criterions_name() -> None:
    """A method is its file, a line in `methods/__init__.py` and its test."""
    root = Path(methods.__file__).parents[2]
    names = set(METHODS)
    compared = []
    for file in root.rglob("*.py"):
        if "methods" in file.relative_to(root).parts:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                strings = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
                about = re.search(r"criteri|method", ast.unparse(node))
                if strings & names and about:
                    compared.append(f"{file.relative_to(root)}:{node.lineno}")
    assert compared == []


def test_teacher_forcing_chooses_what_the_prefill_chooses() -> None:
    for name in sorted({*METHODS} - {"random"}):
        for layer in (0, 2) if name in NO_ATTENTION else (2,):
            model = install_pruning(tiny_llava(), schedule((layer, name, 0.4)))
            make_scorers(model, schedule((layer, name, 0.4)))
            prompt, whole = make_case(model, ["t3 i16 t5"]), make_case(model, ["t3 i16 t5 a6"])
            kept = []
            for case, labels in ((prompt, False), (whole, True)):
                with torch.no_grad(), record_pruning(model) as trace:
                    model(**case.inputs(labels))
                kept.append([c for c in trace.kept[0][0].tolist() if 3 <= c < 19])
            assert kept[0] == kept[1], (name, layer)


def test_windows_of_a_picture_keep_alike() -> None:
    """Of 24 x 24 tokens a quarter: four of each window of 4 x 4, its best; of 100, two or three."""
    layout, counts = build_layout(torch.tensor([[False] * 3 + [True] * 576 + [False] * 4]))
    layout = replace(layout, places=Places.of(layout.image, [TokenGrid(24, 24)]))
    scores = torch.rand(1, 583, generator=torch.Generator().manual_seed(5))
    method = read_method({"name": "last_token", "window": 4})
    for kept in (144, 100, 36):
        ranks = method.choose(Seen(layout, counts, scores=scores), torch.tensor([[kept]]))[:, 3:579].view(24, 24)
        grid, stay = scores[:, 3:579].view(24, 24), ranks < kept
        blocks = [(slice(4 * y, 4 * y + 4), slice(4 * x, 4 * x + 4)) for y in range(6) for x in range(6)]
        numbers = [int(stay[block].sum()) for block in blocks]
        assert sum(numbers) == kept and max(numbers) - min(numbers) <= 1
        assert all(grid[block][stay[block]].min() > grid[block][~stay[block]].max() for block in blocks)


def test_a_choice_by_region_is_not_one_by_position() -> None:
    """Overlap with the first and the last k of 144 tokens on the embedded model, 22 of them kept: chance is .15."""
    model, processor = load_llava("embedded")
    questions = [SceneQuestions("validation", scenes=6, seed=3)[number] for number in range(6)]
    image_id = model.config.image_token_id

    def overlap(criterion: str, layer: int) -> tuple[float, float]:
        install_pruning(model, schedule((layer, criterion, 22)))
        first, last = [], []
        for question in questions:
            text = question.turns[0].text.removeprefix("<image>\n")
            content = [{"type": "image"}, {"type": "text", "text": text}]
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            inputs = processor(text=prompt, images=question.images[0], return_tensors="pt")
            with torch.no_grad(), record_pruning(model) as trace:
                model(**inputs)
            columns = (inputs["input_ids"][0] == image_id).nonzero()[:, 0].tolist()
            kept = {columns.index(column) for column in trace.kept[0][0].tolist() if column in columns}
            first.append(len(kept & set(range(22))) / 22)
            last.append(len(kept & set(range(122, 144))) / 22)
        return sum(first) / len(first), sum(last) / len(last)

    for layer in (1, 2):
        assert overlap("first-k", layer) == (1.0, 0.0)
        assert max(overlap("image", layer)) > 0.5 and max(overlap("image_debiased", layer)) > 0.4
        assert max(overlap("image_stratified", layer)) < 0.3


def test_scores_are_of_no_use_where_a_set_is_chosen() -> None:
    layout, counts = build_layout(torch.tensor([[False, True, True, True, False]]))
    states = torch.eye(5)[None]
    seen = with_scores(read_method("divprune"), Seen(layout, counts, states=states))
    assert seen.scores is None
    ranks = read_method("divprune").choose(seen, torch.tensor([[2]]))
    assert ranks[0, 1:4].tolist() == [0, 1, 3]  # ties to the earlier token; what is not chosen comes behind all
