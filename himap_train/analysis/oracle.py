"""The mark above every method: what is left when the image tokens that the question is about stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from himap_train.data.batches import collate, pad_token_id_of
from himap_train.data.encode import Encoder
from himap_train.data.records import Source
from himap_train.evaluation.answering import answer_batch, evaluation_mode
from himap_train.models.install import install_pruning, remove_pruning
from himap_train.models.stock import base_model
from himap_train.pruning.methods.base import Method, Reads, Seen
from himap_train.pruning.schedule import PruningSchedule
from himap_train.pruning.stage import PruningStage

_BATCH, _LONGEST = 64, 16  # questions, tokens of an answer


@dataclass(frozen=True)
class Oracle(Method):
    """Keeps named image tokens first, then an even choice of the others.

    Attributes:
        patches: For each row of the batch the numbers of the image tokens that must stay.
    """

    name: ClassVar[str] = "oracle"
    reads: ClassVar[Reads] = Reads.NOTHING
    uses_places = True
    patches: tuple[tuple[int, ...], ...] = ()

    def score(self, seen: Seen) -> Tensor:
        """The place in the even order, less than that for what must stay."""
        assert seen.layout.places is not None
        even = seen.layout.places.even
        for row, named in enumerate(self.patches):
            columns = seen.layout.image[row].nonzero().flatten()
            even = even.index_put((torch.tensor(row), columns[list(named)]), torch.tensor(-1, dtype=even.dtype))
        return -even


def oracle_accuracy(model: nn.Module, processor: Any, source: Source, keep_ratio: float) -> float:
    """Share of the questions that are answered right where an oracle chooses before the decoder.

    Args:
        model: As in `evaluate`; afterwards nothing is installed on it.
        processor: Its processor.
        source: Questions whose `meta["patches"]` names the image tokens that they are about.
        keep_ratio: Fraction of the image tokens that stay.
    """
    encoder = Encoder(processor, base_model(model).config.text_config.max_position_embeddings - _LONGEST)
    right = 0
    with evaluation_mode(model):
        for first in range(0, len(source), _BATCH):
            asked = [source[index] for index in range(first, min(first + _BATCH, len(source)))]
            patches = tuple(tuple(map(int, one.meta.get("patches", "").split())) for one in asked)
            install_pruning(model, PruningSchedule((PruningStage(0, Oracle(patches), keep_ratio=keep_ratio),)))
            samples = [encoder.encode_prompt(one) for one in asked]
            batch = collate(samples, pad_token_id_of(processor.tokenizer), padding_side="left")
            answers, _ = answer_batch(model, processor, batch, _LONGEST)
            right += sum(answer == one.answer for one, answer in zip(asked, answers, strict=True))
    remove_pruning(model)
    return right / len(source)
