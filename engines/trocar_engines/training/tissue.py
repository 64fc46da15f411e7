"""Tissue: its colours, the ground that is painted once, and the structures lying on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import cv2
import numpy as np
import torch
from torch import Tensor

from trocar_engines.network.config import INSTRUMENT_CLASSES
from trocar_engines.training.motion import Point, Wander
from trocar_engines.training.texture import Colour, colour_plane, fractal_noise, mix, ramp

StructureKind = Literal["organ", "tube", "gauze", "needle"]

TISSUE_CLASS = INSTRUMENT_CLASSES[-1]
# Half the side of the square of tissue that is painted once, in ground units: 16:9 at rest needs 1.8, the
# rest is room for the camera; beyond it the texture mirrors.
GROUND_HALF_SIZE = 2.4


class Palette(NamedTuple):
    """The four colours tissue is painted with, sRGB 0..1."""

    base: Colour
    second: Colour
    third: Colour
    vessel: Colour


# Training and held-out families share no row.
TRAINING_PALETTES: tuple[Palette, ...] = (
    Palette((0.45, 0.15, 0.11), (0.58, 0.24, 0.18), (0.80, 0.60, 0.34), (0.32, 0.04, 0.06)),  # liver and fat
    Palette((0.80, 0.46, 0.41), (0.88, 0.61, 0.55), (0.70, 0.30, 0.27), (0.58, 0.11, 0.13)),  # pink mucosa
    Palette((0.86, 0.68, 0.36), (0.79, 0.52, 0.30), (0.62, 0.26, 0.20), (0.60, 0.13, 0.12)),  # yellow fat
    Palette((0.50, 0.47, 0.45), (0.63, 0.59, 0.56), (0.39, 0.34, 0.33), (0.30, 0.22, 0.22)),  # grey ex vivo
    Palette((0.76, 0.63, 0.56), (0.85, 0.74, 0.66), (0.66, 0.46, 0.40), (0.62, 0.22, 0.22)),  # pale bowel
    Palette((0.50, 0.08, 0.06), (0.66, 0.17, 0.13), (0.36, 0.04, 0.05), (0.24, 0.01, 0.03)),  # bleeding bed
    Palette((0.42, 0.29, 0.22), (0.56, 0.40, 0.30), (0.30, 0.18, 0.14), (0.22, 0.09, 0.08)),  # brown, cooked
    Palette((0.37, 0.17, 0.24), (0.52, 0.28, 0.34), (0.72, 0.50, 0.46), (0.24, 0.05, 0.12)),  # spleen
    Palette((0.70, 0.69, 0.66), (0.82, 0.80, 0.76), (0.55, 0.50, 0.48), (0.60, 0.30, 0.30)),  # washed out
)
HELD_OUT_PALETTES: tuple[Palette, ...] = (
    Palette((0.64, 0.26, 0.21), (0.76, 0.40, 0.32), (0.86, 0.68, 0.44), (0.46, 0.06, 0.08)),  # peritoneum
    Palette((0.71, 0.36, 0.28), (0.56, 0.19, 0.16), (0.86, 0.60, 0.44), (0.40, 0.05, 0.08)),  # uterus
    Palette((0.53, 0.33, 0.24), (0.66, 0.40, 0.30), (0.56, 0.54, 0.34), (0.42, 0.10, 0.10)),  # gallbladder
    Palette((0.57, 0.51, 0.50), (0.45, 0.36, 0.37), (0.69, 0.64, 0.60), (0.38, 0.20, 0.22)),  # grey porcine
)


def draw_palette(rng: np.random.Generator, *, held_out: bool) -> Palette:
    """Draw a family's palette, shifted in tone; in training, families also mix."""
    palettes = HELD_OUT_PALETTES if held_out else TRAINING_PALETTES
    colours = np.array(palettes[rng.integers(len(palettes))])
    if not held_out and rng.random() < 0.4:
        colours[1:3] = np.array(palettes[rng.integers(len(palettes))])[1:3]
    colours = colours * rng.uniform(0.85, 1.15, (4, 3)) * rng.uniform(0.75, 1.2)
    if not held_out and rng.random() < 0.1:
        colours = colours[:, rng.permutation(3)]
    base, second, third, vessel = (tuple(row) for row in colours.clip(0.02, 0.95).tolist())
    return Palette(base, second, third, vessel)


