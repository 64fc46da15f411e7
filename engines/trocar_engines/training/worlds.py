"""Moving pictures of nothing in particular, so that a click learns what an object is.

Real scenes resemble neither surgery nor each other; breadth matters more than likeness. Every object is a
picture with an outline, painted once (a *cutout*), then moved, turned, scaled and bent over a moving
background.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trocar_engines.training.clip import Clip
from trocar_engines.training.motion import Camera, Wander, draw_camera, see_ground
from trocar_engines.training.optics import to_pixels
from trocar_engines.training.texture import fractal_noise

MOST_OBJECTS = 4
# Side of a cutout in texels; objects are rarely larger on 256-pixel training pictures.
CUTOUT_PX = 144
# Cutouts span -1..1; outlines stay within this radius, so that bending never reaches the rim.
OUTLINE_RADIUS = 0.82
# Side of the background canvas over the picture's height: room to pan and turn.
BACKGROUND_SPAN = 1.6
# A clip lasts this long on the clock of the cameras borrowed from the surgical scenes.
CAMERA_CLIP_S = 4.0
CAMERA_NODES = 9
# Frame 0 must show an object on this many pixels of a 64-row picture, else the cast is drawn again.
LEAST_SHOWN_PX = 24

Array = np.ndarray


# --- textures -------------------------------------------------------------------------------------------


def _random_colour(rng: np.random.Generator) -> Array:
    """Draw a colour in 0..1: greyish, dull or saturated in equal measure."""
    grey = rng.uniform(0.03, 0.97)
    return np.clip(grey + rng.uniform(0.0, 1.0) ** 2 * rng.uniform(-0.6, 0.6, 3), 0.0, 1.0)


def _cloud(rng: np.random.Generator, size: int) -> Array:
    noise = fractal_noise(
        int(rng.integers(2**31)),
        1,
        size,
        persistence=rng.uniform(0.3, 0.95),
        coarsest=int(rng.choice([2, 4, 8, 16])),
        finest=128,
    )
    return noise[0].numpy()


def _stripes(rng: np.random.Generator, size: int) -> Array:
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    angle, cycles = rng.uniform(0, math.pi), rng.uniform(2, 18)
    wave = math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None]
    if rng.random() < 0.5:
        wave = wave + 0.1 * _cloud(rng, size)
    stripes: Array = np.tanh(rng.uniform(1, 6) * np.sin(math.pi * cycles * wave))
    return stripes


def _checks(rng: np.random.Generator, size: int) -> Array:
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    angle, cycles = rng.uniform(0, math.pi), rng.uniform(2, 10)
    cos, sin = math.cos(angle), math.sin(angle)
    along = cos * axis[None, :] + sin * axis[:, None]
    across = cos * axis[:, None] - sin * axis[None, :]
    squares: Array = np.tanh(8 * np.sin(math.pi * cycles * along) * np.sin(math.pi * cycles * across))
    return squares


def _gradient(rng: np.random.Generator, size: int) -> Array:
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    return math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None]


def _spots(rng: np.random.Generator, size: int) -> Array:
    canvas = np.full((size, size), -1.0, np.float32)
    largest = rng.uniform(0.02, 0.12) * size
    for x, y, share in rng.uniform(0, 1, (int(rng.integers(10, 80)), 3)):
        centre = (round(float(x) * size), round(float(y) * size))
        cv2.circle(canvas, centre, max(1, round(largest * (0.3 + 0.7 * share))), (1.0,), -1)
    return canvas


_PATTERNS: tuple[Callable[[np.random.Generator, int], Array], ...] = (
    _cloud,
    _cloud,
    _stripes,
    _checks,
    _gradient,
    _spots,
)


def _texture(rng: np.random.Generator, size: int, contrast: float) -> Array:
    """Paint float32 [size, size, 3] in 0..1: two or three colours blended by random patterns."""
    first, second = _random_colour(rng), _random_colour(rng)
    pattern = _PATTERNS[rng.integers(len(_PATTERNS))](rng, size)
    weight = np.clip(0.5 + 0.5 * contrast * pattern, 0, 1)[..., None]
    picture = first + (second - first) * weight
    if rng.random() < 0.5:
        picture = picture * (1 + rng.uniform(0.02, 0.25) * _cloud(rng, size)[..., None])
    if rng.random() < 0.4:
        picture = picture * (1 + 0.4 * np.clip(_gradient(rng, size), -1, 1)[..., None])
    clipped: Array = np.clip(picture, 0, 1).astype(np.float32)
    return clipped


# --- outlines -------------------------------------------------------------------------------------------


def _fill(points: Array, size: int) -> Array:
    """Return uint8 [size, size], 255 inside a polygon of points in -1..1."""
    canvas = np.zeros((size, size), np.uint8)
    # Four fractional bits keep outlines smooth.
    cv2.fillPoly(canvas, [((points + 1) * (0.5 * 16 * size)).astype(np.int32)], (255,), cv2.LINE_AA, 4)
    return canvas


def _blob(rng: np.random.Generator, size: int) -> Array:
    """A star-shaped Fourier outline, smooth to spiky."""
    angle = np.linspace(0, 2 * math.pi, 96, endpoint=False)
    radius = np.ones_like(angle)
    for order in range(2, 9):
        radius += rng.normal(0, 0.45) / order * np.cos(order * angle + rng.uniform(0, 2 * math.pi))
    radius = np.clip(radius, 0.15, None)
    points = np.stack([np.cos(angle) * radius, np.sin(angle) * radius * rng.uniform(0.35, 1.0)], 1)
    return _fill(points * OUTLINE_RADIUS / np.abs(points).max(), size)


def _polygon(rng: np.random.Generator, size: int) -> Array:
    """Three to nine straight sides, convex or not."""
    corners = int(rng.integers(3, 10))
    angle = np.sort(rng.uniform(0, 2 * math.pi, corners)) + np.linspace(
        0, 2 * math.pi, corners, endpoint=False
    )
    angle = np.sort(angle % (2 * math.pi))
    radius = rng.uniform(0.4, 1.0, corners)
    points = np.stack([np.cos(angle) * radius, np.sin(angle) * radius * rng.uniform(0.4, 1.0)], 1)
    return _fill(points * OUTLINE_RADIUS / np.abs(points).max(), size)


def _bar(rng: np.random.Generator, size: int) -> Array:
    """A long, thin, tapering rod."""
    thick, thin = rng.uniform(0.06, 0.25), rng.uniform(0.02, 0.2)
    end = OUTLINE_RADIUS
    return _fill(np.array([[-end, -thick], [end, -thin], [end, thin], [-end, thick]]), size)


_OUTLINES: tuple[Callable[[np.random.Generator, int], Array], ...] = (_blob, _blob, _polygon, _bar)


def _chain(rng: np.random.Generator, size: int) -> tuple[Array, Array]:
    """Paint a jointed limb of differently coloured links; returns picture and alpha."""
    picture, alpha = _texture(rng, size, 0.5), np.zeros((size, size), np.uint8)
    position, heading = np.array([-OUTLINE_RADIUS, rng.uniform(-0.3, 0.3)]), rng.uniform(-0.4, 0.4)
    width, links = rng.uniform(0.05, 0.22), int(rng.integers(2, 6))
    for _ in range(links):
        step = 1.6 * OUTLINE_RADIUS / links * np.array([math.cos(heading), math.sin(heading)])
        reached = np.clip(position + step, -OUTLINE_RADIUS, OUTLINE_RADIUS)
        ends = [tuple(int(v) for v in (p + 1) * 0.5 * size * 16) for p in (position, reached)]
        link = np.zeros((size, size), np.uint8)
        cv2.line(link, ends[0], ends[1], (255,), max(2, round(width * size / 2)), cv2.LINE_AA, 4)
        if rng.random() < 0.6:
            picture[link > 0] = 0.3 * picture[link > 0] + 0.7 * _random_colour(rng)
        alpha = np.maximum(alpha, link)
        position, heading, width = reached, heading + rng.normal(0, 0.6), width * rng.uniform(0.6, 1.05)
    return picture, alpha


def _cutout(rng: np.random.Generator, size: int = CUTOUT_PX) -> Tensor:
    """Paint one object: float32 [4, size, size], RGB and alpha in 0..1, RGB valid beyond the outline too."""
    if rng.random() < 0.2:
        picture, alpha = _chain(rng, size)
    else:
        picture = _texture(rng, size, rng.uniform(0.1, 1.0))
        alpha = _OUTLINES[rng.integers(len(_OUTLINES))](rng, size)
        if rng.random() < 0.45:
            picture, alpha = _add_parts(rng, picture, alpha)
    if rng.random() < 0.2:
        hole = _place(_OUTLINES[rng.integers(len(_OUTLINES))](rng, size), rng, rng.uniform(0.15, 0.4))
        alpha = np.minimum(alpha, 255 - hole)
    if rng.random() < 0.4:
        picture = picture * _relief(alpha, rng)
    if rng.random() < 0.25:
        rim = cv2.dilate(alpha, np.ones((3, 3), np.uint8)).astype(np.int16) - cv2.erode(
            alpha, np.ones((5, 5), np.uint8)
        )
        weight = np.clip(rim, 0, 255)[..., None] / 255
        picture = picture + (_random_colour(rng) - picture) * weight
    layers = np.concatenate([picture, alpha[..., None] / 255], -1).astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(layers.transpose(2, 0, 1)))


def _add_parts(rng: np.random.Generator, picture: Array, alpha: Array) -> tuple[Array, Array]:
    """Attach one to three parts of another colour: markings inside the outline, limbs across it."""
    size = alpha.shape[0]
    for _ in range(int(rng.integers(1, 4))):
        part = _place(_OUTLINES[rng.integers(len(_OUTLINES))](rng, size), rng, rng.uniform(0.2, 0.6))
        overlaps = (np.minimum(part, alpha) > 127).sum() > 0.1 * (part > 127).sum()
        if not overlaps:
            continue
        weight = part[..., None] / 255
        picture = picture + (_texture(rng, size, rng.uniform(0, 1)) - picture) * weight
        alpha = np.maximum(alpha, part)
    return picture, alpha


def _place(mask: Array, rng: np.random.Generator, scale: float) -> Array:
    """Shrink a mask, turn it and shift it within its canvas."""
    size = mask.shape[0]
    turn = cv2.getRotationMatrix2D((size / 2, size / 2), rng.uniform(0, 360), scale)
    turn[:, 2] += rng.uniform(-0.28, 0.28, 2) * size
    return cv2.warpAffine(mask, turn, (size, size))


def _relief(alpha: Array, rng: np.random.Generator) -> Array:
    """Return float32 [size, size, 1]: shading that makes a flat shape look round."""
    depth = cv2.GaussianBlur(alpha, (0, 0), rng.uniform(4, 14)).astype(np.float32) / 255
    slope_y, slope_x = np.gradient(depth)
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(4, 14)
    shading = np.asarray(1 + strength * (math.cos(angle) * slope_x + math.sin(angle) * slope_y))
    limited: Array = np.clip(shading, 0.2, 1.8)[..., None]
    return limited


# --- backgrounds ----------------------------------------------------------------------------------------


def _dead_leaves(rng: np.random.Generator, size: int) -> Array:
    """Paint shapes of every size over one another until nothing else shows, [size, size, 3] in 0..1."""
    picture = _texture(rng, size, 0.7)
    tile = _texture(rng, size, 1.0)
    smallest = rng.uniform(0.01, 0.05)
    for _ in range(int(rng.integers(30, 250))):
        # Sizes follow 1/r^3, the law that makes dead leaves scale like natural pictures.
        radius = size * smallest / math.sqrt(max(rng.uniform(0, 1), (smallest / 0.4) ** 2))
        corners = int(rng.choice([3, 4, 5, 24]))
        angle = np.linspace(0, 2 * math.pi, corners, endpoint=False) + rng.uniform(0, 6)
        stretch = radius * np.array([1.0, rng.uniform(0.3, 1.0)])
        turn = rng.uniform(0, math.pi)
        points = np.stack([np.cos(angle), np.sin(angle)], 1) * stretch
        points = points @ np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        points += rng.uniform(0, size, 2)
        cv2.fillPoly(picture, [(points * 16).astype(np.int32)], _random_colour(rng).tolist(), cv2.LINE_AA, 4)
    return np.clip(picture * (0.75 + 0.5 * tile), 0, 1)


def _background(rng: np.random.Generator, size: int) -> Tensor:
    """Paint float32 [3, size, size] in 0..1."""
    is_cluttered = rng.random() < 0.5
    picture = _dead_leaves(rng, size) if is_cluttered else _texture(rng, size, rng.uniform(0.1, 1.0))
    if rng.random() < 0.3:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.5, 4.0))
    return torch.from_numpy(np.ascontiguousarray(picture.astype(np.float32).transpose(2, 0, 1)))


# --- motion ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Mover:
    """A cutout on its way: positions in view units (-1..1 vertically), `time` runs 0..1 over the clip."""

    cutout: Tensor
    start: Array
    velocity: Array
    sway: float
    angle: float
    spin: float
    size: float
    growth: float
    stretch: float
    bend: float
    away: tuple[float, float]
    wanders: tuple[Wander, Wander, Wander, Wander]

    def pose(self, time: float) -> tuple[float, float, float, float, float]:
        """Return centre x and y, angle, half size and bend."""
        sway_x, sway_y, turn, swell = (wander(time) for wander in self.wanders)
        x, y = self.start + self.velocity * (time - 0.5) + self.sway * np.array([sway_x, sway_y])
        begin, end = self.away
        if begin <= time <= end:
            x += 100.0  # far outside every view
        angle = self.angle + self.spin * (time - 0.5) + 0.3 * self.sway * turn
        half_size = self.size * math.exp(self.growth * (time - 0.5)) * (1 + 0.1 * swell)
        return float(x), float(y), angle, half_size, self.bend * turn


def _draw_mover(rng: np.random.Generator, cutout: Tensor, aspect: float, liveliness: float) -> _Mover:
    leaves, begin = rng.random() < 0.25, rng.uniform(0.0, 0.8)
    heading, speed = rng.uniform(0, 2 * math.pi), liveliness * rng.uniform(0.0, 1.6)
    return _Mover(
        cutout=cutout,
        start=rng.uniform(-0.75, 0.75, 2) * np.array([aspect, 1.0]),
        velocity=speed * np.array([math.cos(heading), math.sin(heading)]),
        sway=liveliness * rng.uniform(0.0, 0.5),
        angle=rng.uniform(0, 2 * math.pi),
        spin=liveliness * rng.normal(0, 1.2),
        size=math.exp(rng.uniform(math.log(0.22), math.log(0.95))),
        growth=liveliness * rng.normal(0, 0.4),
        stretch=rng.uniform(0.6, 1.6),
        bend=rng.uniform(0.0, 0.22) if rng.random() < 0.5 else 0.0,
        away=(begin, begin + rng.uniform(0.15, 0.5)) if leaves else (2.0, 2.0),
        wanders=(
            Wander.draw(rng, 0.3, 2.0),
            Wander.draw(rng, 0.3, 2.0),
            Wander.draw(rng, 0.3, 2.0),
            Wander.draw(rng, 0.3, 2.0),
        ),
    )


def _paint_mover(image: Tensor, labels: Tensor, mover: _Mover, time: float, object_id: int) -> None:
    """Paint one cutout over image float32 [3, H, W] and labels uint8 [H, W], in place; id 0 hides labels."""
    height, width = labels.shape
    x, y, angle, half_size, bend = mover.pose(time)
    reach = 1.45 * half_size * max(mover.stretch, 1.0)
    aspect, pixel = width / height, 2 / height
    left, right = max(0, int((x - reach + aspect) / pixel)), min(width, int((x + reach + aspect) / pixel) + 1)
    top, bottom = max(0, int((y - reach + 1) / pixel)), min(height, int((y + reach + 1) / pixel) + 1)
    if left >= right or top >= bottom:
        return
    device = image.device
    from_x = (torch.arange(left, right, device=device) + 0.5) * pixel - aspect - x
    from_y = (torch.arange(top, bottom, device=device) + 0.5) * pixel - 1 - y
    cos, sin = math.cos(angle) / half_size, math.sin(angle) / half_size
    along = (from_x[None, :] * cos + from_y[:, None] * sin) / mover.stretch
    across = from_y[:, None] * cos - from_x[None, :] * sin
    if bend:
        across = across - bend * torch.sin(2.2 * along)
    grid = torch.stack([along, across], -1)[None]
    sampled = F.grid_sample(mover.cutout[None], grid, padding_mode="zeros", align_corners=False)[0]
    alpha = sampled[3]
    window = image[:, top:bottom, left:right]
    window += (sampled[:3] - window) * alpha
    labels[top:bottom, left:right].masked_fill_(alpha > 0.5, object_id)


def _paint_background(picture: Tensor, camera: Camera, time: float, height: int, width: int) -> Tensor:
    """Sample the background under a moving camera; returns float32 [3, H, W]."""
    seen = see_ground(
        camera,
        CAMERA_CLIP_S * time,
        height_px=height,
        width_px=width,
        nodes=CAMERA_NODES,
        device=picture.device,
    )
    grid = seen.permute(0, 2, 3, 1) / BACKGROUND_SPAN
    return F.grid_sample(picture[None], grid, padding_mode="reflection", align_corners=False)[0]


# --- appearance -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Appearance:
    """How strongly light, colour, sharpness and noise change over the clip; `grain` is [3, H+16, W+16]."""

    gain: float
    cast: float
    shade: float
    blur: float
    noise: float
    jpeg_quality: int
    is_grey: bool
    wanders: tuple[Wander, ...]
    grain: Tensor

    def apply(self, image: Tensor, time: float, offset: tuple[int, int]) -> Tensor:
        """Turn float32 [3, H, W] in 0..1 into uint8 [H, W, 3]."""
        gain, red, green, blue, angle, sharpness = (wander(time) for wander in self.wanders)
        height, width = image.shape[1:]
        colours = np.exp(self.gain * gain + self.cast * np.array([red, green, blue]))
        image = image * torch.tensor(colours, dtype=torch.float32, device=image.device)[:, None, None]
        if self.shade:
            x = torch.linspace(-1, 1, width, device=image.device)[None, :] * math.cos(3 * angle)
            y = torch.linspace(-1, 1, height, device=image.device)[:, None] * math.sin(3 * angle)
            image = image * (1 + self.shade * (x + y))
        radius = self.blur * abs(sharpness) * height / 256
        if radius > 1.05:
            small = F.interpolate(
                image[None], size=(round(height / radius), round(width / radius)), mode="area"
            )
            image = F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)[0]
        if self.is_grey:
            image = image.mean(0, keepdim=True).expand(3, -1, -1)
        if self.noise:
            top, left = offset
            image = image + self.noise * self.grain[:, top : top + height, left : left + width]
        return to_pixels(image, self.jpeg_quality)


def _draw_appearance(rng: np.random.Generator, height: int, width: int, device: torch.device) -> _Appearance:
    is_harsh = rng.random() < 0.4
    noise = rng.uniform(0.0, 0.08) if rng.random() < 0.5 else 0.0
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    size = (3, height + 16, width + 16) if noise else (3, 1, 1)
    return _Appearance(
        gain=rng.uniform(0.2, 0.7) if is_harsh else rng.uniform(0.0, 0.2),
        cast=rng.uniform(0.1, 0.4) if is_harsh else rng.uniform(0.0, 0.08),
        shade=rng.uniform(0.0, 0.6) if is_harsh else 0.0,
        blur=rng.uniform(0.0, 6.0) if rng.random() < 0.4 else 0.0,
        noise=noise,
        jpeg_quality=int(rng.integers(15, 90)) if rng.random() < 0.4 else 0,
        is_grey=rng.random() < 0.2,
        wanders=tuple(Wander.draw(rng, 0.3, 2.5) for _ in range(6)),
        grain=torch.randn(size, generator=generator).to(device),
    )


# --- the clip -------------------------------------------------------------------------------------------


def _draw_cast(rng: np.random.Generator, aspect: float, device: torch.device) -> list[tuple[_Mover, int]]:
    """Draw objects in painting order with their ids; id 0 marks distractors, often copies of an object."""
    liveliness = rng.uniform(0.05, 1.3)
    cutouts = [_cutout(rng).to(device) for _ in range(int(rng.integers(1, MOST_OBJECTS + 1)))]
    objects = [(_draw_mover(rng, cutout, aspect, liveliness), i) for i, cutout in enumerate(cutouts, 1)]
    distractors = [
        (
            _draw_mover(
                rng,
                cutouts[rng.integers(len(cutouts))] if rng.random() < 0.4 else _cutout(rng).to(device),
                aspect,
                liveliness * rng.integers(0, 2),
            ),
            0,
        )
        for _ in range(int(rng.integers(0, 4)))
    ]
    cast = objects + distractors
    return [cast[index] for index in rng.permutation(len(cast))]


def _shows_an_object(cast: list[tuple[_Mover, int]], aspect: float, device: torch.device) -> bool:
    labels = torch.zeros((64, round(64 * aspect)), dtype=torch.uint8, device=device)
    image = torch.zeros((3, *labels.shape), device=device)
    for mover, object_id in cast:
        _paint_mover(image, labels, mover, 0.0, object_id)
    return int(labels.count_nonzero()) >= LEAST_SHOWN_PX


@torch.no_grad()
def render_world(
    height_px: int, width_px: int, frames: int, seed: int, device: torch.device | str = "cpu"
) -> Clip:
    """Render a world of one to four labelled objects among unlabelled ones; equal seeds, equal pixels.

    Frame 0 shows at least one object; any may leave, return or be covered. Every class is "".

    Raises:
        ValueError: a size or a count is too small, or the seed is negative.
    """
    if min(height_px, width_px) < 16 or frames < 1 or seed < 0:
        raise ValueError(f"{frames} frames of {height_px}x{width_px}, seed {seed}: too small or negative")
    rng = np.random.default_rng([seed, 2])
    device, aspect = torch.device(device), width_px / height_px
    background = _background(rng, 320 if height_px <= 384 else 640).to(device)
    camera = draw_camera(rng, rng.uniform(0.0, 1.5))
    cast = _draw_cast(rng, aspect, device)
    while not _shows_an_object(cast, aspect, device):
        cast = _draw_cast(rng, aspect, device)
    appearance = _draw_appearance(rng, height_px, width_px, device)
    images = torch.empty((frames, height_px, width_px, 3), dtype=torch.uint8, device=device)
    labels = torch.zeros((frames, height_px, width_px), dtype=torch.uint8, device=device)
    for t in range(frames):
        time = t / max(1, frames - 1)
        image = _paint_background(background, camera, time, height_px, width_px)
        for mover, object_id in cast:
            _paint_mover(image, labels[t], mover, time, object_id)
        top, left = (int(value) for value in rng.integers(0, 16, 2))
        images[t] = appearance.apply(image, time, (top, left))
    objects = sum(object_id > 0 for _, object_id in cast)
    return Clip(images=images, labels=labels, classes=("",) * objects)
