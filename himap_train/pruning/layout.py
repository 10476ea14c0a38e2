"""Which token is what, for a whole batch, and how many there are.

`TokenLayout` holds on the device all that belongs to a token beside its hidden state; one `gather` moves it.
`TokenCounts` holds the numbers that shapes depend on, on the host, read from the device once a forward pass.

Turns. An image token may be ranked only by what a prefill would have seen when it was chosen. So the tokens of a row
are grouped by how many supervised spans (answers) lie before them: a group's image tokens are ranked by the prompt
rows of that group and pruned by the group's own count. A conversation with its images in the first turn has one such
group.

Shapes: B rows, L columns of the current layout, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from himap_train.pruning.places import Places
from himap_train.pruning.readings import TowerReadings
from himap_train.pruning.token_map import TokenMap


@dataclass(frozen=True)
class TokenLayout:
    """What each token is. Facts of one type lie in one tensor, so that two gathers move them all.

    Attributes:
        numbers: (2, B, L) long, see `columns` and `group`.
        flags: (4, B, L) bool, see `valid`, `image`, `ranking` and `protected`.
        places: Where image tokens lie in their pictures; None where no method asks.
        tower: What the vision tower looks at; None where no method asks.
    """

    numbers: Tensor
    flags: Tensor
    places: Places | None = None
    tower: TowerReadings | None = None

    @property
    def columns(self) -> Tensor:
        """(B, L) long, column of the batch as passed in."""
        return self.numbers[0]

    @property
    def group(self) -> Tensor:
        """(B, L) long, number of supervised spans that start at or before the token."""
        return self.numbers[1]

    @property
    def valid(self) -> Tensor:
        """(B, L) bool, not padding."""
        return self.flags[0]

    @property
    def image(self) -> Tensor:
        """(B, L) bool, image token."""
        return self.flags[1]

    @property
    def ranking(self) -> Tensor:
        """(B, L) bool, text token of the prompt that ranks its group's image tokens."""
        return self.flags[2]

    @property
    def protected(self) -> Tensor:
        """(B, L) bool, must stay although it may be an image token: what follows it is predicted from it."""
        return self.flags[3]

    def gather(self, moved: TokenMap) -> TokenLayout:
        """The tokens after a removal."""
        index = moved.index
        numbers, flags = (part.gather(2, index.expand(len(part), -1, -1)) for part in (self.numbers, self.flags))
        places = None if self.places is None else self.places.gather(index)
        tower = None if self.tower is None else self.tower.gather(index)
        return TokenLayout(numbers, flags & moved.valid, places, tower)


@dataclass(frozen=True)
class TokenCounts:
    """Numbers on the host, all long tensors on the CPU.

    Attributes:
        text: (B,) text tokens of each row.
        image: (B, G) image tokens that each row and group had originally.
        current: (B, G) those that are left.
        protected: (B, G) those that must stay.
        ranking: (B,) ranking rows.
        unread: Rows with an image that no text ranks, see `build_layout`.
        supervised_images: Image tokens of the batch that were called supervised.
    """

    text: Tensor
    image: Tensor
    current: Tensor
    protected: Tensor
    ranking: Tensor
    unread: int = 0
    supervised_images: int = 0

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens that are left of each row, text included."""
        return self.text + self.current.sum(1)


def build_layout(
    image_token_mask: Tensor,
    attention_mask: Tensor | None = None,
    supervised_mask: Tensor | None = None,
    marks_tiles: bool = False,
) -> tuple[TokenLayout, TokenCounts]:
    """Describe a batch as the caller passed it in.

    Args:
        image_token_mask: (B, S) bool, where the image tokens are.
        attention_mask: (B, S), 0 at padding; None where nothing is padding.
        supervised_mask: (B, S) bool, positions whose token is predicted in training (`labels != -100`), which image
            tokens never are; None where all is prompt.
        marks_tiles: Whether text between image tokens are marks of tiles, which ask for nothing.

    Returns:
        The layout, and the counts read from it with a single transfer to the host.
    """
    batch, length = image_token_mask.shape
    device = image_token_mask.device
    columns = torch.arange(length, device=device).expand(batch, length)
    valid = torch.ones_like(image_token_mask) if attention_mask is None else attention_mask.bool()
    image = image_token_mask & valid
    last = columns == (columns * valid).amax(1, keepdim=True)
    if supervised_mask is None:
        supervised, protected = torch.zeros_like(image), last
    else:
        supervised = supervised_mask & valid & ~image
        # Without anything to predict a row is a prompt, whose last token stays: one of images alone is never emptied.
        protected = torch.nn.functional.pad(supervised[:, 1:], (0, 1)) | (last & ~supervised.any(1, keepdim=True))
    starts = supervised & ~torch.nn.functional.pad(supervised[:, :-1], (1, 0))
    group = starts.cumsum(1)
    prompt = valid & ~supervised
    ranking = _ranking_rows(image, prompt, group, marks_tiles)
    layout = TokenLayout(torch.stack([columns, group]), torch.stack([valid, image, ranking, protected & image]))
    return layout, _count(layout, None if supervised_mask is None else supervised_mask & image)


def _ranking_rows(image: Tensor, prompt: Tensor, group: Tensor, marks_tiles: bool) -> Tensor:
    """Prompt text after its group's first image token; the last prompt token where a group has no such text. (B, S).

    Where marks stand between tiles it is the text after the last image token: the marks outnumber a short question, and
    each sees only the tiles before it.
    """
    text = prompt & ~image & (_running_in_group(image, group) > 0)
    if marks_tiles:
        text &= _left_in_group(image, group) == 0
    # A prompt that ends with its image (`<image>` alone, as in caption pre-training) is ranked by its last token.
    last_prompt = prompt & (_left_in_group(prompt, group) == 1)
    has_text = _running_in_group(text, group) > 0
    return text | (last_prompt & image & ~has_text)


def _running_in_group(mask: Tensor, group: Tensor) -> Tensor:
    """How many of `mask` lie at or before each token within its own group; groups are runs of equal numbers. (B, S)."""
    total = mask.cumsum(1)
    new_group = torch.nn.functional.pad(group[:, 1:] != group[:, :-1], (1, 0))
    before = torch.where(new_group, total - mask.long(), 0)
    return total - before.cummax(1).values


def _left_in_group(mask: Tensor, group: Tensor) -> Tensor:
    """How many of `mask` lie at or behind each token within its own group. (B, S)."""
    return _running_in_group(mask.flip(1), group.flip(1)).flip(1)


def _count(layout: TokenLayout, supervised_images: Tensor | None) -> TokenCounts:
    # The one transfer: everything below runs on the host.
    odd = [] if supervised_images is None else [supervised_images.short().unsqueeze(0)]
    facts = torch.cat([layout.flags.short(), layout.numbers[1:].short(), *odd]).cpu()
    valid, image, ranking, protected = facts[:4].bool()
    slot = torch.where(image, facts[4].long() + 1, 0)  # 0: no image token
    groups = max(int(slot.max()), 1) if slot.numel() else 1

    def per_group(tokens: Tensor) -> Tensor:
        return torch.zeros(len(slot), groups + 1, dtype=torch.long).scatter_add_(1, slot, tokens.long())[:, 1:]

    count = per_group(image)
    return TokenCounts(
        text=(valid & ~image).sum(1),
        image=count,
        current=count,
        protected=per_group(protected),
        ranking=ranking.sum(1),
        unread=int((ranking & image).any(1).sum()),
        supervised_images=int(facts[5:].sum()),
    )
