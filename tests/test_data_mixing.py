"""Several data sets with weights, and a share split off for validation: what an epoch takes, in which order."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from data_examples import image_folder, llava_record, talk
from lightning.pytorch.callbacks import ModelCheckpoint
from test_data_module import fit, module
from training_toys import finetune

from himap_train.data.mixing import Chosen, MixedRecords, read_parts
from himap_train.data.records import Conversation
from himap_train.data.sampling import BatchOrder
from himap_train.data.sources import open_source
from himap_train.training.run.parser import _own_data


class Talks:
    """Records named `name`-0, `name`-1 and so on."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Conversation:
        return talk("Q", "A" * (index + 1), name=f"{self.name}-{index}")


def mixed(*sizes: int, weights: list[float] | None = None) -> MixedRecords:
    return MixedRecords([Chosen(n, Talks(n, s), np.arange(s)) for n, s in zip("abc", sizes, strict=False)], weights)


def write(folder: Path, name: str, size: int, images: int = 0) -> str:
    """A file of records; record i shows image i % images, where there are any."""
    image_folder(folder, tuple(f"{i}.png" for i in range(images)))
    records = [
        llava_record(
            f"{name}{i}", f"{i % images}.png" if images else None, "<image>\n" * bool(images) + "What?", "x" * i
        )
        for i in range(1, size + 1)
    ]
    (folder / f"{name}.json").write_text(json.dumps(records))
    return str(folder / f"{name}.json")


def test_records_of_all_sets_in_order() -> None:
    source = mixed(2, 3)
    assert [source[i].id for i in range(5)] == ["a-0", "a-1", "b-0", "b-1", "b-2"] and source.length_hint(3) == (3, 0)
    assert source.draw(7, 0).tolist() == list(range(5)) and source.fixed and not source.stored(0)
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"record {index} of 5"):
            source[index]


def test_weights_divide_the_samples_of_an_epoch() -> None:
    source = mixed(10, 2, 88, weights=[1, 2, 1])
    assert source.samples == [25, 50, 25] and len(source) == 100
    assert mixed(1, 1, 1, weights=[1, 1, 5]).samples == [1, 0, 2]
    taken = [source[int(index)].id for index in source.draw(3, 0)]
    assert Counter(name[0] for name in taken) == {"a": 25, "b": 50, "c": 25}
    lines = str(source).splitlines()
    assert lines[1] == "               50 of 100 samples from b, 2 records, each 25 times"
    assert lines[2] == "               25 of 100 samples from c, 88 records, each 0.28 times"


def test_no_record_comes_again_before_all_of_its_set_have_come() -> None:
    source = mixed(10, 88, weights=[1, 1])
    epochs = [source.draw(epoch, 5) for epoch in range(9)]
    for first, size, taken in ((0, 10, 49), (10, 88, 49)):
        stream = np.concatenate([epoch[(epoch >= first) & (epoch < first + size)] for epoch in epochs])
        assert len(stream) == 9 * taken
        passes = [stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]
        assert len(passes) == 9 * taken // size
        assert all(sorted(whole) == list(range(first, first + size)) for whole in passes)
        assert any((passes[0] != other).any() for other in passes[1:])
    assert (epochs[4] == source.draw(4, 5)).all() and (epochs[4] != source.draw(4, 6)).any()


@pytest.mark.parametrize("grouped", [False, True])
def test_every_process_takes_its_part_of_the_same_epoch(grouped: bool) -> None:
    source = mixed(3, 21, weights=[1, 1])
    lengths = np.arange(24) if grouped else None

    def steps(replicas: int, batch: int) -> list[list[int]]:
        """The records of each optimizer step in epoch 2."""
        draw = partial(source.draw, seed=3)
        ranks = [BatchOrder(24, batch, lengths, True, 3, replicas, rank, draw=draw) for rank in range(replicas)]
        batches = zip(*(order.batches(2) for order in ranks), strict=True)
        return [sorted(np.concatenate(step).tolist()) for step in batches]

    alone = steps(1, 8)
    assert alone == steps(2, 4) == steps(4, 2)
    counts = Counter(index for step in alone for index in step)
    assert [counts[i] for i in range(3)] == [4, 4, 4] and sum(counts[i] for i in range(3, 24)) == 12


