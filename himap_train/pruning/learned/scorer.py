"""A ranking that is learned: what scores image tokens by a question, and the loss that trains it.

It runs beside the decoder and is no part of it: the model's own weights, files and gradients never see it. What it is
to foresee, the backward pass of training shows: see `himap_train.models.foresight`.

Shapes: R rows of image tokens (one for each row and group of a batch), N image tokens, T tokens of the question, D the
decoder's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

HEAD = 16
"""Width of a head of attention."""


@dataclass(frozen=True)
class Asked:
    """Image tokens, and the question that is asked about them.

    Attributes:
        image: (R, N, D), states of the image tokens at the stage's input.
        image_real: (R, N) bool, false where it only fills up.
        text: (R, T, D), states of the question: the prompt's text that ranks these tokens, never an answer.
        text_real: (R, T) bool.
    """

    image: Tensor
    image_real: Tensor
    text: Tensor
    text_real: Tensor


@dataclass(frozen=True)
class Lesson:
    """What a scorer was shown in one pass, and what it should have answered.

    Attributes:
        asked: As in the stage, of the image tokens that stayed: of others nothing is known.
        target: (R, N) fp32, not negative; of each row only the proportions count.
    """

    asked: Asked
    target: Tensor


class Scorer(nn.Module):
    """Scores of image tokens: their products with what a question is after, a few of them, and a term of their own.

    The question's tokens look at one another in one block of a transformer; each head then takes a mean over them as
    what it is after. Products learn what goes with what many times faster than blocks over image and question together.
    States are normalised first, so that it does not matter how large a decoder's are. A token of the question knows its
    place, counted from the end; where an image token lies is in its state.

    Args:
        hidden: D.
        width: The small width in which products are formed, a multiple of `HEAD`.
    """

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        # No bias that a softmax takes out again: its gradient would be rounding alone, which AdamW makes large.
        self.image, self.text = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width)
        self.block, self.norm = _Block(width), nn.LayerNorm(width)
        self.share, self.query = nn.Linear(width, width // HEAD, bias=False), nn.Linear(width, width)
        self.own = nn.Linear(width, 1, bias=False)

    def forward(self, asked: Asked) -> Tensor:
        """Scores of the image tokens, (R, N) fp32; of no use where they only fill up."""
        with torch.autocast(asked.image.device.type, enabled=False):
            dtype, real = self.own.weight.dtype, asked.text_real
            image, text = (layer_norm(part.to(dtype), part.shape[-1:]) for part in (asked.image, asked.text))
            image, text = self.image(image), self.text(text) + _places(real, self.text.out_features)
            seen = real | ~real.any(1, keepdim=True)  # no question looks at something: no nan
            text = self.norm(self.block(text, seen[:, None, None]))
            shares = self.share(text).masked_fill(~seen.unsqueeze(2), torch.finfo(dtype).min).softmax(1)
            shares = shares * real.unsqueeze(2)  # no question is after nothing
            after = (shares.unsqueeze(3) * self.query(text).unflatten(2, (-1, HEAD))).sum(1).flatten(1)
            scores: Tensor = (image @ after.unsqueeze(2)) * (HEAD / after.shape[1]) ** 0.5 + self.own(image)
        return scores.squeeze(2)


class _Block(nn.Module):
    """Attention and an MLP, each on normalised tokens and added to them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before_mix, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
        query, key, value = self.mix(self.before_mix(tokens)).unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(query, key, value, attn_mask=real)
        tokens = tokens + self.out(seen.transpose(1, 2).flatten(2))
        changed: Tensor = self.mlp(self.before_mlp(tokens))
        return tokens + changed


def _places(real: Tensor, width: int) -> Tensor:
    """Sines of the place of each token of a question, counted from its end: (R, T, width)."""
    place = real.sum(1, keepdim=True) - torch.arange(real.shape[1], device=real.device)
    rate = torch.exp(torch.arange(width // 2, device=real.device) * (-8.0 / width))
    angle = place.unsqueeze(2) * rate
    return torch.cat([angle.sin(), angle.cos()], dim=2)


def ranking_loss(scores: Tensor, lesson: Lesson) -> tuple[Tensor, Tensor]:
    """Sum of the divergences KL(target || softmax of the scores) over the rows that have a target, and their number.

    Args:
        scores: (R, N).
        lesson: What the scores are held to. A row whose target is zero is none.
    """
    real = lesson.asked.image_real
    target = lesson.target.masked_fill(~real, 0.0)
    share = target / target.sum(1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
    logs = scores.masked_fill(~real, torch.finfo(scores.dtype).min).log_softmax(1)
    return (torch.xlogy(share, share) - share * logs).sum(), (share > 0).any(1).sum()
