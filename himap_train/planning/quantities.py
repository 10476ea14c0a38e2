"""What a memory plan is made from, the size of numbers and of batches, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Numerics:
    """Bytes of an element.

    Attributes:
        element: Frozen weights and activations.
        trained: Trained weights, their gradients and optimizer moments.
        mixed: Whether autocast is on.
        mask: Dropout's mask: 1 in a CUDA kernel; on a CPU it is a tensor of the input's dtype.
    """

    element: int
    trained: int
    mixed: bool
    mask: int = 1

    @classmethod
    def of(cls, precision: str, on_cpu: bool = False) -> Numerics:
        """For one of Lightning's precisions."""
        half, mixed = precision.split("-")[0] in ("16", "bf16"), precision.endswith("-mixed")
        trained = 2 if half and not mixed else 4
        return cls(2 if half else 4, trained, mixed, trained if on_cpu else 1)


@dataclass(frozen=True)
class Batch:
    """One device's micro-batch, its rows all alike.

    Attributes:
        rows: Conversations.
        image_tokens: Image tokens of a row.
        text_tokens: Text tokens of a row.
        supervised: Positions of a row with something to predict.
        images: Images of a row.
    """

    rows: int
    image_tokens: int
    text_tokens: int
    supervised: int
    images: int = 1

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.image_tokens + self.text_tokens


@dataclass(frozen=True)
class Activations:
    """Bytes of one step on one device.

    Attributes:
        saved: Kept by autograd when the forward pass ends.
        logits: Logits of a chunk, their fp32 softmax and gradient.
        working: Temporaries of a layer's backward pass, the layer computed again included.
        ranking: Temporaries of the largest ranking.
        peak: The most at any moment.
        moment: When that is.
    """

    saved: int
    logits: int
    working: int
    ranking: int
    peak: int
    moment: str
