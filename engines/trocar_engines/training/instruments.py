"""Articulated instruments of several kinds: looks, silhouettes and how they move."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from trocar_engines.network.config import INSTRUMENT_CLASSES
from trocar_engines.training.canvas import Material, Segment
from trocar_engines.training.motion import Absence, Point, Wander
from trocar_engines.training.texture import Colour

# All but the last, which is tissue.
INSTRUMENT_KINDS = INSTRUMENT_CLASSES[:-1]
# No training scene shows it and no network knows its name: what a benchmark expects to be called unknown.
HELD_OUT_KIND = "fan_retractor"
# The longest tip and wrist, in shaft radii: how far past the border a retracted instrument must stand.
TOOL_LENGTH = 14.0


@dataclass(frozen=True, slots=True)
class Joint:
    """A local frame: `origin` in view units, x along `angle`, lengths in units of `unit`."""

    origin: Point
    angle: float
    unit: float

    def at(self, along: float, across: float = 0.0) -> Point:
        """Map local coordinates to view units."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return (
            self.origin[0] + self.unit * (along * cos - across * sin),
            self.origin[1] + self.unit * (along * sin + across * cos),
        )

    def moved(self, along: float, across: float = 0.0, turn: float = 0.0) -> Joint:
        """Return the frame moved by local coordinates, then turned."""
        return Joint(self.at(along, across), self.angle + turn, self.unit)

    def segment(
        self,
        start: Point,
        end: Point,
        radii: Point,
        material: Material,
        *,
        is_flat_ended: bool = False,
        serration: float = 0.0,
        slot: tuple[float, float, float] | None = None,
    ) -> Segment:
        """Return a part between two local points with local radii."""
        return Segment(
            self.at(*start),
            self.at(*end),
            self.unit * radii[0],
            self.unit * radii[1],
            material,
            is_flat_ended,
            serration,
            slot,
        )


@dataclass(frozen=True, slots=True)
class Style:
    """Looks and proportions drawn once per instrument; lengths in shaft radii.

    `shape` holds a few free numbers in 0..1 that vary a class's silhouette.
    """

    shaft: Material
    wrist: Material
    tip: Material
    wrist_length: float
    jaw_length: float
    jaw_width: float
    widest_opening: float
    shape: tuple[float, float, float, float]
    is_robotic: bool


def _shade(rng: np.random.Generator, low: float, high: float, tint: float = 0.04) -> Colour:
    red, green, blue = (rng.uniform(low, high) + rng.normal(0, tint, 3)).clip(0.01, 0.97).tolist()
    return red, green, blue


def _dim(colour: Colour, factor: float) -> Colour:
    return factor * colour[0], factor * colour[1], factor * colour[2]


def _draw_metal(rng: np.random.Generator, stain: float) -> Material:
    colour = _shade(rng, 0.35, 0.85) if rng.random() < 0.8 else _shade(rng, 0.12, 0.3)
    if rng.random() < 0.08:
        colour = (0.78, 0.62, 0.30)  # gilded handles and inserts
    return Material(
        colour,
        gloss=rng.uniform(0.3, 1.0),
        roundness=rng.uniform(0.4, 1.0),
        texture=rng.uniform(0.03, 0.25),
        stain=stain,
    )


def _draw_shaft_material(rng: np.random.Generator, stain: float) -> Material:
    kind = rng.choice(
        ["black", "grey", "metal", "white", "blue", "any"], p=[0.34, 0.16, 0.27, 0.1, 0.08, 0.05]
    )
    ranges = {"black": (0.03, 0.13), "grey": (0.15, 0.4), "metal": (0.45, 0.8), "white": (0.75, 0.92)}
    if kind == "blue":
        colour: Colour = (rng.uniform(0.05, 0.25), rng.uniform(0.2, 0.45), rng.uniform(0.45, 0.8))
    elif kind == "any":
        colour = _shade(rng, 0.3, 0.6, tint=0.25)
    else:
        colour = _shade(rng, *ranges[str(kind)], tint=0.02)
    banded = rng.random() < 0.25
    return Material(
        colour,
        gloss=rng.uniform(0.15, 0.9),
        texture=rng.uniform(0.02, 0.2),
        band_every=rng.uniform(2.5, 9.0) if banded else 0.0,
        band_colour=_shade(rng, 0.05, 0.95, tint=0.15),
        stain=stain,
    )


