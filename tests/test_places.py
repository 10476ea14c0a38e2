"""Where image tokens lie in their pictures, and the choice that is even over them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import make_case
from data_examples import picture
from tiny import tiny_llava
from tiny_qwen import KINDS, save_qwen
from tiny_tiles import EVERY
from torch.nn import functional as F

from himap_train import PruningSchedule, PruningStage, install_pruning, load_llava, record_pruning
from himap_train.models.families import family_of
from himap_train.pruning.places import Places, TokenGrid, even_order


def by_hand(rows: int, columns: int) -> list[tuple[int, int]]:
    """Farthest points, from the middle; of those at one distance the least crowded for its place, then the earlier."""
    points = [(row, column) for row in range(rows) for column in range(columns)]
    middle = ((rows - 1) / 2, (columns - 1) / 2)
    chosen = [min(points, key=lambda point: (round(math.dist(point, middle) ** 2 * 4), points.index(point)))]
    full = {p: sum(2**40 // max((p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2, 1) for q in points) for p in points}
    while len(chosen) < len(points):
        left = [point for point in points if point not in chosen]
        squares = {point: [(point[0] - c[0]) ** 2 + (point[1] - c[1]) ** 2 for c in chosen] for point in left}
        crowd = {point: sum(2**40 // square for square in squares[point]) / full[point] for point in left}
        chosen.append(max(left, key=lambda point: (min(squares[point]), -crowd[point], -points.index(point))))
    return chosen


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 5), (6, 6), (12, 12)])
def test_sequence_is_that_of_farthest_points(shape: tuple[int, int]) -> None:
    order = even_order(*shape).view(shape)
    assert [divmod(int(place), shape[1]) for place in order.flatten().argsort()] == by_hand(*shape)


@pytest.mark.parametrize("kept, hole", [(12, 3.2), (29, 2.3), (36, 2.3)])
def test_no_part_of_the_picture_is_far_from_a_kept_token(kept: int, hole: float) -> None:
    """12 of 144 by stride are one column: the other end of the picture is 11 patches away."""
    points = by_hand(12, 12)
    assert max(min(math.dist(point, chosen) for chosen in points[:kept]) for point in points) <= hole


@pytest.mark.parametrize("kept", range(16, 144, 8))
@pytest.mark.parametrize("shape", [(12, 12), (9, 16)])
def test_every_part_of_the_picture_keeps_its_share(kept: int, shape: tuple[int, int]) -> None:
    chosen = even_order(*shape).view(shape) < kept
    for parts in (chosen.tensor_split(3, 0), chosen.tensor_split(3, 1)):  # bands of a third
        shares = [float(part.float().mean()) for part in parts]
        assert max(shares) - min(shares) <= 0.13, shares


def kept_columns(model: Any, schedule: PruningSchedule, call: dict[str, Any]) -> list[list[list[int]]]:
    with torch.no_grad(), record_pruning(install_pruning(model, schedule)) as trace:
        model(**call)
    images = call["input_ids"] == model.config.image_token_id
    return [[[c for c in row.tolist() if images[at, c]] for at, row in enumerate(stage)] for stage in trace.kept]


def test_unknown_grids_are_squares_or_rows_and_pictures_share_alike() -> None:
    model = tiny_llava()
    call = make_case(model, ["t3 i16 t4", "t2 i9 t3 i16 t5", "i6 t1", "t9"], "left").inputs()
    schedule = PruningSchedule((PruningStage(0, "uniform", 0.5), PruningStage(2, "uniform", 0.25)))
    first, second = kept_columns(model, schedule, call)

    def chosen(sizes: list[tuple[int, int]], kept: int) -> list[int]:
        start, ranked = 0, []
        for rows, columns in sizes:
            order = by_hand(rows, columns)
            for number, (row, column) in enumerate(order):
                ranked.append(((number + 0.5) / len(order), start + row * columns + column))
            start += rows * columns
        return sorted(token for _, token in sorted(ranked)[:kept])

    for kept_here, share in ((first, 0.5), (second, 0.25)):
        for row, sizes in enumerate([[(4, 4)], [(3, 3), (4, 4)], [(1, 6)]]):
            columns = (call["input_ids"][row] == 4).nonzero()[:, 0].tolist()
            total = sum(r * c for r, c in sizes)
            assert [columns.index(c) for c in kept_here[row]] == chosen(sizes, math.floor(total * share + 0.5))
    assert all(set(later) <= set(earlier) for later, earlier in zip(second, first, strict=True))


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", [*(name for name in EVERY if name != "siglip-default"), *KINDS])
def test_families_know_the_grids_of_their_tokens(name: str, number: int, tmp_path: Path) -> None:
    """From what a batch gives to the model as from what draws pictures of one image."""
    folder = save_qwen(tmp_path, name) if name in KINDS else EVERY[name].folder(tmp_path, 2)
    model, processor = load_llava(folder)
    family, grids = family_of(model), []
    conversations = [[picture(40, 25), picture(16, 64)][:number], [picture(64, 64)]]
    images = []
    for pictures in conversations:
        for image, shown in zip(family.encode_conversation(processor, pictures, "as_processor"), pictures, strict=True):
            images.append(image)
            for block in family.token_blocks(processor, image, shown):
                grids.append(TokenGrid(block.rows, block.columns, block.before, block.row_end))
    ids = torch.full((1, sum(grid.tokens for grid in grids)), model.config.image_token_id)
    given = {key: torch.cat([image[key] for image in images]) for key in images[0] if not key.startswith("pixel")}
    found, expected = Places.of(ids > 0, family.image_grids(model.config, given)), Places.of(ids > 0, grids)
    assert torch.equal(found.facts, expected.facts) and sum(grid.tokens for grid in grids) == ids.shape[1]


def test_uniform_is_even_in_a_family_of_tiles(tmp_path: Path) -> None:
    """Half of what LLaVA-NeXT makes of a picture: of overview and canvas alike, and no newline."""
    model, processor = load_llava(EVERY["llava_next"].folder(tmp_path, 3))
    family = family_of(model)
    image = family.encode_image(processor, picture(40, 25), "as_processor")
    tokens = family.image_tokens(processor, image)
    ids = torch.tensor([[1, *[model.config.image_token_id] * tokens, 7, 8]])
    (kept,) = kept_columns(model, PruningSchedule((PruningStage(0, "uniform", 0.5),)), {"input_ids": ids, **image})
    blocks = family.token_blocks(processor, image, picture(40, 25))
    places = Places.of(ids == model.config.image_token_id, blocks)
    grid, row = places.grid[0, kept[0]], places.row[0, kept[0]]
    shares = [int((grid == at).sum()) / (block.rows * block.columns) for at, block in enumerate(blocks)]
    assert bool((row >= 0).all()) and abs(shares[0] - shares[1]) < 0.1


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_generate_keeps_what_a_forward_pass_keeps(name: str, beams: int, tmp_path: Path) -> None:
    """Wide pictures, two in one row: transformers encodes them before the first forward, without their sizes."""
    folder = save_qwen(tmp_path, name) if name in KINDS else EVERY[name].folder(tmp_path, 3)
    model, processor = load_llava(folder)
    family, image_id = family_of(model), model.config.image_token_id
    images = [family.encode_image(processor, picture(*size), "as_processor") for size in ((64, 16), (64, 24), (40, 25))]
    first, second, third = ([image_id] * family.image_tokens(processor, image) for image in images)
    rows = [[7, *first, 8, *second, 9, 7], [7, *third, 9, 8]]
    ids = torch.tensor([[0] * (max(map(len, rows)) - len(row)) + row for row in rows])
    if name == "llava_next":  # as a batch has them: as many tiles each
        most = max(image["pixel_values"].shape[1] for image in images)
        for image in images:
            image["pixel_values"] = F.pad(image["pixel_values"], (0,) * 7 + (most - image["pixel_values"].shape[1],))
    call: dict[str, Any] = {key: torch.cat([image[key] for image in images]) for key in images[0]}
    call |= {"input_ids": ids, "attention_mask": (ids != 0).long()} | family.forward_inputs(model.config, ids, call)
    install_pruning(model, PruningSchedule((PruningStage(1, "uniform", 0.3),)))
    with torch.no_grad(), record_pruning(model) as forward:
        model(**call)
    with record_pruning(model) as generated:
        model.generate(**call, max_new_tokens=2, num_beams=beams, do_sample=False)
    expected = [row.tolist() for row in forward.kept[0] for _ in range(beams)]
    assert [row.tolist() for row in generated.kept[0]] == expected


def test_tokens_without_a_place_leave_first() -> None:
    image = torch.tensor([[False, True, True, True, True, True, True, True, False]])
    places = Places.of(image, [TokenGrid(2, 2, before=1, row_end=1)])
    assert places.row[0, 1:8].tolist() == [-1, 0, 0, -1, 1, 1, -1]
    assert places.column[0, 1:8].tolist() == [-1, 0, 1, -1, 0, 1, -1]
    assert [even == 2 for even in places.even[0, 1:8].tolist()] == [True, False, False, True, False, False, True]