def _paint_vessels(rng: np.random.Generator, size: int) -> Tensor:
    """Return float32 [size, size] in 0..1: branching vessels as random walks that thin out."""
    canvas = np.zeros((size, size), np.uint8)
    walkers = [
        (rng.uniform(0, 1, 2), rng.uniform(0, 2 * math.pi), rng.uniform(0.002, 0.011))
        for _ in range(int(rng.integers(0, 9)))
    ]
    budget = 60
    while walkers and budget:
        budget -= 1
        position, heading, width = walkers.pop()
        points = [position]
        for _ in range(30):
            heading += rng.normal(0, 0.25)
            points.append(points[-1] + 0.014 * np.array([math.cos(heading), math.sin(heading)]))
            if width > 0.002 and rng.random() < 0.07:
                walkers.append((points[-1], heading + rng.choice([-0.7, 0.7]), 0.6 * width))
        # Four fractional bits keep thin vessels smooth.
        polyline = (np.array(points) * size * 16).astype(np.int32)
        thickness = max(1, round(width * size))
        cv2.polylines(canvas, [polyline], False, (255,), thickness, cv2.LINE_AA, 4)
    return torch.from_numpy(cv2.GaussianBlur(canvas, (0, 0), size / 700)).float() / 255


def _dome(rng: np.random.Generator, x: Tensor, y: Tensor, wobble: Tensor) -> Tensor:
    """Return the height of one organ: a wobbly ellipse, 1 in its middle, 0 at its edge, negative outside."""
    angle, radius = rng.uniform(0, math.pi), rng.uniform(0.3, 1.3)
    stretch = rng.uniform(1.0, 2.2)
    cos, sin = math.cos(angle), math.sin(angle)
    dx, dy = x - rng.uniform(-2, 2), y - rng.uniform(-2, 2)
    along, across = (dx * cos + dy * sin) / stretch, dy * cos - dx * sin
    return 1 - (along * along + across * across) / radius**2 + 0.25 * wobble


