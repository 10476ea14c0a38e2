"""What a pruning method is: which facts it reads, how it ranks or chooses, and what that costs.

A method is one frozen dataclass in one file; its fields are its YAML parameters. Most give every image token a score,
by which they are ranked. One that chooses a set overrides `choose`, one that merges tokens also `pool`.

Shapes: B rows, L current columns, R ranking rows, G groups (see `layout`), K key-value heads, D widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from himap_train.pruning.layout import TokenCounts, TokenLayout
from himap_train.pruning.ranks import image_ranks, select
from himap_train.pruning.token_map import Pool, TokenMap, compact


class Reads(Enum):
    """What a method looks at; attention and keys exist only behind a layer that has the image tokens."""

    ATTENTION = "the attention of the layer before"
    KEYS = "the keys of the layer before"
    STATES = "the hidden states at the stage's input"
    TOWER = "what the vision tower looks at"
    NOTHING = "nothing"


@dataclass(frozen=True)
class RankingRows:
    """Which queries rank, and what each of them may rank.

    Attributes:
        index: (B, R) column of the current layout of each ranking row.
        may_rank: Bool, the row is real and the token of its group; (B, R, L), or (B, R, 1) where there is one group.
        fewest: Every row of the batch has at least so many ranking rows.
    """

    index: Tensor
    may_rank: Tensor
    fewest: int


@dataclass(frozen=True)
class Seen:
    """What a stage's method may look at. What it does not read is None.

    Attributes:
        layout: Which token is what.
        counts: How many there are, before the stage.
        rows: The rows that a method which reads attention asked for.
        attention: Their attention, averaged over heads, a block of rows at a time: which of the R rows, and
            (B, rows, columns up to the last that any of them sees) fp32. To be read once, in `score`.
        keys: (B, K, L, D) of the layer before, rotary embedding applied.
        states: (B, L, D), at the stage's input; while attention or keys are read, at the input of the layer before.
        scores: (B, L), what `score` gave; for `choose`.
        looks: (B, L), what `instruction` scores, for a stage that waits.
        scorer: What was trained to rank at this stage's layer.
        learns: Whether the scorer is trained by what this pass keeps.
    """

    layout: TokenLayout
    counts: TokenCounts
    rows: RankingRows | None = None
    attention: Iterator[tuple[slice, Tensor]] | None = None
    keys: Tensor | None = None
    states: Tensor | None = None
    scores: Tensor | None = None
    looks: Tensor | None = None
    scorer: nn.Module | None = None
    learns: bool = False

    @property
    def groups(self) -> int:
        """Number of groups of the batch, G."""
        return self.counts.image.shape[1]


@dataclass(frozen=True)
class Widths:
    """What the cost of a method depends on, of a decoder.

    Attributes:
        hidden: Width of a hidden state.
        heads: Number of attention heads.
        queries: Width of all heads' queries together.
        keys: Width of a token's keys.
    """

    hidden: int
    heads: int
    queries: int
    keys: int


@dataclass(frozen=True)
class Method:
    """Base of all methods.

    Attributes:
        name: As a schedule writes it under `criterion`.
        reads: What it looks at.
        merges: Whether tokens are averaged into those that stay.
        learns: Whether something is trained that ranks, see `Seen.scorer`.
    """

    name: ClassVar[str]
    reads: ClassVar[Reads]
    merges: ClassVar[bool] = False
    by_chance: ClassVar[bool] = False
    learns: ClassVar[bool] = False

    @property
    def ranks(self) -> bool:
        """Whether the scores of two tokens say which of them stays, whatever the number that stays. Only then can the
        number follow the scores (`Mass`) or be learned.
        """
        return True

    @property
    def uses_places(self) -> bool:
        """Whether it looks at where tokens lie in their pictures (`seen.layout.places`)."""
        return False

    def rows(self, layout: TokenLayout, counts: TokenCounts) -> RankingRows:
        """The rows of attention that it wants; only where it reads attention."""
        raise TypeError(f"{self.name} reads {self.reads.value}")

    def score(self, seen: Seen) -> Tensor | None:
        """Importance of every column, (B, L) fp32, of use for image tokens; None where `choose` needs none."""
        return None

    def choose(self, seen: Seen, kept: Tensor) -> Tensor:
        """Ranks of the image tokens in their row and group, (B, L) long: those below `kept` stay.

        Args:
            seen: With the scores.
            kept: (B, G) long on the host, how many will stay.
        """
        if seen.scores is None:
            raise TypeError(f"{self.name} gives no scores, and does not say how it chooses")
        return image_ranks(seen.scores, seen.layout, seen.groups)

    def pool(self, seen: Seen, keep: Tensor, kept: Tensor) -> Pool | None:
        """Which tokens are averaged into which others; None leaves them as they are.

        Args:
            seen: As in `choose`.
            keep: (B, L) bool, the tokens that stay.
            kept: As in `choose`.
        """
        return None

    def token_map(self, seen: Seen, ranks: Tensor, kept: TokenCounts) -> TokenMap:
        """The removal of all image tokens whose rank is not below the number that stays.

        Args:
            seen: As in `choose`.
            ranks: From `choose`.
            kept: Counts after the stage.
        """
        keep = select(ranks, seen.layout, kept.current)
        return TokenMap.of(keep, kept.lengths, self.pool(seen, keep, kept.current))

    def flops(self, widths: Widths, image_tokens: int, text_tokens: int, kept: int) -> float:
        """FLOPs of choosing, of one sample.

        Args:
            widths: Widths of the decoder.
            image_tokens: Image tokens before the stage.
            text_tokens: Other tokens.
            kept: Image tokens that stay.
        """
        return 0.0

    def peak_bytes(self, widths: Widths, image_tokens: int, text_tokens: int, element: int) -> int:
        """Most bytes that choosing needs at once, of one sample; `element` is the size of the model's numbers."""
        return 0

    def to_dict(self) -> str | dict[str, Any]:
        """Its name, or a mapping with its parameters where one is not the default."""
        changed = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        return {"name": self.name, **changed} if changed else self.name

    def __str__(self) -> str:
        written = self.to_dict()
        if isinstance(written, str):
            return written
        changed = ", ".join(f"{key}={value}" for key, value in written.items() if key != "name")
        return f"{self.name}({changed})"


