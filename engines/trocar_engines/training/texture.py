"""Colours and noise: what tissue, instruments and backgrounds are painted with."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Colour = tuple[float, float, float]


def fractal_noise(
    seed: int, channels: int, size: int, *, persistence: float, coarsest: int = 4, finest: int = 256
) -> Tensor:
    """Return float32 [channels, size, size] noise of zero mean and unit deviation, on the CPU.

    Each octave doubles the grid and adds values `persistence` times as large, up to `finest` cells. Equal
    seeds give the same picture at every size: larger sizes only add octaves.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(channels, coarsest, coarsest, generator=generator)
    amplitude, cells = 1.0, coarsest
    while 2 * cells <= size:
        cells *= 2
        amplitude *= persistence
        noise = F.interpolate(noise[None], scale_factor=2, mode="bilinear", align_corners=False)[0]
        if cells <= finest:
            # Doubling and averaging over and over tends to a cubic spline: lit surfaces show no grid.
            noise = F.avg_pool2d(noise, 3, stride=1, padding=1, count_include_pad=False)
            noise += amplitude * torch.randn(channels, cells, cells, generator=generator)
    if cells != size:
        noise = F.interpolate(noise[None], size=(size, size), mode="bilinear", align_corners=False)[0]
    # NumPy's sums, unlike torch's, do not depend on the number of threads; every second row is enough.
    sample = noise[:, ::2, ::2].numpy()
    mean, deviation = sample.mean(axis=(1, 2), keepdims=True), sample.std(axis=(1, 2), keepdims=True)
    return (noise - torch.from_numpy(mean)) / torch.from_numpy(deviation)


def mix(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Return `first` where the weight is 0, `second` where it is 1."""
    return first + (second - first) * weight


def colour_plane(colour: Colour | np.ndarray) -> Tensor:
    """Return a colour as float32 [3, 1, 1], on the CPU."""
    return torch.tensor([float(value) for value in colour])[:, None, None]


def ramp(value: Tensor, low: float, high: float) -> Tensor:
    """Rise smoothly from 0 at `low` to 1 at `high`."""
    x = ((value - low) / (high - low)).clamp_(0, 1)
    return x * x * (3 - 2 * x)
