"""Appearance head: is what is in view now the very instrument that was in view before?

Memory attention and the affinity readout find what looks alike; two graspers from one tray look alike but for
a ring of tape. An appearance descriptor with a gallery of earlier ones is how trackers of people tell them
apart (DeepSORT, arXiv 1703.07402); ours looks through a window along the shaft, where hospitals put their
marks, and is learnt with the pairwise sigmoid loss of SigLIP (arXiv 2303.15343).
"""

import math

import torch
from torch import Tensor, nn

from trocar_engines.network.window import Window, find_pose, look_through

SHAFT = Window(along=48, across=10, behind=10.0, beyond=1.5, aside=1.25)
"""From beyond the tip to ten of the object's widths up its shaft."""
WIDTHS = (24, 32, 48, 64)
"""Channels of the look through the window, whose sides each but the first halves."""
DESCRIPTOR_DIM = 32
LEAST_AREA = 12
"""Points at stride 4 below which a mask is too small to tell what it shows."""
SHARPNESS, EVEN = 12.0, 0.5
"""The log odds that two views show one object: `SHARPNESS` times how far their cosine lies above `EVEN`."""


def shaft_of_object(mask_logits: Tensor, picture: Tensor) -> Tensor:
    """What lies in `SHAFT` on each object.

    Args:
        mask_logits: [B, 4h, 4w].
        picture: [B, 3, S, S] normalised, of any size.

    Returns:
        [B, 5, along, across]: the mask, 0 to 1; 1 inside the picture; the picture.
    """
    pose, side = find_pose(mask_logits), mask_logits.shape[-1]
    mask = mask_logits.float().sigmoid().unsqueeze(1)
    maps = [torch.cat([mask, torch.ones_like(mask)], dim=1), picture.float()]
    return torch.cat([look_through(SHAFT, pose, each, side=side) for each in maps], dim=1)


class AppearanceHead(nn.Module):
    """A look along an object's shaft, projected to a unit vector."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 5
        for index, width in enumerate(WIDTHS):
            # Norms of each picture alone: those of a batch stand still where only a part of a network learns.
            convolution = nn.Conv2d(channels, width, 3, stride=1 if index == 0 else 2, padding=1)
            layers += [convolution, nn.GroupNorm(8, width), nn.ReLU()]
            channels = width
        halved = 2 ** (len(WIDTHS) - 1)
        places = math.ceil(SHAFT.along / halved) * math.ceil(SHAFT.across / halved)
        self.look = nn.Sequential(
            *layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(WIDTHS[-1] * places, DESCRIPTOR_DIM)
        )

    def forward(self, picture: Tensor, mask_logits: Tensor) -> Tensor:
        """Descriptor of each object, [B, `DESCRIPTOR_DIM`] of length 1; see `shaft_of_object`."""
        return self.describe(shaft_of_object(mask_logits, picture))

    def describe(self, seen: Tensor) -> Tensor:
        """Descriptors of what `shaft_of_object` saw."""
        return nn.functional.normalize(self.look(seen), dim=-1)