def draw_style(rng: np.random.Generator, kind: str) -> Style:
    """Draw the looks and proportions of an instrument of a kind."""
    stain = rng.uniform(0.1, 0.9) if rng.random() < 0.3 else 0.0
    is_robotic = kind not in {"suction", "hook"} and rng.random() < 0.5
    tip = _draw_metal(rng, stain)
    is_plain_tube = kind == "suction" and rng.random() < 0.7
    shaft = tip if is_plain_tube else _draw_shaft_material(rng, 0.4 * stain)
    wrist = tip if rng.random() < 0.6 else _draw_metal(rng, stain)
    return Style(
        shaft=shaft,
        wrist=wrist,
        tip=replace(tip, roundness=rng.uniform(0.1, 0.8)),
        wrist_length=rng.uniform(1.6, 3.2) if is_robotic else rng.uniform(0.3, 1.4),
        jaw_length=rng.uniform(0.75, 1.3),
        jaw_width=rng.uniform(0.8, 1.3),
        widest_opening=rng.uniform(0.25, 0.65),
        shape=tuple(rng.uniform(0, 1, 4).tolist()),
        is_robotic=is_robotic,
    )


def draw_clean_style(rng: np.random.Generator, kind: str) -> Style:
    """Draw looks without blood or bands: a black shaft, or a steel one."""
    style, is_black = draw_style(rng, kind), rng.random() < 0.6
    steel = Material(_shade(rng, 0.55, 0.75, tint=0.01), gloss=0.9, roundness=0.8, texture=0.05)
    shaft = replace(steel, colour=_shade(rng, 0.05, 0.1, tint=0.005), gloss=0.5, roundness=1.0)
    return replace(style, shaft=shaft if is_black else replace(steel, roundness=1.0), wrist=steel, tip=steel)


def _grasper(joint: Joint, opening: float, style: Style) -> list[Segment]:
    """Two blunt, slightly bowed jaws, toothed inside, often with a window."""
    length, width = 4.6 * style.jaw_length, 0.42 * style.jaw_width
    has_slot = style.shape[0] < 0.5
    parts = []
    for side in (-1.0, 1.0):
        jaw = joint.moved(0.0, 0.0, side * opening)
        knee, bow = 0.35 * length, side * (0.15 + 0.35 * style.shape[1])
        parts.append(jaw.segment((0, side * 0.3), (knee, bow), (0.95 * width, width), style.tip))
        parts.append(
            jaw.segment(
                (knee, bow),
                (length, side * 0.12),
                (width, 0.72 * width),
                style.tip,
                serration=0.25 * style.shape[2],
                slot=(0.15, 0.8, 0.45) if has_slot else None,
            )
        )
    return parts


def _scissors(joint: Joint, opening: float, style: Style) -> list[Segment]:
    """Two pointed blades crossing at a screw, both bent to one side."""
    length, width = 4.8 * style.jaw_length, 0.42 * style.jaw_width
    bend = 0.9 * style.shape[0]
    parts = []
    for side in (-1.0, 1.0):
        blade = joint.moved(0.0, 0.0, side * (0.06 + opening))
        middle = (0.5 * length, 0.16 * side)
        parts.append(blade.segment((-0.4, -0.25 * side), middle, (width, 0.85 * width), style.tip))
        parts.append(blade.segment(middle, (length, bend - 0.1 * side), (0.85 * width, 0.07), style.tip))
    screw = replace(style.wrist, colour=_dim(style.wrist.colour, 0.5))
    parts.append(joint.segment((0.1, 0), (0.12, 0), (0.32, 0.32), screw))
    return parts


def _hook(joint: Joint, opening: float, style: Style) -> list[Segment]:
    """An insulated rod ending in a bare metal L or J."""
    rod, reach = 2.5 + 3.0 * style.shape[0], (1.2 + 1.4 * style.shape[1]) * style.jaw_length
    wire = 0.2 * style.jaw_width
    insulation = style.shaft if style.shape[2] < 0.5 else replace(style.shaft, colour=(0.85, 0.83, 0.78))
    side = 1.0 if style.shape[3] < 0.5 else -1.0
    bare = joint.moved(rod, 0.0, 0.3 * opening)
    back = (1.0 - 0.6 * style.shape[3]) * 0.5
    return [
        joint.segment((-0.3, 0), (rod, 0), (0.46, 0.4), insulation, is_flat_ended=True),
        bare.segment((-0.2, 0), (1.6, 0), (wire, wire), style.tip),
        bare.segment((1.6, 0), (1.6 + 0.25, side * 0.5 * reach), (wire, wire), style.tip),
        bare.segment((1.85, side * 0.5 * reach), (1.85 - back, side * reach), (wire, 0.8 * wire), style.tip),
    ]


