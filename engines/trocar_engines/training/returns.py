"""Scenes of returns: an instrument leaves, another one like it is there, and it comes back elsewhere.

What identity over an absence is learnt from. Some pairs differ in tape round the shaft and nothing else.
"""

import colorsys
import math
from dataclasses import dataclass, replace

import numpy as np

from trocar_engines.training.canvas import Material, Segment
from trocar_engines.training.instruments import (
    INSTRUMENT_KINDS,
    Instrument,
    Style,
    draw_instrument,
    draw_style,
    wrap_in_tape,
)
from trocar_engines.training.motion import Absence, draw_camera
from trocar_engines.training.optics import draw_optics
from trocar_engines.training.scenes import Cast, Performer, SceneConfig
from trocar_engines.training.texture import Colour
from trocar_engines.training.tissue import draw_palette, draw_structure

LEAST_CONTRAST = 0.35
"""Distance of a tape's colour from the shaft's."""
NEVER_S = 1e6

Rings = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class TapedInstrument:
    """An instrument with rings of tape, see `scenes.Performer`."""

    instrument: Instrument
    tape: Material
    rings: Rings

    @property
    def kind(self) -> str:
        """See `scenes.Performer`."""
        return self.instrument.kind

    @property
    def radius(self) -> float:
        """See `scenes.Performer`."""
        return self.instrument.radius

    def parts(self, time_s: float) -> list[Segment]:
        """See `scenes.Performer`."""
        parts = self.instrument.parts(time_s)
        parts[1:1] = wrap_in_tape(self.instrument.wrist(time_s), self.rings, self.tape)
        return parts

    def smear(self, time_s: float, shutter_s: float) -> float:
        """See `scenes.Performer`."""
        return self.instrument.smear(time_s, shutter_s)


def draw_tape(rng: np.random.Generator, style: Style) -> Material:
    """Tape that stands out from a shaft."""
    while True:
        saturation = rng.uniform(0.5, 1.0) if rng.random() < 0.7 else 0.0
        red, green, blue = colorsys.hsv_to_rgb(rng.uniform(0, 1), saturation, rng.uniform(0.05, 1.0))
        colour: Colour = (red, green, blue)
        if math.dist(colour, style.shaft.colour) >= LEAST_CONTRAST:
            return Material(colour, gloss=rng.uniform(0.05, 0.5), roundness=0.6, texture=0.05)


def draw_rings(rng: np.random.Generator) -> Rings:
    """Where tape sits on a shaft, in shaft radii behind the wrist."""
    rings, end = [], -rng.uniform(0.9, 4.0)
    for _ in range(int(rng.integers(1, 4))):
        start = end - rng.uniform(0.8, 3.5)
        rings.append((start, end))
        end = start - rng.uniform(0.8, 3.0)
    return tuple(rings)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Looks:
    """What makes an instrument itself."""

    kind: str
    style: Style
    radius: float
    tape: tuple[Material, Rings] | None = None


def draw_return_cast(rng: np.random.Generator, config: SceneConfig) -> Cast:
    """Object 1 leaves and mostly returns, object 2 is like it; at times others are in view."""
    aspect, duration_s = config.width_px / config.height_px, config.frames / config.frame_rate
    palette = draw_palette(rng, held_out=config.held_out)
    kind = str(rng.choice(config.kinds))
    own = _Looks(
        kind=kind, style=draw_style(rng, kind), radius=math.exp(rng.uniform(math.log(0.05), math.log(0.14)))
    )
    other = replace(own, radius=own.radius * rng.uniform(0.85, 1.2))
    tape = draw_tape(rng, own.style), draw_rings(rng)
    drawn = rng.random()
    if drawn < 0.5:
        other = replace(other, tape=tape)
    elif drawn < 0.75:
        own = replace(own, tape=tape)
    else:  # of the same kind, but of another make
        other = replace(other, style=draw_style(rng, kind))
    leaves = rng.uniform(0.15, 0.5)
    returns = min(leaves + rng.uniform(0.15, 0.6), 0.95)
    angle = rng.uniform(0, 2 * math.pi)
    players: list[tuple[int, Performer]] = [
        (1, _play(rng, own, angle, aspect, (-NEVER_S, leaves * duration_s), duration_s))
    ]
    if rng.random() < 0.85:
        back = angle if rng.random() < 0.3 else angle + rng.uniform(0.7, 2 * math.pi - 0.7)
        nearer = replace(own, radius=own.radius * math.exp(rng.uniform(-0.5, 0.5)))
        players.append((1, _play(rng, nearer, back, aspect, (returns * duration_s, NEVER_S), duration_s)))
    # The other is there from the start, comes as the first leaves, or only while it is away.
    begins = -NEVER_S if rng.random() < 0.4 else rng.uniform(leaves - 0.15, returns)
    ends = NEVER_S if rng.random() < 0.6 else rng.uniform(max(begins, leaves) + 0.1, 1.2)
    aside = angle + (rng.uniform(-0.5, 0.5) if rng.random() < 0.5 else rng.uniform(0.5, 2 * math.pi - 0.5))
    span = begins * duration_s, ends * duration_s
    players.append((2, _play(rng, other, aside, aspect, span, duration_s)))
    if rng.random() < 0.5:
        third = str(rng.choice(INSTRUMENT_KINDS))
        looks = _Looks(kind=third, style=draw_style(rng, third), radius=rng.uniform(0.05, 0.12))
        everywhere = (-NEVER_S, NEVER_S)
        players.append((3, _play(rng, looks, rng.uniform(0, 2 * math.pi), aspect, everywhere, duration_s)))
    order = rng.permutation(len(players)).tolist()
    ids, performers = zip(*(players[index] for index in order), strict=True)
    structures = tuple(draw_structure(rng, palette, aspect) for _ in range(int(rng.random() < 0.3)))
    camera = draw_camera(rng, rng.uniform(0.0, 1.3))
    return Cast(palette, camera, draw_optics(rng), performers, structures, ids)


def _play(
    rng: np.random.Generator,
    looks: _Looks,
    angle: float,
    aspect: float,
    span: tuple[float, float],
    duration_s: float,
) -> Performer:
    """An instrument at work in a span of time, in seconds, and outside before and after."""
    travel_s = duration_s * rng.uniform(0.05, 0.2)
    instrument = draw_instrument(
        rng,
        looks.kind,
        style=looks.style,
        entry_angle=angle,
        home=(
            0.4 * aspect * math.cos(angle) + rng.uniform(-0.4, 0.4),
            0.4 * math.sin(angle) + rng.uniform(-0.4, 0.4),
        ),
        aspect=aspect,
        absences=(Absence(-2 * NEVER_S, span[0], travel_s), Absence(span[1], 2 * NEVER_S, travel_s)),
        liveliness=rng.uniform(0.2, 1.2),
    )
    instrument = replace(instrument, radius=looks.radius)
    return instrument if looks.tape is None else TapedInstrument(instrument, *looks.tape)