def paint_ground(rng: np.random.Generator, palette: Palette, size: int, *, held_out: bool) -> Tensor:
    """Paint the tissue once, to be sampled for every frame.

    Returns:
        float32 [6, size, size]: albedo RGB, surface slope in x and y, gloss.
    """
    persistence = rng.uniform(0.62, 0.72) if held_out else rng.uniform(0.45, 0.8)
    seeds = rng.integers(0, 2**31, 2).tolist()
    fine = fractal_noise(seeds[0], 3, size, persistence=persistence, finest=size // 2)
    # Bare fractal noise lit from above looks like rock: tissue is smooth at the scale of millimetres.
    folds = fractal_noise(seeds[1], 3, size, persistence=rng.uniform(0.25, 0.5), finest=128)
    axis = torch.linspace(-GROUND_HALF_SIZE, GROUND_HALF_SIZE, size)
    x, y = axis[None, :], axis[:, None]
    colours = [colour_plane(c) for c in (palette.base, palette.second, palette.third)]
    albedo = mix(colours[0], colours[1], ramp(fine[0], -1.5, 1.5)[None])
    albedo = mix(albedo, colours[2], ramp(fine[1] + folds[2], 0.5, 2.5)[None] * rng.uniform(0, 1))
    height = rng.uniform(0.02, 0.16) * folds[0] + rng.uniform(0.0, 0.008) * fine[2]
    mottling = rng.uniform(0.02, 0.14)
    for _ in range(int(rng.integers(1, 7))):
        dome = _dome(rng, x, y, folds[1])
        inside = ramp(dome, -0.02, 0.05)
        organ = mix(colours[rng.integers(3)], colours[rng.integers(3)], 0.3 * ramp(folds[2], -1.5, 1.5))
        # A dark crease is what separates organs of the same colour.
        crease = 1 - rng.uniform(0.1, 0.6) * torch.exp(dome * dome * (-1 / rng.uniform(0.003, 0.03)))
        albedo = mix(albedo, rng.uniform(0.75, 1.15) * organ, inside[None]) * crease
        height = height + rng.uniform(0.1, 0.5) * ramp(dome, -0.05, 0.9)
    albedo = albedo * (1 + mottling * fine[2])
    albedo = mix(
        albedo, colour_plane(palette.vessel), rng.uniform(0.2, 0.9) * _paint_vessels(rng, size)[None]
    )
    gloss = ramp(fine[1], -1.5, 1.5) * rng.uniform(0.1, 1.0)
    slopes = _slopes(height, 2 * GROUND_HALF_SIZE / size)
    if rng.random() < 0.35:
        pool = ramp(folds[2] - rng.uniform(0.6, 2.0), 0.0, 0.25)
        blood = colour_plane((rng.uniform(0.25, 0.5), rng.uniform(0.0, 0.06), rng.uniform(0.0, 0.06)))
        albedo = mix(albedo, blood, 0.9 * pool[None])
        gloss = torch.maximum(gloss, 0.8 * pool)
        slopes *= 1 - 0.6 * pool
    return torch.cat([albedo.clamp_(0, 1), slopes, gloss[None]])


def _slopes(height: Tensor, step: float) -> Tensor:
    """Return a height field's derivatives in x and y, [2, size, size], softly limited to -1..1."""
    slopes = torch.zeros(2, *height.shape)
    slopes[0, :, 1:-1] = (height[:, 2:] - height[:, :-2]) / (2 * step)
    slopes[1, 1:-1] = (height[2:] - height[:-2]) / (2 * step)
    return slopes.tanh_()


@dataclass(frozen=True, slots=True)
class Structure:
    """A trackable piece of tissue or a thing lying on it, in ground units.

    `outline` holds (amplitude, phase) of the outline's Fourier terms 2, 3, ...; `curve` is the centre line
    of a tube or a needle.
    """

    kind: StructureKind
    centre: Point
    radius: float
    stretch: float
    angle: float
    outline: tuple[Point, ...]
    curve: tuple[Point, ...]
    colour: Colour
    gloss: float
    softness: float
    texture: float
    drift: float
    motion: tuple[Wander, Wander, Wander]


def draw_structure(rng: np.random.Generator, palette: Palette, aspect: float) -> Structure:
    """Draw an organ, a tube, a piece of gauze or a needle somewhere near the middle of the view."""
    kind: StructureKind = rng.choice(get_args(StructureKind), p=[0.5, 0.25, 0.15, 0.1])
    radius = math.exp(rng.uniform(math.log(0.15), math.log(0.55)))
    mixed = rng.dirichlet(np.ones(4)) @ np.array(palette) * rng.uniform(0.8, 1.25)
    if rng.random() < 0.3:
        mixed = 0.5 * mixed + 0.5 * rng.uniform(0.1, 0.8, 3)
    if kind == "gauze":
        soaked = rng.uniform(0, 0.25)
        mixed = np.array([0.88, 0.86 - soaked, 0.82 - soaked]) * rng.uniform(0.7, 1.05)
    if kind == "needle":
        mixed = np.full(3, rng.uniform(0.5, 0.85))
    angle = rng.uniform(0, 2 * math.pi)
    sweep = rng.uniform(0.4, 1.2) if kind == "tube" else rng.uniform(2.0, 3.1)
    turns = np.linspace(-0.5 * sweep, 0.5 * sweep, 12)
    size = rng.uniform(0.6, 1.6) if kind == "tube" else rng.uniform(0.2, 0.4)
    curve = size * np.stack([np.cos(turns + angle) - np.cos(angle), np.sin(turns + angle) - np.sin(angle)], 1)
    is_curve = kind in {"tube", "needle"}
    red, green, blue = mixed.clip(0.03, 0.97).tolist()
    return Structure(
        kind=kind,
        centre=(rng.uniform(-0.6, 0.6) * aspect, rng.uniform(-0.6, 0.6)),
        radius=radius,
        stretch=rng.uniform(1.0, 2.4),
        angle=angle,
        outline=tuple((rng.uniform(0, 0.3 / k), rng.uniform(0, 2 * math.pi)) for k in range(2, 6)),
        curve=tuple((x, y) for x, y in curve.tolist()) if is_curve else (),
        colour=(red, green, blue),
        gloss=rng.uniform(0.0, 1.0) if kind != "gauze" else 0.0,
        softness=rng.uniform(0.0, 0.05),
        texture=rng.uniform(0.02, 0.2),
        drift=rng.uniform(0.0, 0.3),
        motion=(Wander.draw(rng, 0.05, 0.5), Wander.draw(rng, 0.05, 0.5), Wander.draw(rng, 0.05, 0.5)),
    )