def _clip_applier(joint: Joint, opening: float, style: Style) -> list[Segment]:
    """Two thick parallel bars that step outwards, hook inwards at the end and may hold a clip."""
    length, width = 3.6 * style.jaw_length, 0.36 * style.jaw_width
    gap = 0.35 + 1.3 * opening
    parts = []
    for side in (-1.0, 1.0):
        shoulder, end = (0.9, side * gap), (length, side * gap)
        parts.append(joint.segment((-0.3, side * 0.4), shoulder, (1.2 * width, width), style.tip))
        parts.append(joint.segment(shoulder, end, (width, width), style.tip))
        parts.append(joint.segment(end, (length + 0.35, side * 0.55 * gap), (width, 0.8 * width), style.tip))
    if style.shape[0] < 0.6:
        colour: Colour = (0.8, 0.8, 0.82) if style.shape[1] < 0.5 else (0.55, 0.2, 0.6)
        clip = replace(style.tip, colour=colour, stain=0.0)
        legs = [(length, side * 0.62 * gap) for side in (-1.0, 1.0)]
        parts += [joint.segment((0.5 * length, 0), leg, (0.13, 0.13), clip) for leg in legs]
    return parts


def _suction(joint: Joint, opening: float, style: Style) -> list[Segment]:
    """A plain tube with a dark mouth and side holes."""
    length, bore = 3.0 + 4.0 * style.shape[0], 0.72 + 0.28 * style.shape[1]
    tube = replace(style.shaft, stain=style.tip.stain)
    hole = Material((0.03, 0.02, 0.02), gloss=0.1, texture=0.0)
    parts = [
        joint.segment((-0.5, 0), (length, 0), (bore, bore), tube, is_flat_ended=True),
        joint.segment((length, 0), (length + 0.05, 0), (0.98 * bore, 0.9 * bore), tube),
        joint.segment((length + 0.3, -0.3 * bore), (length + 0.3, 0.3 * bore), (0.34, 0.34), hole),
    ]
    for index in range(int(3 * style.shape[2] + opening)):
        along = length - 1.1 - 1.0 * index
        parts.append(joint.segment((along, 0.25), (along + 0.15, 0.25), (0.2, 0.2), hole))
    return parts


def _needle_driver(joint: Joint, opening: float, style: Style) -> list[Segment]:
    """Two short, stout jaws, cross-cut inside."""
    length, width = 2.6 * style.jaw_length, 0.55 * style.jaw_width
    parts = []
    insert = replace(style.tip, colour=_dim(style.tip.colour, 0.6), roundness=0.1)
    for side in (-1.0, 1.0):
        jaw = joint.moved(0.0, 0.0, side * 0.7 * opening)
        parts.append(jaw.segment((-0.2, side * 0.25), (length, side * 0.24), (width, 0.5 * width), style.tip))
        parts.append(
            jaw.segment(
                (0.3 * length, side * 0.05), (length, side * 0.1), (0.16, 0.12), insert, serration=0.5
            )
        )
    return parts


def _fan_retractor(joint: Joint, opening: float, style: Style) -> list[Segment]:
    """Three to five slim fingers spread like a fan, their ends bent to one side."""
    length, width = 5.2 * style.jaw_length, 0.3 * style.jaw_width
    fingers, spread = 3 + int(3 * style.shape[0]), 0.35 + opening
    parts = []
    for index in range(fingers):
        finger = joint.moved(0.0, 0.0, spread * (2 * index / (fingers - 1) - 1))
        parts.append(finger.segment((-0.2, 0), (length, 0), (1.2 * width, width), style.tip))
        parts.append(finger.segment((length, 0), (length + 0.5, 0.4), (width, 0.8 * width), style.tip))
    return parts


def wrap_in_tape(wrist: Joint, rings: tuple[tuple[float, float], ...], tape: Material) -> list[Segment]:
    """Return rings of tape round a shaft; they belong over the shaft and under all else.

    Args:
        wrist: where the shaft ends, see `Instrument.wrist`.
        rings: from and to, in shaft radii along the wrist's x: negative.
        tape: its looks.
    """
    return [
        wrist.segment((start, 0), (end, 0), (1.14, 1.1), tape, is_flat_ended=True) for start, end in rings
    ]


_TIPS: dict[str, Callable[[Joint, float, Style], list[Segment]]] = {
    "grasper": _grasper,
    "scissors": _scissors,
    "hook": _hook,
    "clip_applier": _clip_applier,
    "suction": _suction,
    "needle_driver": _needle_driver,
    HELD_OUT_KIND: _fan_retractor,
}


