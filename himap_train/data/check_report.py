"""What a data check found, in numbers and as text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from himap_train.data.skips import TooManySkippedError, skip_limit

_SHOWN = 10


@dataclass
class DataReport:
    """Findings of `check_source`.

    Attributes:
        name: name of the source.
        max_length: that lengths were compared with; None for no limit.
        records: records in the source (or in its first part, if the check was limited to that).
        scanned: how many of them were parsed and their image files looked for.
        examined: how many of these were tokenized and the headers of their images read.
        images: images of the scanned records.
        text_only: scanned records without image.
        multi_image: scanned records with several.
        answers: answers in the scanned records.
        image_tokens: tokens an image -> number of examined images that take so many.
        modes: what is unusual about pixels, such as "I;16 (16 bits)" -> number of such images among the examined.
        lengths: (id, tokens) of the examined records, image tokens included.
        token_ids: those of the examined records.
        answer_ids: tokens of their answers -> how often.
        truncated: ids of examined records that lose questions at the end.
        padding: batch size, expected share of padding in batches of it, the same with group_by_length; None where no
            batch size was given.
        skipped: id or index of a record that cannot be used -> why.
        sets: of a mix, how many samples of each set an epoch takes.
    """

    name: str
    max_length: int | None
    records: int
    scanned: int = 0
    examined: int = 0
    images: int = 0
    text_only: int = 0
    multi_image: int = 0
    answers: int = 0
    image_tokens: dict[int, int] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    lengths: list[tuple[str, int]] = field(default_factory=list)
    token_ids: set[int] = field(default_factory=set)
    answer_ids: Counter[int] = field(default_factory=Counter)
    truncated: list[str] = field(default_factory=list)
    padding: tuple[int, float, float] | None = None
    skipped: dict[int, str] = field(default_factory=dict)
    sets: str = ""

    def percentile(self, percent: float) -> int:
        """Tokens that this percentage of the examined records does not exceed; 0 if none was examined."""
        return int(np.percentile([n for _, n in self.lengths], percent, method="higher")) if self.lengths else 0

    def mean_tokens(self) -> tuple[int, int] | None:
        """Image tokens and other tokens of an examined record on average, as far as `max_length` lets it through.

        None where nothing was examined.
        """
        if not self.lengths:
            return None
        cut = [length if self.max_length is None else min(length, self.max_length) for _, length in self.lengths]
        total = sum(cut) / len(cut)
        image = sum(tokens * images for tokens, images in self.image_tokens.items()) / len(cut)
        return round(image), round(max(total - image, 1.0))

    def longest(self, count: int = 5) -> list[tuple[str, int]]:
        """(id, tokens) of the longest examined records, the longest first."""
        return sorted(dict(self.lengths).items(), key=lambda item: -item[1])[:count]

    def require_usable(self, max_skipped: int | float) -> None:
        """Raises TooManySkippedError when training would end for its broken records; see SkipLog for `max_skipped`."""
        limit = skip_limit(self.records, max_skipped)
        if len(self.skipped) > limit:
            raise TooManySkippedError(
                f"{self.name}: {len(self.skipped)} of {self.scanned} records cannot be used, max_skipped allows "
                f"{limit}.\n{self._problems()}\nRepair the data or set a larger max_skipped"
            )

    def __str__(self) -> str:
        tokens = ", ".join(str(n) for n in sorted(self.image_tokens)) or "none"
        over = len(self.truncated)
        lines = [
            f"data {self.name}: {self.records} records, {self.scanned} looked through, {self.examined} tokenized",
            *([self.sets] if self.sets else []),
            f"  images       {self.images}; records with several {self.multi_image}, text-only {self.text_only}",
            f"  image tokens {tokens} an image",
            *([f"  pixels       {self._unusual_modes()}"] if self.modes else []),
            f"  answers      {self.answers}",
            f"  length       median {self.percentile(50)}, 95 % up to {self.percentile(95)}, "
            f"longest {self.percentile(100)} tokens (max_length {self.max_length})",
            "  longest      " + ", ".join(f"{name!r} {tokens}" for name, tokens in self.longest()),
            f"  truncated    {over} of {self.examined}: they lose their last questions with the answers",
            *([f"  padding      {self._expected_padding()}"] if self.padding else []),
            f"  skipped      {len(self.skipped)} of {self.scanned}",
        ]
        return "\n".join(lines + ([self._problems()] if self.skipped else []))

    def _unusual_modes(self) -> str:
        named = ", ".join(f"{count} {mode}" for mode, count in sorted(self.modes.items()))
        return f"{sum(self.modes.values())} of {sum(self.image_tokens.values())} examined images are unusual: {named}"

    def _expected_padding(self) -> str:
        assert self.padding is not None
        size, plain, grouped = self.padding
        return f"{100 * plain:.0f} % of the positions in batches of {size}; {100 * grouped:.0f} % with group_by_length"

    def _problems(self) -> str:
        shown = [f"    - {reason}" for reason in list(self.skipped.values())[:_SHOWN]]
        more = len(self.skipped) - len(shown)
        return "\n".join(shown + ([f"    and {more} more"] if more else []))
