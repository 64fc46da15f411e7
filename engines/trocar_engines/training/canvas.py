"""A frame being painted: parts, tubes and domes, lit by the endoscope, each written into the labels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trocar_engines.training.motion import Point
from trocar_engines.training.texture import Colour, colour_plane, mix, ramp
from trocar_engines.training.tissue import Structure

# Shadows are smooth, so they are computed on a coarse grid and enlarged.
SHADOW_ROWS = 48


@dataclass(frozen=True, slots=True)
class Material:
    """How a part reflects: colour in sRGB 0..1, strength of highlight and texture, coloured bands.

    `roundness` 1 shades a part as a cylinder, 0 as a plate; `band_every` is in multiples of the part's
    radius, 0 for none.
    """

    colour: Colour
    gloss: float
    roundness: float = 1.0
    texture: float = 0.1
    band_every: float = 0.0
    band_colour: Colour = (0.9, 0.9, 0.9)
    stain: float = 0.0


@dataclass(frozen=True, slots=True)
class Segment:
    """A straight, tapering part between two points in view units.

    `serration` is the depth of teeth as a share of the radius. A `slot` cuts a rounded window out of the
    middle of the part, from and to a share of its length, as wide as a share of its radius.
    """

    start: Point
    end: Point
    start_radius: float
    end_radius: float
    material: Material
    is_flat_ended: bool = False
    serration: float = 0.0
    slot: tuple[float, float, float] | None = None
    softness: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Canvas:
    """A frame being painted: `image` and `labels` are changed in place.

    Args:
        image: float32 [3, H, W], light.
        labels: uint8 [H, W], object ids.
        falloff: float32 [H, W], the endoscope's light on every pixel.
        x: float32 [1, W], view coordinates of the columns.
        y: float32 [H, 1], view coordinates of the rows.
        detail: float32 [1, 1, S, S], noise that textures whatever is painted.
        light: where the light stands, in view units.
    """

    image: Tensor
    labels: Tensor
    falloff: Tensor
    x: Tensor
    y: Tensor
    detail: Tensor
    light: Point

    @property
    def pixel(self) -> float:
        """A pixel's side in view units."""
        return 2 / self.labels.shape[0]

    def cast_shadow(self, parts: list[Segment], height: float) -> None:
        """Darken what lies under the parts, away from the light; `height` above it in view units."""
        device, size = self.image.device, self.labels.shape
        aspect = size[1] / size[0]
        rows, columns = SHADOW_ROWS, round(SHADOW_ROWS * aspect)
        x = torch.linspace(-aspect, aspect, columns, device=device)[None, :]
        y = torch.linspace(-1, 1, rows, device=device)[:, None]
        x, y = x + height * (self.light[0] - 0.4), y + height * (self.light[1] - 0.7)
        nearest = torch.full((rows, columns), 1e3, device=device)
        for part in parts:
            along, across, length = _axes(part, x, y)
            share = (along / length).clamp_(0, 1)
            radius = part.start_radius + (part.end_radius - part.start_radius) * share
            distance = torch.hypot(along - length * share, across) - radius
            torch.minimum(nearest, distance, out=nearest)
        shadow = 1 - 0.45 * ramp(-nearest, -1.2 * height, 0.8 * height)
        shadow = F.interpolate(shadow[None, None], size=size, mode="bilinear", align_corners=True)[0]
        self.image.mul_(shadow)

    def paint(self, part: Segment, object_id: int, softness: float = 0.0) -> None:
        """Paint one part over what is there; `softness` widens its edge, in view units."""
        softness = max(softness, part.softness, self.pixel)
        box = self._box(part, softness)
        if box is None:
            return
        rows, columns = box
        along, across, length = _axes(part, self.x[:, columns], self.y[rows])
        distance, radius = _signed_distance(part, along, across, length)
        alpha = (0.5 - distance / softness).clamp_(0, 1)
        colour = self._shade(part, along, across / radius)
        self._blend(rows, columns, alpha, colour, object_id)

    def paint_curve(self, parts: list[Segment], object_id: int) -> None:
        """Paint segments that continue one another as one smooth tube."""
        softness = max(parts[0].softness, self.pixel)
        boxes = [box for part in parts if (box := self._box(part, softness)) is not None]
        if not boxes:
            return
        rows = slice(min(r.start for r, _ in boxes), max(r.stop for r, _ in boxes))
        columns = slice(min(c.start for _, c in boxes), max(c.stop for _, c in boxes))
        nearest, travelled = torch.full_like(self.falloff[rows, columns], 1e3), 0.0
        along, side = torch.zeros_like(nearest), torch.zeros_like(nearest)
        for part in parts:
            part_along, part_across, length = _axes(part, self.x[:, columns], self.y[rows])
            distance, radius = _signed_distance(part, part_along, part_across, length)
            is_nearer = distance < nearest
            nearest = torch.where(is_nearer, distance, nearest)
            along = torch.where(is_nearer, part_along + travelled, along)
            side = torch.where(is_nearer, part_across / radius, side)
            travelled += length
        alpha = (0.5 - nearest / softness).clamp_(0, 1)
        self._blend(rows, columns, alpha, self._shade(parts[len(parts) // 2], along, side), object_id)

    def paint_blob(self, structure: Structure, object_id: int, x: Tensor, y: Tensor, swell: float) -> None:
        """Paint an organ or a gauze; x and y are ground coordinates from its centre, [H, W]."""
        cos, sin = math.cos(structure.angle), math.sin(structure.angle)
        along, across = (x * cos + y * sin) / structure.stretch, y * cos - x * sin
        if structure.kind == "gauze":
            # A square whose corners are rounded: the fourth power mean.
            distance = (along**4 + across**4).sqrt_().sqrt_()
        else:
            distance = torch.hypot(along, across)
        azimuth = torch.atan2(across, along)
        limit = torch.full_like(azimuth, structure.radius * (1 + swell))
        for order, (amplitude, phase) in enumerate(structure.outline, 2):
            limit += structure.radius * amplitude * torch.cos(order * azimuth + phase)
        inside = 1 - distance / limit
        softness = max(structure.softness, 2 * self.pixel)
        alpha = (0.5 + inside * structure.radius / softness).clamp_(0, 1)
        # A dome: its slope towards the light brightens, its rim darkens.
        rise = inside.clamp(0, 1)
        shade = 0.55 + 0.5 * rise.sqrt() - 0.3 * (along * self.light[0] + across * self.light[1])
        noise = self._noise(3 * x, 3 * y)
        if structure.kind == "gauze":
            # The weave of the cloth, about 40 threads a view unit.
            shade = 0.9 + 0.1 * torch.sin(120 * along) * torch.sin(120 * across)
        colour = colour_plane(structure.colour).to(x.device) * (
            shade * (1 + structure.texture * noise) * self.falloff
        )
        off_x, off_y = along - 0.3 * self.light[0], across - 0.3 * self.light[1]
        spot = torch.exp((off_x**2 + off_y**2 + 0.004 * noise) * (-60.0 / max(structure.radius, 0.1)))
        colour = colour + 0.8 * structure.gloss * spot
        self.image.mul_(1 - 0.35 * ramp(inside, -0.25, 0.0) * (1 - alpha))
        self._blend(slice(None), slice(None), alpha, colour, object_id)

    def _blend(self, rows: slice, columns: slice, alpha: Tensor, colour: Tensor, object_id: int) -> None:
        window = self.image[:, rows, columns]
        window += (colour - window) * alpha
        self.labels[rows, columns].masked_fill_(alpha > 0.5, object_id)

    def _box(self, part: Segment, margin: float) -> tuple[slice, slice] | None:
        """Return the rows and columns a part can touch, None if it lies outside the picture."""
        reach = 1.1 * max(part.start_radius, part.end_radius) + margin
        left, right = sorted((part.start[0], part.end[0]))
        top, bottom = sorted((part.start[1], part.end[1]))
        height, width = self.labels.shape
        x0, y0 = -width / height, -1.0
        columns = slice(
            max(0, int((left - reach - x0) / self.pixel)),
            min(width, int((right + reach - x0) / self.pixel) + 1),
        )
        rows = slice(
            max(0, int((top - reach - y0) / self.pixel)),
            min(height, int((bottom + reach - y0) / self.pixel) + 1),
        )
        if columns.start >= columns.stop or rows.start >= rows.stop:
            return None
        return rows, columns

    def _noise(self, x: Tensor, y: Tensor) -> Tensor:
        grid = torch.stack([x, y], -1)[None]
        return F.grid_sample(self.detail, grid, padding_mode="reflection", align_corners=False)[0, 0]

    def _shade(self, part: Segment, along: Tensor, side: Tensor) -> Tensor:
        """Light a part as a cylinder or plate; `side` is -1..1 across it. Returns float32 [3, h, w]."""
        material = part.material
        side = side.clamp(-1, 1)
        bulge = (1 - side * side).sqrt_()
        # Where across the cylinder the highlight sits, from the light's side of the part.
        dx, dy = part.end[0] - part.start[0], part.end[1] - part.start[1]
        to_light = (self.light[1] - part.end[1]) * dx - (self.light[0] - part.end[0]) * dy
        tilt = 0.55 * math.tanh(2 * to_light / max(math.hypot(dx, dy), 1e-4))
        body = 1 - material.roundness * (1 - (0.25 + 0.85 * bulge) * (1 + 0.35 * tilt * side))
        streak = torch.exp((side - tilt) ** 2 * (-1 / 0.035)) + 0.35 * torch.exp(
            (side + 0.6) ** 2 * (-1 / 0.02)
        )
        unit = max(part.start_radius, part.end_radius)
        noise = self._noise(0.15 * along / unit, 0.3 * side)
        tone = body * (1 + material.texture * noise)
        base = colour_plane(material.colour).to(along.device)
        if material.band_every:
            wave = torch.cos(along * (2 * math.pi / (material.band_every * unit)))
            base = mix(
                base, colour_plane(material.band_colour).to(along.device), ramp(wave, 0.75, 0.85)[None]
            )
        if material.stain:
            blood = torch.tensor([0.36, 0.03, 0.03], device=along.device)[:, None, None]
            base = mix(
                base,
                blood,
                (0.85 * ramp(noise, 1.4 - 2.2 * material.stain, 2.0 - 1.6 * material.stain))[None],
            )
        # Wet and worn metal glints in spots, not only along one line.
        glint = (material.gloss * 0.7) * (
            streak * (1 + 0.5 * noise).clamp_(0, 1.5) + 0.8 * ramp(noise, 1.0, 2.8)
        )
        return base * tone + glint


def _axes(part: Segment, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return coordinates along and across a part in view units, and its length."""
    dx, dy = part.end[0] - part.start[0], part.end[1] - part.start[1]
    length = max(math.hypot(dx, dy), 1e-4)
    dx, dy = dx / length, dy / length
    from_x, from_y = x - part.start[0], y - part.start[1]
    return from_x * dx + from_y * dy, from_y * dx - from_x * dy, length


def _signed_distance(part: Segment, along: Tensor, across: Tensor, length: float) -> tuple[Tensor, Tensor]:
    """Return the distance to a part's edge, negative inside, and its radius there, in view units."""
    share = (along / length).clamp(0, 1)
    radius = part.start_radius + (part.end_radius - part.start_radius) * share
    if part.serration:
        teeth = torch.frac(along * (1.6 / part.start_radius)).sub_(0.5).abs_()
        radius = radius * (1 - part.serration * teeth)
    if part.is_flat_ended:
        distance = torch.maximum(across.abs() - radius, (along - 0.5 * length).abs_() - 0.5 * length)
    else:
        distance = torch.hypot(along - length * share, across) - radius
    if part.slot is not None:
        begin, end, width = part.slot
        inner = along - along.clamp(begin * length, end * length)
        hole = torch.hypot(inner, across) - width * part.end_radius
        distance = torch.maximum(distance, -hole)
    return distance, radius