@dataclass(frozen=True, slots=True)
class Instrument:
    """One instrument: looks, where it enters and works, and how it moves.

    `entry` lies just outside the view; `home` is where the wrist works, both in view units. `radius` is the
    shaft's half width at the wrist.
    """

    kind: str
    style: Style
    entry: Point
    home: Point
    radius: float
    reach: float
    bend_amplitude: float
    depth_amplitude: float
    poke_amplitude: float
    motion: tuple[Wander, Wander, Wander, Wander, Wander, Wander]
    absences: tuple[Absence, ...]

    def wrist(self, time_s: float) -> Joint:
        """Return the wrist's frame: where the shaft ends and which way it points."""
        sway_x, sway_y, poke, _, _, depth = self.motion
        x = self.home[0] + self.reach * sway_x(time_s)
        y = self.home[1] + self.reach * sway_y(time_s)
        angle = math.atan2(y - self.entry[1], x - self.entry[0])
        forward = (math.cos(angle), math.sin(angle))
        poked = self.poke_amplitude * max(0.0, poke(time_s)) ** 2
        radius = self.radius * (1 + self.depth_amplitude * depth(time_s))
        away = max((absence.retraction(time_s) for absence in self.absences), default=0.0)
        out = TOOL_LENGTH * radius
        work = math.hypot(x - self.entry[0], y - self.entry[1]) + poked
        distance = (1 - away) * work - away * out
        return Joint(
            (self.entry[0] + distance * forward[0], self.entry[1] + distance * forward[1]), angle, radius
        )

    def parts(self, time_s: float) -> list[Segment]:
        """Return the visible parts, the farthest first."""
        wrist, style = self.wrist(time_s), self.style
        _, _, _, bend, jaws, _ = self.motion
        # The far end of the shaft is nearer the camera, hence wider.
        shaft = wrist.segment((-60.0, 0), (0.0, 0), (1.6, 1.0), style.shaft, is_flat_ended=True)
        collar = wrist.segment((-1.2, 0), (-0.2, 0), (1.06, 1.06), style.wrist, is_flat_ended=True)
        turn = self.bend_amplitude * bend(time_s)
        clevis = wrist.moved(0.0, 0.0, 0.5 * turn)
        length = style.wrist_length
        slot = (0.35, 0.8, 0.3) if style.is_robotic else None
        knuckle = clevis.segment((-0.2, 0), (length, 0), (0.92, 0.78), style.wrist, slot=slot)
        opening = style.widest_opening * (0.5 + 0.5 * jaws(time_s)) ** 1.5
        tip = _TIPS[self.kind](clevis.moved(length, 0.0, 0.5 * turn), opening, style)
        return [shaft, collar, knuckle, *tip]

    def smear(self, time_s: float, shutter_s: float) -> float:
        """Return how far the wrist moves while the shutter is open, in view units."""
        if shutter_s == 0:
            return 0.0
        return min(0.06, math.dist(self.wrist(time_s).origin, self.wrist(time_s + shutter_s).origin))


def _border_point(angle: float, aspect: float, margin: float) -> Point:
    """Return the point where a ray from the centre leaves the view widened by a margin."""
    cos, sin = math.cos(angle), math.sin(angle)
    reach = min((aspect + margin) / max(abs(cos), 1e-6), (1 + margin) / max(abs(sin), 1e-6))
    return reach * cos, reach * sin


def draw_instrument(
    rng: np.random.Generator,
    kind: str,
    *,
    style: Style,
    entry_angle: float,
    home: Point,
    aspect: float,
    absences: tuple[Absence, ...] = (),
    liveliness: float = 1.0,
) -> Instrument:
    """Draw size and motion; the shaft comes in at `entry_angle`, the wrist works around `home`."""
    radius = math.exp(rng.uniform(math.log(0.05), math.log(0.2)))
    rates = (0.08, 0.9 * liveliness + 0.1)
    return Instrument(
        kind=kind,
        style=style,
        entry=_border_point(entry_angle, aspect, 0.15),
        home=home,
        radius=radius,
        reach=liveliness * rng.uniform(0.05, 0.5),
        bend_amplitude=rng.uniform(0.3, 1.3) if style.is_robotic else rng.uniform(0.0, 0.25),
        depth_amplitude=rng.uniform(0.0, 0.3),
        poke_amplitude=liveliness * rng.uniform(0.0, 0.4),
        motion=(
            Wander.draw(rng, *rates),
            Wander.draw(rng, *rates),
            Wander.draw(rng, 0.3, 1.5),
            Wander.draw(rng, *rates),
            Wander.draw(rng, 0.1, 1.2),
            Wander.draw(rng, 0.05, 0.4),
        ),
        absences=absences,
    )