@dataclass(frozen=True)
class Members:
    """The image tokens of each row and group as rows of a rectangle.

    Attributes:
        index: (B * G, N) column of each image token, in order; what fills up points at column 0.
        real: (B * G, N) bool, false where it only fills up.
    """

    index: Tensor
    real: Tensor

    @classmethod
    def of(cls, layout: TokenLayout, counts: TokenCounts) -> Members:
        """All image tokens that are left, group by group of each row."""
        return cls._where(layout.image, int(counts.current.max()), layout, counts)

    @classmethod
    def question(cls, layout: TokenLayout, counts: TokenCounts) -> Members:
        """The prompt text that ranks each group's image tokens, in their place."""
        return cls._where(layout.ranking & ~layout.image, int(counts.ranking.max()), layout, counts)

    @classmethod
    def _where(cls, chosen: Tensor, longest: int, layout: TokenLayout, counts: TokenCounts) -> Members:
        groups, longest = counts.image.shape[1], max(longest, 1)
        masks = [chosen & (layout.group == number) if groups > 1 else chosen for number in range(groups)]
        mask = torch.stack(masks, dim=1).flatten(0, 1)
        real = torch.arange(longest, device=mask.device) < mask.sum(1, keepdim=True)
        return cls(compact(mask, longest), real)

    def gather(self, tokens: Tensor) -> Tensor:
        """(B, L, ...) -> (B * G, N, ...)."""
        groups = len(self.index) // len(tokens)
        row = torch.arange(len(self.index), device=tokens.device).unsqueeze(1) // groups
        return tokens[row, self.index]

    def spread(self, numbers: Tensor, layout: TokenLayout) -> Tensor:
        """(B * G, N) -> (B, L): the number of each image token at its column; of all else, the highest there is."""
        batch, length = layout.columns.shape
        rows = torch.arange(len(self.index), device=numbers.device).unsqueeze(1) // (len(self.index) // batch)
        spare = batch * length
        flat = torch.where(self.real, self.index + rows * length, spare).flatten()
        fill = torch.iinfo(numbers.dtype).max if not numbers.is_floating_point() else torch.inf
        full = numbers.new_full((spare + 1,), fill)
        return full.scatter(0, flat, numbers.flatten())[:spare].view(batch, length)


def with_scores(method: Method, seen: Seen) -> Seen:
    """What `choose` is given: the same with the method's scores."""
    return replace(seen, scores=method.score(seen), attention=None)
