"""What is run: samples of one shape, as the model takes them.

The default is LLaVA-1.5's sample: 35 tokens before the image, 576 of the image, 80 behind it. Half of those behind it
are the answer, which is what training predicts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from himap_train.benchmark.sizes import IMAGE_ID, TOKENS_PER_IMAGE


@dataclass(frozen=True)
class Workload:
    """Shape of a batch.

    Attributes:
        batch: Samples.
        image_tokens: Image tokens of each sample.
        text_before: Text tokens before the image.
        text_after: Text tokens behind it, question and answer.
        mixed: Images of dynamic resolution: all of `image_tokens`, four fifths, three fifths and so on, sample by
            sample, with padding before the shorter ones.
    """

    batch: int = 1
    image_tokens: int = 576
    text_before: int = 35
    text_after: int = 80
    mixed: bool = False

    def __post_init__(self) -> None:
        """Check what the tensors will need."""
        if min(self.batch, self.image_tokens) < 1 or self.text_before < 1 or self.text_after < 2:
            raise ValueError(
                f"{self} cannot be run: a batch needs a sample, and a sample an image, text before it and at least a "
                "question and an answer token behind it"
            )

    def require_whole_images(self) -> None:
        """Raise ValueError for a number of image tokens that no number of images has."""
        if any(sample.image_tokens % TOKENS_PER_IMAGE for sample in self.samples):
            raise ValueError(
                f"image_tokens={self.image_tokens}{' of dynamic resolution' if self.mixed else ''} is no multiple of "
                f"{TOKENS_PER_IMAGE}, the tokens of one image; choose one, with --series the values too "
                "(--series_values), or leave the vision tower out with --whole_model=false"
            )

    @property
    def answer(self) -> int:
        """Supervised tokens of a sample."""
        return self.text_after // 2

    @property
    def text_tokens(self) -> int:
        """All tokens of a sample that are not of the image."""
        return self.text_before + self.text_after

    @property
    def samples(self) -> list[Workload]:
        """Each sample on its own."""
        fifths = (5 - number % 5 if self.mixed else 5 for number in range(self.batch))
        counts = (-(-self.image_tokens * part // 5) for part in fifths)
        return [replace(self, batch=1, image_tokens=count, mixed=False) for count in counts]

    @property
    def tokens(self) -> int:
        """Tokens of the whole batch, without padding."""
        return sum(sample.image_tokens + sample.text_tokens for sample in self.samples)


@dataclass(frozen=True)
class Batch:
    """A batch on the device of the model.

    Attributes:
        input_ids: (B, S).
        labels: (B, S).
        features: Of each image, where the vision tower does not run.
        given: What the model is given beside the ids otherwise: pixels, and the mask of a padded batch.
    """

    input_ids: Tensor
    labels: Tensor
    features: list[Tensor] = field(default_factory=list)
    given: dict[str, Tensor] = field(default_factory=dict)

    def images(self) -> dict[str, Any]:
        """Keyword arguments of the model; made anew for each call, since `generate` takes entries out."""
        if not self.features:
            return dict(self.given)
        features: Any = list(self.features)
        encoded: Any = BaseModelOutputWithPooling(pooler_output=features)
        # Any numbers, as the features are; the keys as wide as a head of the usual towers.
        encoded.tower_readings = torch.cat(features).detach()[:, :65].float()
        return {"mm_encoder_outputs": {"image": encoded}, **self.given}

    def for_states(self) -> dict[str, Any]:
        """The same for `hidden_states`."""
        return self.images() if self.features else {"images": self.images()}

    def with_weights(self, model: nn.Module) -> list[Tensor]:
        """All that is there before a call: the model's tensors, and what the call is given."""
        given = [self.input_ids, self.labels, *self.features, *self.given.values()]
        return [*model.parameters(), *model.buffers(), *given]


def make_batch(model: LlavaForConditionalGeneration, workload: Workload, whole: bool = False, seed: int = 0) -> Batch:
    """Random content; image features want a gradient, as the output of a projector in training does."""
    noise = torch.Generator().manual_seed(seed)
    text: Any = model.config.text_config
    length = workload.image_tokens + workload.text_tokens
    ids = torch.randint(5, text.vocab_size, (workload.batch, length), generator=noise)
    mask, counts = torch.ones_like(ids), [sample.image_tokens for sample in workload.samples]
    for row, count in enumerate(counts):
        mask[row, : workload.image_tokens - count] = 0
        ids[row, -workload.text_after - count : -workload.text_after] = IMAGE_ID
    labels = ids.clone()
    labels[:, : -workload.answer] = -100
    given = {"attention_mask": mask.to(model.device)} if workload.mixed else {}
    features: list[Tensor] = []
    if whole:
        images = sum(counts) // TOKENS_PER_IMAGE
        given["pixel_values"] = torch.randn(images, 3, 336, 336, generator=noise).to(model.device, model.dtype)
    else:
        noises = (0.3 * torch.randn(count, text.hidden_size, generator=noise) for count in counts)
        features = [values.to(model.device, model.dtype).requires_grad_() for values in noises]
    return Batch(ids.to(model.device), labels.to(model.device), features, given)
