"""Synthetic surgery, rendered lazily in torch and identical for equal seeds.

Geometry lives in *view units*: the picture spans -1..1 vertically (y down) and -aspect..aspect
horizontally, so one scene renders at any resolution. Tissue lives in *ground units*, the same scale before
the camera pans, turns and zooms. Everything that moves is a closed-form function of time, so that any frame
renders without the ones before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trocar_engines.training.canvas import Canvas, Material, Segment
from trocar_engines.training.clicks import farthest_point
from trocar_engines.training.clip import Clip
from trocar_engines.training.instruments import (
    INSTRUMENT_KINDS,
    Instrument,
    draw_clean_style,
    draw_instrument,
    draw_style,
)
from trocar_engines.training.motion import Absence, Camera, Point, draw_camera, see_ground
from trocar_engines.training.optics import Optics, Recorder, draw_optics
from trocar_engines.training.texture import fractal_noise
from trocar_engines.training.tissue import (
    GROUND_HALF_SIZE,
    HELD_OUT_PALETTES,
    TISSUE_CLASS,
    Palette,
    Structure,
    draw_palette,
    draw_structure,
    paint_ground,
)

# The camera's map is smooth: this many points a side are computed, the rest interpolated.
CAMERA_NODES = 25
# Before, away, back: 2 s, 0.7 s out, 4 s away, 0.7 s in, and something to watch afterwards.
DEMO_SHORTEST_S = 8.5
DEMO_AWAY_S = 4.0
DEMO_TRAVEL_S = 0.7
# The first rows of `HELD_OUT_PALETTES`: red, pink and yellow, what people expect of laparoscopy.
DEMO_PALETTES = 2
DEMO_KINDS = ("grasper", "hook", "scissors", "needle_driver")


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneConfig:
    """What to render; two equal configurations render the same pixels.

    Attributes:
        frame_rate: frames per second of the scene's own clock, Hz; a low rate makes large steps.
        held_out: draw seeds, palettes and textures from the family no training scene uses.
        script: "random" for training, "demo" for two instruments that keep `demo_scene`'s promises.
        kinds: of instruments to draw from; as it stands all but `HELD_OUT_KIND`, which training must not see.

    Raises:
        ValueError: a size, a count or a rate is not positive, or a demo is too short.
    """

    height_px: int
    width_px: int
    frames: int
    frame_rate: float
    seed: int
    held_out: bool = False
    script: Literal["random", "demo"] = "random"
    kinds: tuple[str, ...] = INSTRUMENT_KINDS

    def __post_init__(self) -> None:
        if min(self.height_px, self.width_px) < 16:
            raise ValueError(f"{self.height_px}x{self.width_px}: a scene needs at least 16 pixels a side")
        if self.frames < 1 or self.frame_rate <= 0:
            raise ValueError(f"{self.frames} frames at {self.frame_rate} Hz: both must be positive")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed}: must not be negative")
        if self.script == "demo" and self.frames / self.frame_rate < DEMO_SHORTEST_S:
            raise ValueError(
                f"{self.frames} frames at {self.frame_rate} Hz: a demo lasts at least {DEMO_SHORTEST_S} s"
            )


class Performer(Protocol):
    """What plays an instrument: an `Instrument`, or one stay in view of many."""

    @property
    def kind(self) -> str:
        """Class of the instrument."""

    @property
    def radius(self) -> float:
        """Half width of the shaft in view units."""

    def parts(self, time_s: float) -> list[Segment]:
        """Return the visible parts, the farthest first; none while it is away."""

    def smear(self, time_s: float, shutter_s: float) -> float:
        """Return how far it moves while the shutter is open, in view units."""


@dataclass(frozen=True, slots=True)
class Cast:
    """Everything drawn from the seed.

    Attributes:
        instruments: painted in this order.
        structures: numbered after the last instrument.
        object_ids: of the instruments, from 1 without a gap; several may play one object in turn. Empty
            counts them.
    """

    palette: Palette
    camera: Camera
    optics: Optics
    instruments: tuple[Performer, ...]
    structures: tuple[Structure, ...]
    object_ids: tuple[int, ...] = ()

    @property
    def players(self) -> list[tuple[int, Performer]]:
        """Return object id and instrument, in the order of painting."""
        ids = self.object_ids or range(1, len(self.instruments) + 1)
        return list(zip(ids, self.instruments, strict=True))

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the class of object id i + 1 at place i."""
        kinds = {object_id: instrument.kind for object_id, instrument in self.players}
        return tuple(kinds[object_id] for object_id in sorted(kinds)) + (TISSUE_CLASS,) * len(self.structures)


