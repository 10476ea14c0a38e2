"""What the vision tower looks at, carried along with the image tokens, for methods that ask for it.

Shapes: B rows, L current columns, N image tokens of the batch, W width of a key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from himap_train.pruning.token_map import gather_tokens


@dataclass(frozen=True)
class TowerReadings:
    """Of each token; of use for image tokens.

    Attributes:
        facts: (B, L, 1 + W) fp32, see `score` and `key`.
    """

    facts: Tensor

    @property
    def score(self) -> Tensor:
        """(B, L), attention that the patch receives in the tower: from its class token, or else from all patches."""
        return self.facts[..., 0]

    @property
    def key(self) -> Tensor:
        """(B, L, W), the patch's key there, mean over heads; zero for a token that shows no part of the picture."""
        return self.facts[..., 1:]

    @classmethod
    def of(cls, image: Tensor, rows: Tensor, readings: Tensor | None) -> TowerReadings:
        """Those of a batch as the caller passed it in.

        Args:
            image: (B, L) bool, image tokens.
            rows: (B,) long on the host, how many of them each row has.
            readings: (N, 1 + W) fp32, of all images in the order of the batch; of each row once where `generate` runs
                it several times (beams).

        Raises:
            ValueError: They are not given, or are not those of the image tokens.
        """
        total = int(rows.sum())
        if readings is None:
            if total:
                raise ValueError(
                    "a stage reads what the vision tower looks at, and these image features came without it: pass "
                    "pixel_values, encode the images while the schedule is installed, or, where features are cached, "
                    "set data.cache_image_features to null"
                )
            readings = torch.zeros(0, 1, device=image.device)
        times = total // max(len(readings), 1)
        if times > 1 and int(rows[::times].sum()) == len(readings):
            readings = torch.cat([own.repeat(times, 1) for own in readings.split(rows[::times].tolist())])
        if len(readings) != total:
            raise ValueError(f"the vision tower's readings are of {len(readings)} image tokens, the batch has {total}")
        readings = readings.to(image.device)
        facts = readings.new_zeros(*image.shape, readings.shape[1])
        return cls(facts.masked_scatter(image.unsqueeze(2), readings))

    def gather(self, index: Tensor) -> TowerReadings:
        """Those of the columns (B, L')."""
        return TowerReadings(gather_tokens(self.facts, index))
