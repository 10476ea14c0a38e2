"""What an image takes in memory on its way to the decoder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VisionSizes:
    """What tower and projector hold of one image in a training step, in numbers of their dtype; estimates for plans.

    Attributes:
        pixels: Numbers in the encoded image, fp32.
        tower: Numbers alive at the peak of the tower's pass.
        kept: What a trained projector keeps for its backward pass.
        features: What transformers holds until the decoder returns.
        copied: Weights of a trained projector that its backward multiplies by, of which autocast keeps copies; of the
            model, not of an image.
    """

    pixels: int
    tower: int
    kept: int
    features: int
    copied: int
