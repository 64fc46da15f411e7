"""A labelled clip: what every source of training data yields."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Clip:
    """Frames with the object every pixel belongs to.

    Attributes:
        images: uint8 [T, H, W, 3], RGB.
        labels: uint8 [T, H, W]; 0 is background, otherwise the id (1..N) of the object visible there.
        classes: `classes[i]` is the class of object id `i + 1`; "" where the source knows no class.

    Raises:
        ValueError: shapes or dtypes disagree.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.labels.dtype != torch.uint8:
            raise ValueError(f"images {self.images.dtype}, labels {self.labels.dtype}: both must be uint8")
        if self.images.ndim != 4 or self.images.shape[-1] != 3:
            raise ValueError(f"images {tuple(self.images.shape)}: expected [T, H, W, 3]")
        if self.labels.shape != self.images.shape[:3]:
            raise ValueError(
                f"labels {tuple(self.labels.shape)}: expected {tuple(self.images.shape[:3])}, as the images"
            )
