"""LongSim: operations of minutes, rendered from seeds and textures that training never uses.

Each clip follows one instrument that leaves the view again and again (never in the set `short`), while the
camera zooms, turns and pans. Whenever it is away a look-alike of its class, with the very same looks, is in
view, and still is on its return. Every second look-alike carries rings of coloured tape: then the two can be
told apart, and the instrument must be found again. Without the tape nothing but a guess can tell: staying
LOST is right. Either comes back from another side. Every second pair of clips also shows an instrument of a
class that training never saw.

Clips are stored in DAVIS layout with `objects.json` beside them (see `davis`), since rendering a frame takes
longer than tracking it.
"""

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch

from trocar.writer import write_paletted_png
from trocar_bench.davis import OBJECTS_FILE
from trocar_engines.errors import TrocarError
from trocar_engines.training.canvas import Material, Segment
from trocar_engines.training.instruments import (
    HELD_OUT_KIND,
    INSTRUMENT_KINDS,
    Instrument,
    Style,
    draw_instrument,
    draw_style,
)
from trocar_engines.training.motion import Absence, Camera, Point, Wander, draw_camera
from trocar_engines.training.optics import Optics, draw_optics
from trocar_engines.training.returns import TapedInstrument
from trocar_engines.training.scenes import Cast, Performer, Scene, SceneConfig
from trocar_engines.training.store import begin_rendering, identify_renderer
from trocar_engines.training.texture import Colour
from trocar_engines.training.tissue import draw_palette

WIDTH_PX, HEIGHT_PX = 480, 270
FRAME_RATE_HZ = 25.0
FIRST_SEED = 1_000_000_000
"""Training counts its seeds from 0."""
SEED_STEP = 1_000
"""Between the seeds of two sets of clips."""
JPEG_QUALITY = 92
CHUNK_FRAMES = 125
"""Frames that a worker renders in one go."""

OBJECT_ID, LOOK_ALIKE_ID, RETRACTOR_ID = 1, 2, 3
NEVER_S = 1e6
TRAVEL_S = 1.4
"""From the working place to well outside the view."""
FAR = 3.4
"""How far from the view's middle instruments enter, in view units: beyond it at the widest zoom."""
TAPES: tuple[Colour, ...] = ((0.95, 0.8, 0.05), (0.1, 0.75, 0.2), (0.1, 0.35, 0.95), (0.95, 0.95, 0.95))
RINGS = ((-4.6, -1.4), (-8.0, -6.2))
"""Where the tape sits on the shaft, in shaft radii behind the wrist."""

