"""Batches: padding, the order of records, sharing between processes, and what is skipped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_examples import picture, pixels, talk
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_processor

from himap_train.data.batches import collate, pad_token_id_of
from himap_train.data.datasets import SUBSTITUTE, EncodedRecords
from himap_train.data.encode import Encoder
from himap_train.data.lengths import estimate_lengths
from himap_train.data.loader import Collate
from himap_train.data.records import RecordError
from himap_train.data.sampling import BatchOrder
from himap_train.data.skips import SkipLog, TooManySkippedError

CONVERSATIONS = [
    talk("<image>\nLong question?", "Long answer.", images=(picture(),), name="one"),
    talk("Hi", "Ho", name="text"),
    talk("<image><image>Two?", "2", images=(picture(), picture(colour=(0, 0, 0))), name="two"),
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_are_the_samples(side):
    encoder = Encoder(tiny_processor())
    samples = [encoder.encode(conversation) for conversation in CONVERSATIONS]
    batch = collate(samples, pad_token_id=0, padding_side=side, pad_to_multiple_of=32)
    longest = max(len(sample["input_ids"]) for sample in samples)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, -(-longest // 32) * 32)
    for row, sample in enumerate(samples):
        mask = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][mask], sample["input_ids"])
        assert torch.equal(batch["labels"][row][mask], sample["labels"])
        assert (batch["input_ids"][row][~mask] == 0).all() and (batch["labels"][row][~mask] == -100).all()
        assert mask[0 if side == "right" else -1] and not mask[-1 if side == "right" else 0]
    assert torch.equal(batch["images"]["pixel_values"], torch.cat([pixels(samples[0]), pixels(samples[2])]))
    assert batch["ids"] == ["one", "text", "two"] and batch["dropped_exchanges"] == 0
    assert "answers" not in batch


def test_batch_of_prompts_has_answers_and_no_labels():
    encoder = Encoder(tiny_processor())
    batch = collate([encoder.encode_prompt(c) for c in CONVERSATIONS], 0, "left")
    assert batch["answers"] == ["Long answer.", "Ho", "2"] and "labels" not in batch
    assert batch["attention_mask"][:, -1].all()


def test_text_only_batch_has_no_pixels():
    assert collate([Encoder(tiny_processor()).encode(CONVERSATIONS[1])], 0)["images"] == {}


def test_images_of_different_sizes_are_refused():
    processor = tiny_processor()
    processor.image_processor.do_center_crop = False
    encoder = Encoder(processor)
    wide = talk("<image>Q", "A", images=(picture(80, 40),), name="wide")
    with pytest.raises(ValueError, match=r"in one batch: pixel_values \(3, 32, 42\) .sample 'one'.*'wide'"):
        collate([encoder.encode(CONVERSATIONS[0]), encoder.encode(wide)], 0)
    with pytest.raises(ValueError, match="no samples"):
        collate([], 0)


def test_pad_token():
    tokenizer = tiny_processor().tokenizer
    assert pad_token_id_of(tokenizer) == 0
    tokenizer.pad_token = None
    assert pad_token_id_of(tokenizer) == tokenizer.eos_token_id == 2
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a pad nor an eos token"):
        pad_token_id_of(tokenizer)


@given(
    size=st.integers(1, 60),
    batch_size=st.integers(1, 7),
    replicas=st.integers(1, 4),
    grouped=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_every_process_gets_as_many_batches_and_together_every_record(size, batch_size, replicas, grouped, epoch):
    lengths = np.random.default_rng(size).integers(1, 99, size) if grouped else None
    ranks = [BatchOrder(size, batch_size, lengths, True, 5, replicas, rank) for rank in range(replicas)]
    batches = [order.batches(epoch) for order in ranks]
    assert {len(b) for b in batches} == {len(ranks[0])}
    for step in zip(*batches, strict=True):
        assert len({len(batch) for batch in step}) == 1 and len(step[0]) <= batch_size
    seen = np.concatenate([index for rank in batches for index in rank])
    own, repeated = seen[seen >= 0], ~seen[seen < 0]
    assert sorted(own.tolist()) == list(range(size)) and len(repeated) < replicas and set(repeated) <= set(own)


@given(size=st.integers(1, 150), grouped=st.booleans(), epoch=st.integers(0, 3))
def test_optimizer_steps_have_the_same_records_however_a_global_batch_is_split(size, grouped, epoch):
    lengths = np.random.default_rng(size).integers(1, 9, size) if grouped else None

    def steps(processes, batch_size, accumulate):
        orders = [
            BatchOrder(size, batch_size, lengths, True, 5, processes, rank, accumulate) for rank in range(processes)
        ]
        ranks = [order.batches(epoch) for order in orders]
        windows = range(0, len(ranks[0]), accumulate)
        taken = [np.concatenate([batch for rank in ranks for batch in rank[i : i + accumulate]]) for i in windows]
        return [sorted(step[step >= 0].tolist()) for step in taken]

    whole = steps(1, 6, 1)
    assert sorted(sum(whole, [])) == list(range(size))
    for split in ((1, 2, 3), (1, 1, 6), (2, 3, 1), (2, 1, 3), (3, 2, 1), (3, 1, 2), (6, 1, 1)):
        assert steps(*split) == whole, split


def test_order_depends_on_seed_and_epoch_alone():
    lengths = np.arange(100) % 17

    def order(epoch, seed=0):
        return np.concatenate(BatchOrder(100, 8, lengths, seed=seed).batches(epoch)).tolist()

    assert order(3) == order(3) and order(3) != order(4) and order(3) != order(3, seed=1)
    unshuffled = BatchOrder(10, 4, shuffle=False)
    assert [batch.tolist() for batch in unshuffled.batches(7)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_start_in_the_middle_of_an_epoch():
    order = BatchOrder(20, 3)
    order.set_epoch(2)
    whole = list(order)
    assert all(epoch == 2 for batch in whole for epoch, _ in batch)
    order.start_batch = 4
    assert list(order) == list(order) == whole[4:]  # torch's DataLoader asks twice for the first iterator
    order.start_batch = 0
    assert list(order) == whole and len(order) == 7


def padding_waste(lengths, batches):
    """Fraction of the positions of these batches (lists of record indices) that would be padding."""
    used = sum(lengths[batch].sum() for batch in batches)
    return 1 - used / sum(len(batch) * lengths[batch].max() for batch in batches)


def test_grouping_by_length_saves_padding():
    lengths = np.random.default_rng(0).integers(20, 2000, 4000)
    plain, grouped = BatchOrder(4000, 8), BatchOrder(4000, 8, lengths)
    assert padding_waste(lengths, plain.batches(0)) > 0.4
    assert padding_waste(lengths, grouped.batches(0)) < 0.05
    first, *rest = [int(lengths[batch].max()) for batch in grouped.batches(0)]
    assert first == lengths.max() and rest != sorted(rest, reverse=True)


def test_grouping_keeps_records_together_that_pruning_shortens_alike():
    """Long texts among short questions about images: as long before pruning, a fifth of it afterwards."""
    rng = np.random.default_rng(0)
    images = np.where(rng.random(4000) < 0.1, 0, 576)
    lengths = np.where(images > 0, 576 + rng.integers(40, 400, 4000), rng.integers(500, 1200, 4000))
    pruned = lengths - images + (images > 0) * 72
    mixed = BatchOrder(4000, 8, lengths).batches(0)
    apart = BatchOrder(4000, 8, lengths, image_tokens=images).batches(0)
    assert sorted(np.concatenate(apart).tolist()) == list(range(4000))
    assert padding_waste(pruned, mixed) > 0.2
    assert max(padding_waste(pruned, apart), padding_waste(lengths, apart)) < 0.06


def test_settings_of_the_order_are_checked():
    with pytest.raises(ValueError, match="batch_size=0"):
        BatchOrder(5, 0)
    with pytest.raises(ValueError, match="rank=2"):
        BatchOrder(5, 1, num_replicas=2, rank=2)
    with pytest.raises(ValueError, match="3 lengths for 5 records"):
        BatchOrder(5, 1, [1, 2, 3])


class Broken:
    """Records 0..n-1, some of which cannot be used."""

    def __init__(self, size, bad):
        self.size, self.bad = size, set(bad)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.bad:
            raise RecordError(f"record {index} is broken")
        return talk("Hi", "x" * index + "!", name=str(index))

    def records(self):
        return ((lambda i=i: self[i]) for i in range(self.size))


def broken_records(size, bad, max_skipped, limit=None):
    skips = SkipLog(size, max_skipped)
    return EncodedRecords(Broken(size, bad), Encoder(tiny_processor()).encode, skips, limit), skips


def test_a_broken_record_is_reported_once_and_replaced_by_the_next(caplog):
    records, skips = broken_records(6, [2, 3, 5], max_skipped=3)
    for _ in range(2):
        assert [records[0, i]["id"] for i in range(6)] == ["0", "1", "4", "4", "4", "0"]
    assert skips.count == 3 and len(caplog.records) == 3
    assert "skipped record 2 (1 of at most 3): record 2 is broken" in caplog.text
    assert records[0, 3][SUBSTITUTE] == 3 and SUBSTITUTE not in records[0, 4]


def test_more_broken_records_than_allowed_end_the_run():
    records, _ = broken_records(6, [2, 3], max_skipped=1)
    records[0, 1]
    with pytest.raises(
        TooManySkippedError, match="2 records cannot be used, max_skipped allows 1; the last: record 3 is"
    ):
        records[0, 2]
    records, _ = broken_records(3, [0, 1, 2], max_skipped=3)
    with pytest.raises(RuntimeError, match="none of the 3 records can be used"):
        records[0, 0]


def test_limit_on_skipped_records():
    assert [SkipLog(n, 0.01).limit for n in (5, 100, 101, 1000)] == [1, 1, 2, 10]
    assert [SkipLog(1000, m).limit for m in (0, 1, 7)] == [0, 1, 7]
    assert SkipLog(1000, 0.01, used=100).limit == 1
    with pytest.raises(ValueError, match="max_skipped is -1"):
        SkipLog(10, -1)


def test_only_the_first_records():
    records, _ = broken_records(6, [2], max_skipped=1, limit=3)
    assert len(records) == 3 and records[0, 2]["id"] == "0"


def test_an_evaluation_leaves_substitutes_out():
    records, _ = broken_records(6, [2, 4, 5], max_skipped=3)
    evaluation, training = Collate(0, keep_substitutes=False), Collate(0)
    samples = [records[0, i] for i in range(4)]
    assert evaluation(samples)["ids"] == ["0", "1", "3"] and training(samples)["ids"] == ["0", "1", "3", "3"]
    assert evaluation([records[0, 4], records[0, 5]])["ids"] == ["0"]


def test_estimated_lengths_are_close_to_the_real_ones():
    class Talks:
        def __len__(self):
            return len(CONVERSATIONS)

        def __getitem__(self, index):
            return CONVERSATIONS[index]

    class Hinted(Talks):
        def length_hint(self, index):
            conversation = CONVERSATIONS[index]
            return sum(len(turn.text) for turn in conversation.turns), len(conversation.images)

    encoder = Encoder(tiny_processor())
    lengths, image_tokens = estimate_lengths(Talks(), encoder)
    assert image_tokens.tolist() == [16 * len(c.images) for c in CONVERSATIONS]
    real = np.array([len(encoder.encode(c)["input_ids"]) for c in CONVERSATIONS])
    assert (np.abs(lengths - real) < 30).all() and (np.argsort(lengths) == np.argsort(real)).all()
    assert (estimate_lengths(Hinted(), encoder)[0] == lengths).all()
    assert estimate_lengths(Talks(), Encoder(tiny_processor(), 40), limit=2)[0].tolist() == [40, lengths[1]]
    assert estimate_lengths(Broken(3, [1]), encoder)[0][1] == 0
