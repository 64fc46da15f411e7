"""Motion in closed form, so that any frame renders without the ones before it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Wander:
    """A smooth random signal within -1..1: a sum of sinusoids of time in seconds."""

    amplitudes: tuple[float, ...]
    angular_rates: tuple[float, ...]
    phases: tuple[float, ...]

    @classmethod
    def draw(cls, rng: np.random.Generator, slowest_hz: float, fastest_hz: float) -> Wander:
        """Draw three sinusoids between two frequencies, the slower the larger."""
        rates = np.exp(rng.uniform(math.log(slowest_hz), math.log(fastest_hz), 3))
        amplitudes = 1 / np.sqrt(rates)
        amplitudes /= amplitudes.sum()
        return cls(
            tuple(amplitudes.tolist()),
            tuple((2 * math.pi * rates).tolist()),
            tuple(rng.uniform(0, 2 * math.pi, 3).tolist()),
        )

    def __call__(self, time_s: float) -> float:
        """Return the signal's value at a time."""
        terms = zip(self.amplitudes, self.angular_rates, self.phases, strict=True)
        return sum(amplitude * math.sin(rate * time_s + phase) for amplitude, rate, phase in terms)


def _smooth(value: float, low: float, high: float) -> float:
    """Rise smoothly from 0 at `low` to 1 at `high`."""
    x = min(max((value - low) / (high - low), 0.0), 1.0)
    return x * x * (3 - 2 * x)


@dataclass(frozen=True, slots=True)
class Absence:
    """A stay outside the view; leaving and returning take `travel_s` on either side."""

    start_s: float
    end_s: float
    travel_s: float

    def retraction(self, time_s: float) -> float:
        """Return 0 while at work, 1 while away."""
        leaving = _smooth(time_s, self.start_s - self.travel_s, self.start_s)
        return leaving - _smooth(time_s, self.end_s, self.end_s + self.travel_s)


@dataclass(frozen=True, slots=True)
class Camera:
    """Maps view to ground: turn, zoom, pan, then the breathing of the tissue."""

    pan_amplitude: float
    turn_amplitude: float
    zoom: float
    zoom_amplitude: float
    pan_x: Wander
    pan_y: Wander
    turn: Wander
    zooming: Wander
    breath_amplitude: float
    breath_rate_hz: float
    breath_phase: float

    def to_ground(self, x: np.ndarray, y: np.ndarray, time_s: float) -> tuple[np.ndarray, np.ndarray]:
        """Map view points to the ground points seen there."""
        matrix, offset = self._affine(time_s)
        ground_x = matrix[0, 0] * x + matrix[0, 1] * y + offset[0]
        ground_y = matrix[1, 0] * x + matrix[1, 1] * y + offset[1]
        shift_x, shift_y = self._breath(ground_x, ground_y, time_s)
        return ground_x + shift_x, ground_y + shift_y

    def to_view(self, point: Point, time_s: float) -> Point:
        """Map a ground point to the view; breathing is undone to first order, which its size allows."""
        x, y = np.asarray(point[0]), np.asarray(point[1])
        shift_x, shift_y = self._breath(x, y, time_s)
        matrix, offset = self._affine(time_s)
        view = np.linalg.solve(matrix, np.array([x - shift_x, y - shift_y]) - offset)
        return float(view[0]), float(view[1])

    def scale(self, time_s: float) -> float:
        """Return ground units per view unit."""
        return self.zoom * (1 + self.zoom_amplitude * self.zooming(time_s))

    def _affine(self, time_s: float) -> tuple[np.ndarray, np.ndarray]:
        angle, scale = self.turn_amplitude * self.turn(time_s), self.scale(time_s)
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        offset = self.pan_amplitude * np.array([self.pan_x(time_s), self.pan_y(time_s)])
        return np.array([[cos, -sin], [sin, cos]]), offset

    def _breath(self, x: np.ndarray, y: np.ndarray, time_s: float) -> tuple[np.ndarray, np.ndarray]:
        wave = 2 * math.pi * self.breath_rate_hz * time_s + self.breath_phase
        amplitude = self.breath_amplitude
        return (
            amplitude * np.sin(wave + 1.7 * y) * np.cos(1.1 * x),
            amplitude * np.sin(wave + 0.9 + 1.3 * x) * np.cos(0.8 * y),
        )


def see_ground(
    camera: Camera, time_s: float, *, height_px: int, width_px: int, nodes: int, device: torch.device
) -> Tensor:
    """Return float32 [1, 2, H, W]: x and y of the ground point that every pixel sees.

    The camera's map is smooth, so it is computed on `nodes` x `nodes` points and enlarged.
    """
    aspect = width_px / height_px
    x, y = np.meshgrid(np.linspace(-aspect, aspect, nodes), np.linspace(-1, 1, nodes))
    coarse = np.stack(camera.to_ground(x, y, time_s)).astype(np.float32)[None]
    return F.interpolate(
        torch.from_numpy(coarse).to(device), size=(height_px, width_px), mode="bilinear", align_corners=True
    )


def draw_camera(rng: np.random.Generator, liveliness: float) -> Camera:
    """Draw a camera that moves in proportion to `liveliness`: 0 stands still, 1 is usual."""
    return Camera(
        pan_amplitude=liveliness * rng.uniform(0.02, 0.45),
        turn_amplitude=liveliness * rng.uniform(0.0, 0.35),
        zoom=rng.uniform(0.6, 1.1),
        zoom_amplitude=liveliness * rng.uniform(0.0, 0.2),
        pan_x=Wander.draw(rng, 0.04, 0.5),
        pan_y=Wander.draw(rng, 0.04, 0.5),
        turn=Wander.draw(rng, 0.03, 0.3),
        zooming=Wander.draw(rng, 0.03, 0.3),
        breath_amplitude=rng.uniform(0.0, 0.05),
        breath_rate_hz=rng.uniform(0.2, 0.4),
        breath_phase=rng.uniform(0, 2 * math.pi),
    )