DrawCast = Callable[[np.random.Generator, SceneConfig], Cast]


def _draw_absences(rng: np.random.Generator, duration_s: float, *, is_first: bool) -> tuple[Absence, ...]:
    """Draw at most one stay outside, which may open or close the clip; the first instrument opens it."""
    if rng.random() < 0.55:
        return ()
    start, length = rng.uniform(0.35 if is_first else -0.3, 0.9), rng.uniform(0.2, 0.6)
    travel_s = min(0.8, rng.uniform(0.08, 0.3) * duration_s)
    return (Absence(start * duration_s, (start + length) * duration_s, travel_s),)


def _draw_cast(rng: np.random.Generator, config: SceneConfig) -> Cast:
    aspect, duration_s = config.width_px / config.height_px, config.frames / config.frame_rate
    palette = draw_palette(rng, held_out=config.held_out)
    count = int(rng.choice([0, 1, 2, 3, 4], p=[0.06, 0.3, 0.37, 0.19, 0.08]))
    instruments: list[Instrument] = []
    for _ in range(count):
        kind = str(rng.choice(config.kinds))
        style = draw_style(rng, kind)
        absences = _draw_absences(rng, duration_s, is_first=not instruments)
        if instruments and rng.random() < 0.25:
            # A look-alike of the one before. Both stay: while one is away nobody could tell which.
            kind, style = instruments[-1].kind, instruments[-1].style
            instruments[-1], absences = replace(instruments[-1], absences=()), ()
        instrument = draw_instrument(
            rng,
            kind,
            style=style,
            entry_angle=rng.uniform(0, 2 * math.pi),
            home=(rng.uniform(-0.6, 0.6) * aspect, rng.uniform(-0.6, 0.6)),
            aspect=aspect,
            absences=absences,
            liveliness=rng.uniform(0.2, 1.6),
        )
        instruments.append(instrument)
    most = 2 if instruments else 3
    least = 0 if instruments else 1
    number = least if rng.random() < 0.5 else int(rng.integers(least, most + 1))
    structures = tuple(draw_structure(rng, palette, aspect) for _ in range(number))
    camera = draw_camera(rng, rng.uniform(0.0, 1.3))
    return Cast(palette, camera, draw_optics(rng), tuple(instruments), structures)


def _demo_cast(rng: np.random.Generator, config: SceneConfig) -> Cast:
    """Draw two calm instruments from either side; the second leaves once."""
    aspect, duration_s = config.width_px / config.height_px, config.frames / config.frame_rate
    kinds = rng.choice(DEMO_KINDS, 2, replace=False).tolist()
    away_s = max(2.0 + DEMO_TRAVEL_S, 0.35 * duration_s)
    away = Absence(away_s, away_s + DEMO_AWAY_S, DEMO_TRAVEL_S)
    instruments = []
    for kind, side, absences in zip(kinds, (-1.0, 1.0), ((), (away,)), strict=True):
        instrument = draw_instrument(
            rng,
            kind,
            style=draw_clean_style(rng, kind),
            entry_angle=math.pi / 2 - side * rng.uniform(0.75, 1.05),
            home=(side * rng.uniform(0.2, 0.35) * aspect, rng.uniform(-0.05, 0.25)),
            aspect=aspect,
            absences=absences,
            liveliness=0.5,
        )
        instruments.append(
            replace(
                instrument,
                radius=rng.uniform(0.07, 0.095),
                reach=rng.uniform(0.12, 0.2),
                poke_amplitude=0.12,
                depth_amplitude=0.1,
            )
        )
    optics = replace(
        draw_optics(rng),
        light_sway=0.25,
        target_brightness=0.46,
        light_strength=1.5,
        shoulder=0.6,
        falloff=0.4,
        highlight=0.9,
        highlight_width=0.14,
        exposure_amplitude=0.05,
        cast=(1.0, 1.0, 1.0),
        saturation=1.1,
        gamma=1.0,
        view_radius=0.0,
        smoke=0.25,
        blur=0.0,
        shutter_s=0.01,
        noise=0.008,
        jpeg_quality=0,
    )
    camera = replace(draw_camera(rng, 0.25), zoom=0.8, breath_amplitude=0.02)
    palette = HELD_OUT_PALETTES[rng.integers(DEMO_PALETTES)]
    return Cast(palette, camera, optics, tuple(instruments), ())