@pytest.mark.parametrize("grouped", [False, True])
def test_resumed_run_goes_on_in_the_mix(tmp_path: Path, grouped: bool) -> None:
    train = [{"path": write(tmp_path, "a", 2), "weight": 3}, {"path": write(tmp_path, "b", 8, 3), "weight": 1}]
    every = ModelCheckpoint(tmp_path / "ck", "{step}", every_n_train_steps=1, save_top_k=-1)
    straight = fit(tmp_path, module(train, group_by_length=grouped), callbacks=[every])
    epochs = [Counter(name[0] for batch in part for name in batch) for part in (straight.seen[:5], straight.seen[5:])]
    assert epochs == [{"a": 8, "b": 2}] * 2
    for step in (2, 5, 7):
        resumed = fit(tmp_path, module(train, group_by_length=grouped), resume=tmp_path / f"ck/step={step}.ckpt")
        assert resumed.seen == straight.seen[step:], f"after step {step}"


def test_data_check_says_what_an_epoch_takes_and_counts_it(tmp_path: Path) -> None:
    train = [{"path": write(tmp_path, "a", 2), "weight": 3}, {"path": write(tmp_path, "b", 8, 3), "weight": 1}]
    data = module(train)
    data.setup("fit")
    report = data.check()
    assert f"epoch        8 of 10 samples from {train[0]['path']}, 2 records, each 4 times\n" in str(report)
    assert report.scanned == report.examined == 10 and report.images == 8  # all records are looked through
    assert sum(report.image_tokens.values()) == 2  # but an epoch shows two of the images
    assert len(report.longest(9)) == len(set(report.longest(9))) == 4
    assert str(report).startswith(f"data {train[0]['path']} + {train[1]['path']}: 10 records")


def test_limit_takes_the_first_of_each_set(tmp_path: Path) -> None:
    paths = [write(tmp_path, "a", 8), write(tmp_path, "b", 24)]
    names = lambda data, split: [data.source(split)[i].id for i in range(len(data.source(split)))]  # noqa: E731
    assert names(module(paths, train_limit=4), "train") == ["a1", "b1", "b2", "b3"]
    weighted = [{"path": path, "weight": 1} for path in paths]
    assert names(module(weighted, train_limit=4), "train") == ["a1", "a2", "b1", "b2"]
    assert len(names(module(paths, validation=0.25, validation_limit=4), "validation")) == 4
    assert len(names(module(paths, validation=0.25, train_limit=99), "train")) == 24


def test_share_for_validation_is_the_same_for_every_seed_and_keeps_images_together(tmp_path: Path) -> None:
    paths = [write(tmp_path, "a", 40, 10), write(tmp_path, "b", 10)]
    split = {}
    for seed in (0, 1):
        data = module(paths, validation=0.2, seed=seed)
        data.setup("fit")
        for name in ("train", "validation"):
            source = data.source(name)
            split[seed, name] = [source[i] for i in range(len(source))]
        loaded = sorted(i for batch in data.val_dataloader() for i in batch["ids"])
        assert loaded == sorted(c.id for c in split[seed, "validation"])
    assert split[0, "validation"] == split[1, "validation"]
    train, validation = split[0, "train"], split[0, "validation"]
    assert sorted(c.id for c in train + validation) == sorted({c.id for c in train + validation})
    assert Counter(c.id[0] for c in validation) == {"a": 8, "b": 2} and len(train) == 40
    assert not {c.images for c in train if c.images} & {c.images for c in validation if c.images}


