"""Light, lens, sensor and recorder: what turns a lit abdomen into recorded pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trocar_engines.training.motion import Point, Wander
from trocar_engines.training.texture import Colour, colour_plane, fractal_noise, mix, ramp

# The light that a recorder with compressed highlights shows as white.
WHITE_LEVEL = 1.6
# Each frame cuts its own window from a sheet of grain that is this much larger than the picture.
GRAIN_ROOM_PX = 32


@dataclass(frozen=True, slots=True)
class Optics:
    """Light, lens, sensor and recorder; zero switches an effect off.

    Lengths in view units, `noise` in 0..1 intensity. `shoulder` 0 clips highlights, 1 compresses them.
    """

    light: tuple[Wander, Wander]
    light_sway: float
    target_brightness: float
    light_strength: float
    shoulder: float
    falloff: float
    highlight: float
    highlight_width: float
    exposure: Wander
    exposure_amplitude: float
    cast: Colour
    saturation: float
    gamma: float
    view_radius: float
    smoke: float
    smoke_time: Wander
    smoke_drift: Point
    blur: float
    blur_time: Wander
    shutter_s: float
    noise: float
    jpeg_quality: int

    def light_at(self, time_s: float) -> Point:
        """Return where the light stands, in view units."""
        return self.light_sway * self.light[0](time_s), self.light_sway * self.light[1](time_s)

    def gain_for(self, brightness: float) -> float:
        """Return the gain for tissue of a mean albedo; endoscopes expose for it within a factor of two."""
        gain = min(2.0, max(0.6, self.target_brightness / max(brightness, 0.02)))
        return gain * (1 + 0.4 * self.falloff)


def _sometimes(rng: np.random.Generator, probability: float, low: float, high: float) -> float:
    value = float(rng.uniform(low, high))
    return value if rng.random() < probability else 0.0


def draw_optics(rng: np.random.Generator) -> Optics:
    """Draw the look of one recording, from a good tower to a cheap grey camera."""
    cast = 1 + rng.normal(0, 0.07, 3)
    strength = math.exp(rng.uniform(math.log(0.8), math.log(2.0)))
    optics = Optics(
        light=(Wander.draw(rng, 0.05, 0.6), Wander.draw(rng, 0.05, 0.6)),
        light_sway=rng.uniform(0.05, 0.6),
        target_brightness=rng.uniform(0.25, 0.5),
        light_strength=strength,
        # Most recorders compress highlights; some clip them, as the grey robotic footage does.
        shoulder=0.0 if rng.random() < 0.3 else rng.uniform(0.3, 1.0),
        falloff=strength * rng.uniform(0.05, 0.8),
        highlight=rng.uniform(0.1, 1.0),
        highlight_width=rng.uniform(0.08, 0.3),
        exposure=Wander.draw(rng, 0.05, 1.0),
        exposure_amplitude=rng.uniform(0.0, 0.3),
        cast=(float(cast[0]), float(cast[1]), float(cast[2])),
        saturation=float(
            rng.choice([rng.uniform(0.6, 1.35), rng.uniform(0.15, 0.6), 0.0], p=[0.65, 0.17, 0.18])
        ),
        gamma=rng.uniform(0.7, 1.25),
        view_radius=_sometimes(rng, 0.3, 1.0, 1.5),
        smoke=_sometimes(rng, 0.3, 0.15, 0.85),
        smoke_time=Wander.draw(rng, 0.05, 0.4),
        smoke_drift=(rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3)),
        blur=_sometimes(rng, 0.3, 0.004, 0.02),
        blur_time=Wander.draw(rng, 0.1, 0.7),
        shutter_s=_sometimes(rng, 0.5, 0.005, 0.05),
        noise=_sometimes(rng, 0.7, 0.003, 0.06),
        jpeg_quality=int(rng.integers(18, 90)) if rng.random() < 0.4 else 0,
    )
    if rng.random() < 0.15:  # grey, clipped and dark at the rim, as cheap or infrared cameras record
        return replace(
            optics,
            saturation=0.0,
            shoulder=0.0,
            gamma=rng.uniform(1.0, 1.6),
            light_strength=rng.uniform(1.2, 2.2),
            falloff=rng.uniform(0.6, 2.0),
            noise=rng.uniform(0.01, 0.08),
        )
    return optics


class Recorder:
    """What happens to a lit scene between the lens and the disk.

    Args:
        optics: what to apply.
        x: float32 [1, W], view coordinates of the pixels' columns; their device is where it all happens.
        y: float32 [H, 1], view coordinates of the rows.
        haze_seed: of the smoke's shape.
        grain_seed: of the sensor's noise.
    """

    def __init__(self, optics: Optics, x: Tensor, y: Tensor, *, haze_seed: int, grain_seed: int) -> None:
        self._optics = optics
        self._haze = fractal_noise(haze_seed, 1, 64, persistence=0.55)[None].to(x.device)
        self._grain: Tensor | None = None
        if optics.noise:
            generator = torch.Generator().manual_seed(grain_seed)
            size = (3, y.shape[0] + GRAIN_ROOM_PX, x.shape[1] + GRAIN_ROOM_PX)
            self._grain = optics.noise * torch.randn(size, generator=generator).to(x.device)
        self._field_of_view: Tensor | None = None
        if optics.view_radius:
            self._field_of_view = ramp(optics.view_radius - (x**2 + y**2).sqrt(), -0.01, 0.02)

    def record(self, image: Tensor, time_s: float, rng: np.random.Generator) -> Tensor:
        """Turn light into pixels.

        Args:
            image: float32 [3, H, W], changed in place.
            time_s: of the frame.
            rng: decides which window of the grain this frame shows.

        Returns:
            uint8 [H, W, 3].
        """
        optics = self._optics
        if optics.smoke:
            self._add_smoke(image, time_s)
        if optics.blur:
            image = _defocus(image, optics.blur * max(0.0, optics.blur_time(time_s)))
        if self._field_of_view is not None:
            image = image * self._field_of_view
        gain = 1 + optics.exposure_amplitude * optics.exposure(time_s)
        image *= colour_plane(np.array(optics.cast) * gain).to(image.device)
        if optics.saturation != 1:
            grey = image.mean(0, keepdim=True)
            image = mix(grey, image, torch.tensor(optics.saturation, device=image.device))
        if optics.shoulder:
            bend = optics.shoulder / WHITE_LEVEL
            image = image.clamp_min_(0) * (1 / WHITE_LEVEL + bend) / (1 + bend * image)
        image = image.clamp_(0, 1).pow_(optics.gamma)
        if self._grain is not None:
            left, top = rng.integers(0, GRAIN_ROOM_PX, 2)
            height, width = image.shape[1:]
            image += self._grain[:, top : top + height, left : left + width]
        return to_pixels(image, optics.jpeg_quality)

    def hide_unseen(self, labels: Tensor) -> Tensor:
        """Return labels [H, W] with 0 where the lens sees nothing."""
        return labels if self._field_of_view is None else labels * (self._field_of_view > 0.5)

    def _add_smoke(self, image: Tensor, time_s: float) -> None:
        optics, device = self._optics, image.device
        density = optics.smoke * max(0.0, 0.4 + 0.6 * optics.smoke_time(time_s))
        x = torch.linspace(-0.5, 0.5, 64, device=device)[None, :].expand(36, 64)
        y = torch.linspace(-0.3, 0.3, 36, device=device)[:, None].expand(36, 64)
        drift_x, drift_y = optics.smoke_drift
        grid = torch.stack([x + drift_x * time_s, y + drift_y * time_s], -1)[None]
        haze = F.grid_sample(self._haze, grid, padding_mode="reflection", align_corners=False)
        haze = F.interpolate(haze, size=image.shape[1:], mode="bilinear", align_corners=False)[0]
        image += (0.62 * optics.light_strength - image) * (density * ramp(haze, -2.0, 2.0))


def _defocus(image: Tensor, radius: float) -> Tensor:
    """Blur float32 [3, H, W] by averaging down and interpolating up; `radius` in view units."""
    height, width = image.shape[1:]
    factor = radius / (2 / height)
    if factor < 1.05:
        return image
    size = (max(8, round(height / factor)), max(8, round(width / factor)))
    small = F.interpolate(image[None], size=size, mode="area")
    return F.interpolate(small, size=(height, width), mode="bicubic", align_corners=False)[0]


def to_pixels(image: Tensor, jpeg_quality: int) -> Tensor:
    """Turn float32 [3, H, W] in 0..1 into uint8 [H, W, 3], through a JPEG coder unless the quality is 0."""
    pixels = image.mul(255).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
    if jpeg_quality == 0:
        return pixels
    _, data = cv2.imencode(".jpg", pixels.cpu().numpy(), [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality])
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    if decoded is None:
        raise RuntimeError("OpenCV could not decode the JPEG it has just encoded")
    return torch.from_numpy(decoded).to(pixels.device)