Span = tuple[float, float]
"""From and to, in seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subset:
    """A set of clips.

    Args:
        name: on the command line.
        clips: how many.
        frames: of each.
        absences: fewest and most of the prompted instrument.
        absence_s: shortest and longest, without the way out and in.
        first_seed: of the set's clips; no two sets share a seed.
    """

    name: str
    clips: int
    frames: int
    absences: tuple[int, int]
    absence_s: Span
    first_seed: int


DEV = Subset(
    name="dev",
    clips=3,
    frames=1_000,
    absences=(2, 2),
    absence_s=(4.5, 6.0),
    first_seed=FIRST_SEED + SEED_STEP // 2,
)
FULL = Subset(
    name="full", clips=10, frames=3_000, absences=(3, 4), absence_s=(10.0, 13.0), first_seed=FIRST_SEED
)
SHORT = Subset(
    name="short",
    clips=12,
    frames=75,
    absences=(0, 0),
    absence_s=(0.0, 0.0),
    first_seed=FIRST_SEED + SEED_STEP // 4,
)
"""Three seconds each without an absence, every class twice: what a prompt and a short memory are worth."""
SUBSETS = {subset.name: subset for subset in (SHORT, DEV, FULL)}


@dataclass(frozen=True, kw_only=True, slots=True)
class LongClip:
    """The script of one clip.

    Args:
        name: of its folder.
        seed: of everything drawn.
        frames: at `FRAME_RATE_HZ`.
        kind: class of the instrument and of its look-alike.
        is_marked: whether the look-alike carries tape.
        has_retractor: whether an instrument of `HELD_OUT_KIND` is in view.
        absences: of the instrument, while it is wholly outside.
        look_alike_stays: from the begin of the look-alike's way in to the end of its way out.
    """

    name: str
    seed: int
    frames: int
    kind: str
    is_marked: bool
    has_retractor: bool
    absences: tuple[Span, ...]
    look_alike_stays: tuple[Span, ...]

    @property
    def duration_s(self) -> float:
        """Length."""
        return self.frames / FRAME_RATE_HZ

    @property
    def stays(self) -> tuple[Span, ...]:
        """While the instrument is at work or on its way in or out."""
        edges = [-NEVER_S, *(edge for absence in self.absences for edge in absence), NEVER_S]
        return tuple(zip(edges[::2], edges[1::2], strict=True))


def script_clips(subset: Subset, seed: int = 0) -> list[LongClip]:
    """The clips of a set; another `seed` makes another set of the same kind."""
    first = subset.first_seed + SEED_STEP * seed
    kinds = np.random.default_rng(first).permutation(np.array(INSTRUMENT_KINDS)).tolist()
    return [
        _script_clip(subset, first + index, index, str(kinds[index % len(kinds)]))
        for index in range(subset.clips)
    ]


def _script_clip(subset: Subset, seed: int, index: int, kind: str) -> LongClip:
    rng = np.random.default_rng([seed, 0])
    duration_s = subset.frames / FRAME_RATE_HZ
    count = int(rng.integers(subset.absences[0], subset.absences[1] + 1))
    lengths = rng.uniform(*subset.absence_s, count)
    # Each stay gets the same 60% and a share of the rest.
    present_s = duration_s - lengths.sum()
    stays = present_s * (0.6 / (count + 1) + 0.4 * rng.dirichlet(np.full(count + 1, 3.0)))
    absences, look_alike_stays, now_s = [], [], 0.0
    for stay_s, length_s, next_s in zip(stays, lengths, stays[1:], strict=False):
        leaves_s = now_s + float(stay_s)
        returns_s = leaves_s + float(length_s)
        absences.append((leaves_s, returns_s))
        # In view before the instrument has left, and for a while after its return.
        stays_on_s = rng.uniform(0.4, 0.7) * float(next_s)
        look_alike_stays.append((leaves_s - rng.uniform(0.0, 1.0), returns_s + stays_on_s))
        now_s = returns_s
    if rng.random() < 0.5:  # in view from the first frame on, while the prompt is given
        look_alike_stays.insert(0, (-NEVER_S, rng.uniform(0.3, 0.5) * float(stays[0])))
    return LongClip(
        name=f"longsim_{seed}",
        seed=seed,
        frames=subset.frames,
        kind=kind,
        is_marked=index % 2 == 0,
        has_retractor=index // 2 % 2 == 0,
        absences=tuple(absences),
        look_alike_stays=tuple(look_alike_stays),
    )


# --- what is seen ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stay:
    """One stay of an instrument in view, seen by a camera that moves on its own.

    Args:
        instrument: in view units of the camera at rest, at times with tape.
        span: while any of it may show.
        camera: what moves the picture.
    """

    instrument: Performer
    span: Span
    camera: Camera

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
        if not self.span[0] <= time_s <= self.span[1]:
            return []
        scale = self.camera.zoom / self.camera.scale(time_s)
        return [
            replace(
                part,
                start=self._see(part.start, time_s),
                end=self._see(part.end, time_s),
                start_radius=scale * part.start_radius,
                end_radius=scale * part.end_radius,
            )
            for part in self.instrument.parts(time_s)
        ]

    def smear(self, time_s: float, shutter_s: float) -> float:
        """See `scenes.Performer`."""
        return self.instrument.smear(time_s, shutter_s)

    def _see(self, point: Point, time_s: float) -> Point:
        zoom = self.camera.zoom
        return self.camera.to_view((zoom * point[0], zoom * point[1]), time_s)


def draw_cast(clip: LongClip, rng: np.random.Generator, config: SceneConfig) -> Cast:
    """The clip's instruments, in order of painting: bystander, look-alike, the instrument itself."""
    aspect = config.width_px / config.height_px
    palette, camera = draw_palette(rng, held_out=True), _draw_camera(rng, clip.duration_s)
    style, radius = _draw_plain_style(rng, clip.kind), rng.uniform(0.075, 0.1)
    tape = _draw_tape(rng, style)
    stays: list[tuple[int, Stay]] = []
    if clip.has_retractor:
        instrument = _draw_instrument(rng, HELD_OUT_KIND, draw_style(rng, HELD_OUT_KIND), 0.07, 0.0, aspect)
        stays.append((RETRACTOR_ID, Stay(instrument, (-NEVER_S, NEVER_S), camera)))
    look_alikes, own = [], []
    side = float(rng.choice([-1.0, 1.0]))
    own.append(_draw_stay(rng, clip.kind, style, radius, side, aspect, clip.stays[0]))
    others = list(clip.look_alike_stays)
    if len(others) > len(clip.absences):
        look_alikes.append(_draw_stay(rng, clip.kind, style, radius, -side, aspect, others.pop(0)))
    for other, stay in zip(others, clip.stays[1:], strict=True):
        # The look-alike may take the very place of the instrument, which returns to the other side.
        side = float(rng.choice([-1.0, 1.0]))
        look_alikes.append(_draw_stay(rng, clip.kind, style, radius, -side, aspect, other))
        own.append(_draw_stay(rng, clip.kind, style, radius, side, aspect, stay))
    stays += [
        (
            LOOK_ALIKE_ID,
            Stay(TapedInstrument(one, tape, RINGS) if clip.is_marked else one, _span(one), camera),
        )
        for one in look_alikes
    ]
    stays += [(OBJECT_ID, Stay(one, _span(one), camera)) for one in own]
    ids, performers = zip(*stays, strict=True)
    return Cast(palette, camera, _draw_optics(rng), performers, (), ids)