def test_images_stay_on_one_side_through_all_files(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(40)]
    paths = []
    for number, shown in enumerate((names, names[::-1], names[::3])):
        records = [
            {"id": f"{number}-{name}", "image": name, "conversations": [
                {"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "a"}]}
            for name in shown
        ]  # fmt: skip
        paths.append(str(tmp_path / f"{number}.json"))
        Path(paths[-1]).write_text(json.dumps(records))
    data = module(paths, validation=0.1)
    data.setup("fit")
    sides = [{source[i].images[0] for i in range(len(source))} for source in map(data.source, ("train", "validation"))]
    assert not sides[0] & sides[1] and 8 <= len(data.source("validation")) <= 12


def test_images_that_messages_hold_stay_together_too(tmp_path: Path) -> None:
    urls = ["one.png", "data:image/png;base64,aGVsbG8=", "data:image/png;base64,aGVsbG9v"]
    file = tmp_path / "messages.jsonl"
    with file.open("w") as written:
        for number, url in enumerate([*urls, *urls]):
            shown = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
            turns = [{"role": "user", "content": shown}, {"role": "assistant", "content": "a"}]
            written.write(json.dumps({"id": str(number), "messages": turns}) + "\n")
    source: Any = open_source(str(file))
    first = [source.first_image(number) for number in range(6)]
    assert first[:3] == first[3:] and len(set(first)) == 3


def test_own_image_folder_of_a_set(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    one, two = write(tmp_path, "a", 1), write(tmp_path / "two", "b", 1, 1)
    data = module([one, {"path": two, "image_folder": str(tmp_path / "two")}], image_folder=str(tmp_path))
    assert data.source("train")[1].images == (tmp_path / "two/0.png",)


def test_scenes_in_a_mix_are_fresh_in_every_epoch_and_read_in_some_places_only(tmp_path: Path) -> None:
    data = module([write(tmp_path, "a", 3), "embedded:train?scenes=3"])
    data.setup("fit")
    source = data.source("train")
    assert not source.fixed and [source.stored(i) for i in (0, 3)] == [True, False]
    loader = data.train_dataloader()
    for epoch in (0, 2):
        loader.sampler.set_epoch(epoch)
        names = sorted(i for batch in loader for i in batch["ids"])
        assert names == ["a1", "a2", "a3", *(f"train-0-{epoch}-{i}" for i in range(3))] and source.epoch == epoch


BAD: list[tuple[Any, str]] = [
    ([], "data.train has an empty list, so there is nothing to train on"),
    ([{"path": "a", "weight": 0}], "has weights that sum to 0, so there is nothing to train on"),
    ([{"path": "a", "weight": 1e308}, {"path": "b", "weight": 1e308}], "has weights that sum to inf"),
    ([{"path": "a", "weight": -1}], r"data: `train\[0\].weight` is int -1; expected a number from 0 on"),
    ([{"path": "a", "weight": float("nan")}], "is float nan; expected a number from 0 on"),
    ([{"path": "a", "weight": True}], "is bool True; expected a number from 0 on"),
    ([{"path": "a", "weight": "2"}], "is str '2'; expected a number from 0 on"),
    (["a", {"path": "b", "weight": 1}], "data.train: a has no weight and others have; give each one, or none"),
    (["a", {"path": "b", "wieght": 1}], r"data.train\[1\] has the unknown key 'wieght'.*'weight'"),
    ([{"weight": 1}], r"data: `train\[0\]` has no key `path`"),
    ([{"path": 3}], r"`train\[0\].path` is int 3; expected text"),
    ([["a"]], r"`train\[0\]` is list .*expected a mapping"),
]


@pytest.mark.parametrize(("train", "message"), BAD)
def test_bad_lists(train: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(train)


def test_weight_0_leaves_a_set_out_unopened() -> None:
    assert [p.path for p in read_parts([{"path": "nowhere", "weight": 0}, {"path": "b", "weight": 2}])] == ["b"]


def test_what_cannot_be_mixed_or_split(tmp_path: Path) -> None:
    one = write(tmp_path, "a", 1)
    (tmp_path / "none.json").write_text("[]")
    for train, options, message in (
        ([one, str(tmp_path / "none.json")], {}, "none.json holds no records"),
        (one, {"validation": 0.5}, r"a.json has 1 record\(s\), which leaves none to train on"),
        ("embedded:train", {"validation": 0.5}, "0.5 of embedded:train, which is made anew in every epoch"),
        (one, {"validation": 1.5}, "data.validation is 1.5; expected .*share of data.train above 0 and below 1"),
        (one, {"validation": 0.0}, "data.validation is 0.0; expected"),
        ([one, str(tmp_path / "nowhere.json")], {}, "nowhere.json does not exist"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            module(train, **options).source("train")


def test_rehearsal_on_own_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mix, a share of it for validation, and a length that fits the real model's tokens alone."""
    (tmp_path / "b").mkdir()
    train = [
        {"path": write(tmp_path, "a", 6), "weight": 1},
        {"path": write(tmp_path / "b", "b", 6, 3), "weight": 3, "image_folder": str(tmp_path / "b")},
    ]
    config = {
        "output": str(tmp_path / "run"),
        "data": {"train": train, "validation": 0.2, "max_length": 8, "image_folder": str(tmp_path)},
        "trainer": {"max_steps": 1},
        "evaluation": {"before": False, "after": False, "during": 0},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert finetune("--config", str(tmp_path / "config.yaml"), "--rehearse", "--data", "mine") == 0
    out = capsys.readouterr().out
    assert "samples from " + train[1]["path"] in out and "\nrehearsed: trained, saved" in out
    data = yaml.safe_load((tmp_path / "run-rehearsal/config.yaml").read_text())["data"]
    assert data["train"] == train and data["validation"] == 0.2 and data["max_length"] is None


def test_own_records_are_asked_for_with_a_rehearsal_only() -> None:
    assert _own_data(["--rehearse", "--data", "mine", "--x"]) == ["--rehearse=mine", "--x"]
    assert _own_data(["--data=mine", "--rehearse"]) == ["--rehearse=mine"]
    for other in (["--data", "mine"], ["--rehearse", "--data", "data.yaml"], ["--rehearse", "--data.train", "mine"]):
        assert _own_data(other) == other
