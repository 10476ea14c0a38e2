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

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """Per token, each of shape (B, L).

    Attributes:
        columns: Column of the batch as passed in, long.
        valid: Not padding.
        image: Image token.
        group: Number of supervised spans that start at or before the token, long.
        ranking: Text token of the prompt that ranks its group's image tokens.
        protected: Must stay although it may be an image token: what follows it is predicted from it.
    """

    columns: Tensor
    valid: Tensor
    image: Tensor
    group: Tensor
    ranking: Tensor
    protected: Tensor

    def gather(self, index: Tensor, valid: Tensor) -> TokenLayout:
        """The tokens at `index` (B, L'); entries where `valid` (B, L') is false are padding."""
        moved = {field.name: getattr(self, field.name).gather(1, index) for field in fields(self)}
        for name in ("image", "ranking", "protected"):
            moved[name] &= valid
        return TokenLayout(**moved | {"valid": valid})


@dataclass(frozen=True)
class TokenCounts:
    """Numbers on the host, all long tensors on the CPU.

    Attributes:
        text: (B,) text tokens of each row.
        image: (B, G) image tokens that each row and group had originally.
        current: (B, G) those that are left.
        protected: (B, G) those that must stay.
        ranking: (B,) ranking rows.
    """

    text: Tensor
    image: Tensor
    current: Tensor
    protected: Tensor
    ranking: Tensor

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens that are left of each row, text included."""
        return self.text + self.current.sum(1)


def build_layout(
    image_token_mask: Tensor, attention_mask: Tensor | None = None, supervised_mask: Tensor | None = None
) -> tuple[TokenLayout, TokenCounts]:
    """Describe a batch as the caller passed it in.

    Args:
        image_token_mask: (B, S) bool, where the image tokens are.
        attention_mask: (B, S), 0 at padding; None where nothing is padding.
        supervised_mask: (B, S) bool, positions whose token is predicted in training (`labels != -100`); None at
            inference.

    Returns:
        The layout, and the counts read from it with a single transfer to the host.
    """
    batch, length = image_token_mask.shape
    device = image_token_mask.device
    columns = torch.arange(length, device=device).expand(batch, length)
    valid = torch.ones_like(image_token_mask) if attention_mask is None else attention_mask.bool()
    image = image_token_mask & valid
    if supervised_mask is None:
        supervised = torch.zeros_like(image)
        protected = columns == (columns * valid).amax(1, keepdim=True)
    else:
        supervised = supervised_mask & valid
        protected = torch.nn.functional.pad(supervised[:, 1:], (0, 1))
    starts = supervised & ~torch.nn.functional.pad(supervised[:, :-1], (1, 0))
    group = starts.long().cumsum(1)
    prompt = valid & ~supervised
    ranking = _ranking_rows(image, prompt, group)
    layout = TokenLayout(columns, valid, image, group, ranking, protected & image)
    return layout, _count(layout)


def _ranking_rows(image: Tensor, prompt: Tensor, group: Tensor) -> Tensor:
    """Prompt text after its group's first image token; the last prompt token where a group has no such text. (B, S)."""
    seen = _running_in_group(image, group)
    text = prompt & ~image & (seen > 0)
    # A prompt that ends with its image (`<image>` alone, as in caption pre-training) is ranked by its last token.
    last_prompt = prompt & (_running_in_group(prompt.flip(1), group.flip(1)).flip(1) == 1)
    has_text = _running_in_group(text, group) > 0
    return text | (last_prompt & image & ~has_text)


def _running_in_group(mask: Tensor, group: Tensor) -> Tensor:
    """How many of `mask` lie at or before each token within its own group; groups are runs of equal numbers. (B, S)."""
    total = mask.long().cumsum(1)
    new_group = torch.nn.functional.pad(group[:, 1:] != group[:, :-1], (1, 0))
    before = torch.where(new_group, total - mask.long(), 0)
    return total - before.cummax(1).values


def _count(layout: TokenLayout) -> TokenCounts:
    image_group = torch.where(layout.image, layout.group, -1)
    text = layout.valid & ~layout.image
    # The one transfer: everything below runs on the host.
    image_group, flags = torch.stack([image_group, text * 4 + layout.ranking * 2 + layout.protected]).cpu().unbind()
    groups = max(int(image_group.max()) + 1 if image_group.numel() else 1, 1)
    one_hot = image_group.unsqueeze(-1) == torch.arange(groups)
    image = one_hot.sum(1)
    return TokenCounts(
        text=(flags // 4).sum(1),
        image=image,
        current=image,
        protected=(one_hot & (flags % 2 == 1).unsqueeze(-1)).sum(1),
        ranking=(flags // 2 % 2).sum(1),
    )