class Scene:
    """One scene, rendered frame by frame in any order.

    Args:
        config: what to render.
        device: where to render. Equal configurations agree bit for bit on one type of device and number of
            threads; another number of threads moves a few pixels (measured: 0 to 159 of 393,216 values).
        draw_cast: another script than those of `SceneConfig`.
    """

    def __init__(
        self,
        config: SceneConfig,
        device: torch.device | str = "cpu",
        draw_cast: DrawCast | None = None,
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        rng = np.random.default_rng([config.seed, int(config.held_out), int(config.script == "demo")])
        draw_cast = draw_cast or (_demo_cast if config.script == "demo" else _draw_cast)
        cast = draw_cast(rng, config)
        # About one texel a pixel; the largest takes 100 MB.
        size = 512 if config.height_px <= 320 else 1024 if config.height_px <= 540 else 2048
        ground_rng = np.random.default_rng(rng.integers(2**63))
        ground = paint_ground(ground_rng, cast.palette, size, held_out=config.held_out)
        self._ground = ground[None].to(self.device)
        self._brightness = float(ground[:3].numpy().mean())
        detail_seed, self._haze_seed, self._grain_seed = (int(rng.integers(2**31)) for _ in range(3))
        detail = fractal_noise(detail_seed, 1, 256, persistence=0.7, finest=64)
        self._detail = detail[None].to(self.device)
        self._x = self._axis(config.width_px, config.width_px / config.height_px)[None, :]
        self._y = self._axis(config.height_px, 1.0)[:, None]
        self.restage(cast)

    def restage(self, cast: Cast) -> None:
        """Put another cast, with its camera and optics, on the same ground, which takes longest to paint."""
        self._cast = cast
        self._gain = cast.optics.gain_for(brightness=self._brightness)
        self._recorder = Recorder(
            cast.optics, self._x, self._y, haze_seed=self._haze_seed, grain_seed=self._grain_seed
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """Class of object id i + 1 at place i."""
        return self._cast.classes

    @torch.no_grad()
    def render(self, t: int) -> tuple[Tensor, Tensor]:
        """Render frame `t`.

        Returns:
            image: uint8 [H, W, 3], RGB.
            labels: uint8 [H, W], 0 or the id of the object visible there. Smoke hides nothing.
        """
        config, cast, time_s = self.config, self._cast, t / self.config.frame_rate
        light = cast.optics.light_at(time_s)
        ground = see_ground(
            cast.camera,
            time_s,
            height_px=config.height_px,
            width_px=config.width_px,
            nodes=CAMERA_NODES,
            device=self.device,
        )
        ground_x, ground_y = ground[0, 0], ground[0, 1]
        image, falloff = self._light_ground(ground_x, ground_y, light)
        labels = torch.zeros(image.shape[1:], dtype=torch.uint8, device=self.device)
        canvas = Canvas(image, labels, falloff, self._x, self._y, self._detail, light)
        first_structure = len(cast.classes) - len(cast.structures) + 1
        for object_id, structure in enumerate(cast.structures, first_structure):
            self._paint_structure(canvas, structure, object_id, ground_x, ground_y, time_s)
        for object_id, instrument in cast.players:
            parts = instrument.parts(time_s)
            if not parts:
                continue
            canvas.cast_shadow(parts, 1.2 * instrument.radius)
            smear = instrument.smear(time_s, cast.optics.shutter_s)
            for part in parts:
                canvas.paint(part, object_id, smear)
        pixels = self._recorder.record(image, time_s, np.random.default_rng([config.seed, t]))
        return pixels, self._recorder.hide_unseen(labels)

    def first_clicks(self) -> tuple[tuple[int, int], ...]:
        """Return for every instrument the (x, y) pixel of frame 0 deepest inside its visible mask.

        Raises:
            ValueError: an instrument is not visible on frame 0.
        """
        _, labels = self.render(0)
        clicks = []
        for object_id in range(1, len(self._cast.instruments) + 1):
            point = farthest_point((labels == object_id).cpu().numpy())
            if point is None:
                raise ValueError(f"seed {self.config.seed}: instrument {object_id} is not visible on frame 0")
            clicks.append(point)
        return tuple(clicks)

    def _axis(self, pixels: int, half_extent: float) -> Tensor:
        step = 2 * half_extent / pixels
        return (torch.arange(pixels, dtype=torch.float32, device=self.device) + 0.5) * step - half_extent

    def _light_ground(self, x: Tensor, y: Tensor, light: Point) -> tuple[Tensor, Tensor]:
        """Light the tissue; return the image, float32 [3, H, W], and the light's falloff [H, W]."""
        optics = self._cast.optics
        grid = torch.stack([x, y], -1)[None] / GROUND_HALF_SIZE
        sampled = F.grid_sample(
            self._ground, grid, mode="bilinear", padding_mode="reflection", align_corners=False
        )[0]
        to_light_x, to_light_y = light[0] - self._x, light[1] - self._y
        squared = to_light_x**2 + to_light_y**2
        falloff = self._gain * optics.light_strength / (1 + optics.falloff * squared)
        to_light = torch.rsqrt(1 + squared)
        slope_x, slope_y, gloss = sampled[3], sampled[4], sampled[5]
        # A headlight one unit above the tissue; slopes rise towards +x and +y.
        shade = 0.9 - 0.7 * to_light * (slope_x * to_light_x + slope_y * to_light_y)
        shade -= 0.3 * (slope_x * slope_x + slope_y * slope_y)
        shade.clamp_min_(0.2)
        mirror = (slope_x + 0.45 * to_light_x) ** 2 + (slope_y + 0.45 * to_light_y) ** 2
        highlight = torch.exp(mirror * (-1 / optics.highlight_width**2)) * gloss * optics.highlight
        image = sampled[:3] * (shade * falloff) + highlight
        return image, falloff

    def _paint_structure(
        self, canvas: Canvas, structure: Structure, object_id: int, x: Tensor, y: Tensor, time_s: float
    ) -> None:
        camera = self._cast.camera
        drift_x, drift_y, swell = (wander(time_s) for wander in structure.motion)
        centre = (
            structure.centre[0] + structure.drift * drift_x,
            structure.centre[1] + structure.drift * drift_y,
        )
        if structure.curve:
            points = [camera.to_view((centre[0] + px, centre[1] + py), time_s) for px, py in structure.curve]
            wide = (0.25 * structure.radius if structure.kind == "tube" else 0.02) / camera.scale(time_s)
            material = Material(structure.colour, structure.gloss, texture=structure.texture)
            parts = [
                Segment(a, b, wide, wide, material, softness=structure.softness) for a, b in pairwise(points)
            ]
            canvas.cast_shadow(parts, 0.5 * wide)
            canvas.paint_curve(parts, object_id)
            return
        canvas.paint_blob(structure, object_id, x - centre[0], y - centre[1], 0.1 * swell)


def render_clip(scene: Scene) -> Clip:
    """Render every frame of a scene."""
    frames = [scene.render(t) for t in range(scene.config.frames)]
    images, labels = (torch.stack(maps) for maps in zip(*frames, strict=True))
    return Clip(images=images, labels=labels, classes=scene.classes)


def demo_scene(
    *,
    height_px: int = 720,
    width_px: int = 1280,
    frames: int = 450,
    frame_rate: float = 30.0,
    seed: int = 3,
    device: torch.device | str = "cpu",
) -> Scene:
    """Return a calm scene of two different instruments in a palette that training never sees.

    Both are in full view on frame 0. Instrument 1 stays; instrument 2 leaves the view for four seconds and
    returns. `Scene.first_clicks` gives a point on each.
    """
    return Scene(
        SceneConfig(
            height_px=height_px,
            width_px=width_px,
            frames=frames,
            frame_rate=frame_rate,
            seed=seed,
            held_out=True,
            script="demo",
        ),
        device,
    )