def _draw_camera(rng: np.random.Generator, duration_s: float) -> Camera:
    """A camera whose zoom and turn span a set range over the clip."""
    camera = draw_camera(rng, 1.0)
    rates = (1 / duration_s, max(4 / duration_s, 0.06))
    zooming, turn, pan_x, pan_y = (Wander.draw(rng, *rates) for _ in range(4))
    times = np.arange(0, duration_s, 0.25).tolist()
    zooms, turns = [zooming(t) for t in times], [turn(t) for t in times]
    ratio, low, high = rng.uniform(1.6, 2.1), min(zooms), max(zooms)
    return replace(
        camera,
        zoom=rng.uniform(0.65, 0.9),
        # The widest view shows `ratio` times as much as the narrowest.
        zoom_amplitude=(ratio - 1) / (high - ratio * low),
        zooming=zooming,
        turn_amplitude=rng.uniform(0.5, 0.9) / (max(turns) - min(turns)),
        turn=turn,
        pan_amplitude=rng.uniform(0.1, 0.2),
        pan_x=pan_x,
        pan_y=pan_y,
        breath_amplitude=rng.uniform(0.0, 0.02),
    )


def _draw_plain_style(rng: np.random.Generator, kind: str) -> Style:
    """Looks without bands or stains, which could be taken for the tape or tell two look-alikes apart."""
    style = draw_style(rng, kind)
    shaft, wrist, tip = (
        replace(one, band_every=0.0, stain=0.0) for one in (style.shaft, style.wrist, style.tip)
    )
    return replace(style, shaft=shaft, wrist=wrist, tip=tip)


def _draw_tape(rng: np.random.Generator, style: Style) -> Material:
    """Tape of one of the two colours that differ most from the shaft's."""
    ranked = sorted(TAPES, key=lambda colour: -math.dist(colour, style.shaft.colour))
    return Material(ranked[int(rng.integers(2))], gloss=0.2, roundness=0.6, texture=0.05)


def _draw_stay(
    rng: np.random.Generator,
    kind: str,
    style: Style,
    radius: float,
    side: float,
    aspect: float,
    span: Span,
) -> Instrument:
    """An instrument that is wholly outside before and after `span`."""
    instrument = _draw_instrument(rng, kind, style, radius, side, aspect)
    absences = (Absence(-NEVER_S, span[0], TRAVEL_S), Absence(span[1], NEVER_S, TRAVEL_S))
    return replace(instrument, absences=absences)


def _span(instrument: Instrument) -> Span:
    before, after = instrument.absences
    return before.end_s, after.start_s


def _draw_instrument(
    rng: np.random.Generator, kind: str, style: Style, radius: float, side: float, aspect: float
) -> Instrument:
    """An instrument from below on the left (side -1) or right (1), or from above (0)."""
    angle = math.pi / 2 - side * rng.uniform(0.4, 1.5) if side else -math.pi / 2 + rng.uniform(-0.3, 0.3)
    home = (
        (side * rng.uniform(0.2, 0.35) * aspect, rng.uniform(-0.1, 0.25))
        if side
        else (rng.uniform(-0.2, 0.2) * aspect, -0.65)
    )
    instrument = draw_instrument(
        rng, kind, style=style, entry_angle=angle, home=home, aspect=aspect, liveliness=0.5
    )
    return replace(
        instrument,
        entry=(FAR * math.cos(angle), FAR * math.sin(angle)),
        radius=radius,
        reach=rng.uniform(0.08, 0.16),
        poke_amplitude=0.12,
        depth_amplitude=0.12,
    )


def _draw_optics(rng: np.random.Generator) -> Optics:
    """Any tower's look, as long as a person could still tell two instruments apart."""
    optics = draw_optics(rng)
    return replace(
        optics,
        light_strength=min(optics.light_strength, 1.5),
        falloff=min(optics.falloff, 0.8),
        smoke=min(optics.smoke, 0.4),
        blur=min(optics.blur, 0.01),
        noise=min(optics.noise, 0.025),
        saturation=max(optics.saturation, 0.4),
        jpeg_quality=0,  # the files are JPEG
    )


