"""What is run: samples of one shape, as the model takes them.

The default is LLaVA-1.5's sample: 35 tokens before the image, 576 of the image, 80 behind it. Half of those behind it
are the answer, which is what training predicts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
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
    """

    batch: int = 1
    image_tokens: int = 576
    text_before: int = 35
    text_after: int = 80

    def __post_init__(self) -> None:
        """Check what the tensors will need."""
        if min(self.batch, self.image_tokens) < 1 or self.text_before < 1 or self.text_after < 2:
            raise ValueError(
                f"{self} cannot be run: a batch needs a sample, and a sample an image, text before it and at least a "
                "question and an answer token behind it"
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
    def tokens(self) -> int:
        """Tokens of the whole batch."""
        return self.batch * (self.image_tokens + self.text_tokens)


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
        if self.given:
            return dict(self.given)
        features: Any = list(self.features)
        encoded: Any = BaseModelOutputWithPooling(pooler_output=features)
        # Any numbers, as the features are; the keys as wide as a head of the usual towers.
        encoded.tower_readings = torch.cat(features).detach()[:, :65].float()
        return {"mm_encoder_outputs": {"image": encoded}}

    def for_states(self) -> dict[str, Any]:
        """The same for `hidden_states`."""
        return {"images": self.images()} if self.given else self.images()

    def tensors(self) -> list[Tensor]:
        """All that a call is given."""
        return [self.input_ids, self.labels, *self.features, *self.given.values()]


def make_batch(model: LlavaForConditionalGeneration, workload: Workload, whole: bool = False, seed: int = 0) -> Batch:
    """Random content; image features want a gradient, as the output of a projector in training does.

    Raises:
        ValueError: A whole model is asked for a number of image tokens that no number of images has.
    """
    if whole and workload.image_tokens % TOKENS_PER_IMAGE:
        raise ValueError(
            f"image_tokens={workload.image_tokens} is no multiple of {TOKENS_PER_IMAGE}, the tokens of one image; "
            "choose one, or leave the vision tower out with --whole_model=false"
        )
    noise = torch.Generator().manual_seed(seed)
    text: Any = model.config.text_config
    ids = torch.randint(5, text.vocab_size, (workload.batch, workload.tokens // workload.batch), generator=noise)
    ids[:, workload.text_before : workload.text_before + workload.image_tokens] = IMAGE_ID
    labels = ids.clone()
    labels[:, : -workload.answer] = -100
    given, features = {}, []
    if whole:
        images = workload.batch * workload.image_tokens // TOKENS_PER_IMAGE
        given = {"pixel_values": torch.randn(images, 3, 336, 336, generator=noise).to(model.device, model.dtype)}
    else:
        shape = (workload.batch, workload.image_tokens, text.hidden_size)
        features = list((0.3 * torch.randn(shape, generator=noise)).to(model.device, model.dtype))
        features = [feature.requires_grad_() for feature in features]
    return Batch(ids.to(model.device), labels.to(model.device), features, given)