def open_scene(clip: LongClip, *, width_px: int = WIDTH_PX, height_px: int = HEIGHT_PX) -> Scene:
    """The clip, ready to render; object ids are `OBJECT_ID`, `LOOK_ALIKE_ID` and `RETRACTOR_ID`."""
    config = SceneConfig(
        height_px=height_px,
        width_px=width_px,
        frames=clip.frames,
        frame_rate=FRAME_RATE_HZ,
        seed=clip.seed,
        held_out=True,
    )
    return Scene(config, draw_cast=partial(draw_cast, clip))


# --- on disk --------------------------------------------------------------------------------------------


def identify(subset: Subset, seed: int) -> dict[str, object]:
    """What figures on a set belong to: its name, its seed and the code that rendered it."""
    return {"subset": subset.name, "seed": seed, "renderer": identify_renderer(Path(__file__))}


def render_longsim(
    folder: Path, subset: Subset, seed: int, *, workers: int, on_frames: Callable[[int], None]
) -> None:
    """Render what is missing of a set into a folder in DAVIS layout.

    Args:
        folder: is made; may hold an earlier, interrupted run of the same set.
        subset: what to render.
        seed: 0 for the set that figures are quoted on.
        workers: processes.
        on_frames: called with the number of frames just done.

    Raises:
        TrocarError: the folder holds something else.
    """
    identity = identify(subset, seed)
    if _is_complete(folder, identity):
        return
    clips = script_clips(subset, seed)
    facts = {"longsim": identity, "clips": {clip.name: _describe(clip) for clip in clips}}
    folder.mkdir(parents=True, exist_ok=True)
    begun = _begun_path(folder)
    begun.write_text(json.dumps(facts, indent=1))
    for clip in clips:
        for part in ("JPEGImages", "Annotations"):
            (folder / part / clip.name).mkdir(parents=True, exist_ok=True)
    chunks = [
        (clip, range(start, min(start + CHUNK_FRAMES, clip.frames)))
        for clip in clips
        for start in range(0, clip.frames, CHUNK_FRAMES)
    ]
    with ProcessPoolExecutor(workers, initializer=begin_rendering) as pool:
        for done in pool.map(partial(_render_chunk, folder), *zip(*chunks, strict=True)):
            on_frames(done)
    begun.rename(folder / OBJECTS_FILE)


def _begun_path(folder: Path) -> Path:
    return folder / f"{OBJECTS_FILE}.part"


def _is_complete(folder: Path, identity: dict[str, object]) -> bool:
    """Whether the set is there already; False for a folder that may be filled."""
    complete, begun = folder / OBJECTS_FILE, _begun_path(folder)
    for path in (complete, begun):
        if path.exists():
            found = json.loads(path.read_text()).get("longsim")
            if found != identity:
                raise TrocarError(f"{path}: describes {found}, expected {identity}; choose another folder")
            return path == complete
    if folder.exists() and any(folder.iterdir()):
        raise TrocarError(f"{folder}: holds other files; choose a new or empty folder")
    return False


def _describe(clip: LongClip) -> dict[str, object]:
    objects: dict[int, dict[str, object]] = {
        OBJECT_ID: {"class_name": clip.kind, "is_ambiguous": not clip.is_marked},
        LOOK_ALIKE_ID: {"class_name": clip.kind, "is_prompted": False},
    }
    if clip.has_retractor:
        objects[RETRACTOR_ID] = {"class_name": HELD_OUT_KIND, "is_apart": True}
    return {"frame_rate_hz": FRAME_RATE_HZ, "objects": objects}


def _render_chunk(folder: Path, clip: LongClip, frames: Sequence[int]) -> int:
    """Render the frames of a chunk that are not there yet; returns how many the chunk has."""
    missing = [frame for frame in frames if not _mask_path(folder, clip, frame).exists()]
    if missing:
        # One thread: pixels must not depend on the number of cores.
        torch.set_num_threads(1)
        scene = open_scene(clip)
        for frame in missing:
            image, labels = scene.render(frame)
            picture = cv2.cvtColor(image.numpy(), cv2.COLOR_RGB2BGR)
            path = folder / "JPEGImages" / clip.name / f"{frame:05d}.jpg"
            cv2.imwrite(str(path), picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
            # The mask comes last and whole: it tells that the frame is done.
            partial_path = folder / f"{clip.name}_{frame:05d}.png"
            write_paletted_png(partial_path, labels.numpy())
            partial_path.rename(_mask_path(folder, clip, frame))
    return len(frames)


def _mask_path(folder: Path, clip: LongClip, frame: int) -> Path:
    return folder / "Annotations" / clip.name / f"{frame:05d}.png"
