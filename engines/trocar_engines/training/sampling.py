"""Training samples: a few frames of a clip, some of its objects, and the changes a scope could make.

What is chosen is drawn on the host, by seed and step; pixels are moved, mixed and coloured in batches where
they lie. A `theta` is an affine map [..., 2, 3] from a place in the picture that is made to one in its
source, both -1 to 1, as `torch.nn.functional.affine_grid` takes it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from trocar_engines.masklets import BoolArray
from trocar_engines.training.pool import FEWEST_PIXELS, FIRST_SPRITE_ID, MOST_IDS, SPRITES, ClipPool
from trocar_engines.training.store import NO_CLASS

AWAY_SHARE = 0.25
"""Share of clips in which the camera looks away for some frames: what a presence head learns from."""
LOOK_ALIKE_SHARE = 0.4
"""Share of clips in which a copy of an object moves about on its own: it is another one."""
SCATTERED_SHARE = 0.5
"""Share of clips whose frames are drawn from all over, in order: what lies between them was not seen."""
TURNED_SHARE = 0.35
"""Share of clips that are mirrored or turned from some frame on."""
APPROACH_SHARE = 0.3
"""Share of clips in which the camera comes closer to an object, or draws back from it, all along."""
LEAST_APPROACH, MOST_APPROACH = 0.3, 1.6
"""Logarithm of how many times larger the object becomes; of a scooter that drives up to the camera, 1.6."""
LARGEST_APPROACHED = 0.6
"""Side of a square of its area, over the picture's, to which an object is approached at most."""
SMALLEST_VIEW, LARGEST_VIEW = 0.3, 0.7
"""Sides of views without objects that stand for looking away, over the picture's."""
TRIED_VIEWS = 12
SEARCH_PX = 64
"""Side of the label map on which such views are searched."""
HAZE_PX = 6
"""Side of the noise that haze is made of."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How often each source is drawn; the shares are relative.

    Args:
        synthetic: rendered scenes and worlds.
        real: real clips.
        pasted: moving pictures made of a still, with cut-out objects moving over it.
    """

    synthetic: float = 0.55
    real: float = 0.2
    pasted: float = 0.25


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one training step sees: B clips of T frames, N objects of each.

    Args:
        pixels: uint8 [B, T, S, S, 3].
        masks: bool [B, N, T, S, S].
        classes: int64 [B, N], `NO_CLASS` where unknown.
        is_shown: bool [B, N]; False where a first frame shows nothing, so that nothing can be learnt.
    """

    pixels: Tensor
    masks: Tensor
    classes: Tensor
    is_shown: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of it."""
        return self.pixels, self.masks, self.classes, self.is_shown

    def cloned(self) -> "Sample":
        """The same in memory of its own."""
        pixels, masks, classes, is_shown = (
            tensor.clone(memory_format=torch.contiguous_format) for tensor in self.tensors
        )
        return Sample(pixels=pixels, masks=masks, classes=classes, is_shown=is_shown)


@dataclass(frozen=True, kw_only=True)
class _Sprites:
    """Cut-outs of one place in the order of painting, for those clips of the batch that have one.

    Args:
        owners: [M] clips of the batch.
        clip: [M] of the pool, and `frame`, and `label`: what is cut out.
        object_id: [M] of what is painted, 0 for background.
        theta: [M, T, 2, 3].
        is_there: [M, T].
        mark: [M] 0 none, 1 a band, 2 another colour.
    """

    owners: Ints
    clip: Ints
    frame: Ints
    label: Ints
    object_id: Ints
    theta: Floats
    is_there: BoolArray
    mark: Ints


class ClipSampler:
    """Draws the sample of any step; the same for the same step, seed and pool.

    Args:
        pool: real clips, kept, and rendered ones.
        clips: B.
        frames: T, at most those of the pool's clips.
        objects: N; some are taken twice where a clip shows fewer.
        size_px: S.
        mix: shares of the sources.
        seed: of all draws.
    """

    def __init__(
        self,
        pool: ClipPool,
        *,
        clips: int,
        frames: int,
        objects: int,
        size_px: int,
        mix: Mix,
        seed: int = 0,
    ) -> None:
        self.pool, self.clips, self.frames, self.objects = pool, clips, frames, objects
        self.size_px, self.seed = size_px, seed
        shares = np.array([mix.synthetic, mix.real if pool.kept else 0.0, mix.pasted])
        self.shares = shares / shares.sum()
        self.device = pool.pixels.device

    def draw(self, step: int) -> Sample:
        """The sample of a step."""
        rng = np.random.default_rng([self.seed, step])
        generator = torch.Generator(self.device).manual_seed(int(rng.integers(2**62)))
        source = rng.choice(3, self.clips, p=self.shares)
        is_pasted = source == 2
        clip = np.where(source == 1, self._real(rng), self._any(rng, self.clips, is_fresh=True))
        clip = np.where(is_pasted, self._any(rng, self.clips, is_fresh=False), clip)
        frames = self._draw_frames(rng, clip)
        frames[is_pasted] = frames[is_pasted, :1]
        is_away = self._draw_away(rng) & ~is_pasted[:, None]
        geometry = _draw_geometry(rng, self.clips)[:, None] @ _draw_turns(rng, is_away)
        still_drift = np.where(
            is_pasted[:, None, None, None], _draw_drift(rng, self.clips, self.frames, 0.5), np.eye(3)
        )
        images, labels = self._take(rng, clip, frames, still_drift @ geometry, is_away)
        labels[self._on_device(is_pasted & (rng.random(self.clips) < 0.5))] = 0
        classes = self.pool.classes[clip]
        is_gone = is_away.any(axis=1) | ~self._is_always_shown(clip, frames)
        for place in range(SPRITES):
            sprites = self._draw_sprites(rng, place, clip, frames, is_pasted, is_gone, geometry)
            self._paint(rng, sprites, images, labels)
            sprite_class = self.pool.classes[sprites.clip, sprites.label]
            classes[sprites.owners, sprites.object_id] = np.where(sprites.object_id, sprite_class, NO_CLASS)
        pixels = self._colour(rng, images, generator)
        return self._choose_objects(pixels, labels, self._on_device(classes), generator)

    def _on_device(self, values: npt.NDArray[np.generic]) -> Tensor:
        if values.dtype == np.float64:
            values = values.astype(np.float32)
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        is_cuda = self.device.type == "cuda"
        return tensor.pin_memory().to(self.device, non_blocking=True) if is_cuda else tensor

    def _real(self, rng: np.random.Generator) -> Ints:
        return rng.integers(max(1, self.pool.kept), size=self.clips)

    def _any(self, rng: np.random.Generator, count: int, *, is_fresh: bool) -> Ints:
        """Slots of rendered clips; of real ones as often where `is_fresh` does not say otherwise."""
        fresh = self.pool.kept + rng.integers(self.pool.fresh, size=count)
        if is_fresh or not self.pool.kept:
            return fresh
        return np.where(rng.random(count) < 0.5, rng.integers(self.pool.kept, size=count), fresh)

    def _draw_frames(self, rng: np.random.Generator, clip: Ints) -> Ints:
        """T frames of each clip in order, at times backwards; the first shows an object if any does.

        Some follow each other; others are drawn from the whole clip, as memories hours old.
        """
        length = self.pool.shown.shape[1]
        order = np.argsort(rng.random((self.clips, length)), axis=1)[:, : self.frames]
        scattered = np.sort(order, axis=1)
        start = rng.integers(length - self.frames + 1, size=self.clips)
        following = start[:, None] + np.arange(self.frames)
        frames = np.where((rng.random(self.clips) < SCATTERED_SHARE)[:, None], scattered, following)
        frames = np.where((rng.random(self.clips) < 0.3)[:, None], frames[:, ::-1], frames)
        does_show = np.asarray(self.pool.shown[clip[:, None], frames].any(axis=2))
        for index in np.flatnonzero(~does_show[:, 0] & does_show.any(axis=1)):
            # From its first frame with an object on; the end is seen once more, backwards.
            first = int(does_show[index].argmax())
            frames[index] = np.concatenate([frames[index, first:], frames[index, ::-1]])[: self.frames]
        return frames

    def _is_always_shown(self, clip: Ints, frames: Ints) -> BoolArray:
        """Whether every object of a clip's first frame is on all others too, [B]."""
        shown = self.pool.shown[clip[:, None], frames]
        return np.asarray((shown | ~shown[:, :1]).all(axis=(1, 2)))

    def _draw_away(self, rng: np.random.Generator) -> BoolArray:
        """Frames on which the camera looks elsewhere, [B, T]; never the first."""
        if self.frames == 1:
            return np.zeros((self.clips, 1), dtype=bool)
        begin = rng.integers(1, self.frames, size=self.clips)
        end = rng.integers(begin + 1, self.frames + 1)
        t = np.arange(self.frames)
        is_chosen = rng.random(self.clips) < AWAY_SHARE
        return np.asarray(is_chosen[:, None] & (t >= begin[:, None]) & (t < end[:, None]))

    def _take(
        self, rng: np.random.Generator, clip: Ints, frames: Ints, theta: Floats, is_away: BoolArray
    ) -> tuple[Tensor, Tensor]:
        """The clips as the camera sees them: float32 [B, T, 3, S, S] in 0..255, uint8 [B, T, S, S] labels.

        While it looks away it sees a part of its own picture without objects, else a picture of another clip,
        whose objects are none of ours.
        """
        length = self.pool.shown.shape[1]
        flat = self.pool.pixels.flatten(0, 1)
        index = self._on_device(clip[:, None] * length + frames)
        away, ids = self._on_device(is_away), flat[index, :, :, 3]
        views, has_view = self._find_views(rng, ids)
        other = self._on_device(self._any(rng, self.clips, is_fresh=True) * length)
        index = torch.where(away & ~has_view[:, None], other[:, None], index)
        looked = self._draw_approaches(rng, ids) @ self._on_device(theta)
        looked_away = torch.where(has_view.view(-1, 1, 1, 1), views.unsqueeze(1) @ looked, looked)
        looked = torch.where(away[..., None, None], looked_away, looked)[..., :2, :].flatten(0, 1)
        seen = flat[index].flatten(0, 1).permute(0, 3, 1, 2)
        grid = F.affine_grid(looked, [len(seen), 1, self.size_px, self.size_px], align_corners=False)
        images = F.grid_sample(
            seen[:, :3].float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False
        )
        labels = F.grid_sample(
            seen[:, 3:].float(), grid, mode="nearest", padding_mode="reflection", align_corners=False
        )
        labels = labels.to(torch.uint8).view(self.clips, self.frames, self.size_px, self.size_px)
        return images.unflatten(0, (self.clips, self.frames)), labels * ~away[..., None, None]

    def _draw_approaches(self, rng: np.random.Generator, ids: Tensor) -> Tensor:
        """Growing or shrinking views about an object of the first frame, wherever it is; theta [B, T, 3, 3].

        Args:
            ids: uint8 [B, T, S, S] object id of each pixel.
        """
        chosen = self._on_device(rng.random((self.clips, MOST_IDS)))
        first = torch.zeros_like(chosen).scatter_(1, ids[:, 0].flatten(1).long(), 1.0)
        first[:, 0] = 0
        # An object that is not there has no area, and is approached nowhere.
        is_object = (ids == (chosen * first).argmax(1).view(-1, 1, 1, 1)).float() * first.amax(1).view(
            -1, 1, 1, 1
        )
        area = is_object.mean(dim=(2, 3))
        ticks = (torch.arange(ids.shape[-1], device=self.device) + 0.5) * (2 / ids.shape[-1]) - 1
        across, down = (
            is_object.mean(dim=axis) @ ticks / (len(ticks) * area.clamp(min=1e-6)) for axis in (2, 3)
        )
        strength = rng.uniform(LEAST_APPROACH, MOST_APPROACH, self.clips)
        strength *= rng.random(self.clips) < APPROACH_SHARE
        side = area.amax(1).sqrt().clamp(min=1e-3)
        most = self._on_device(strength).minimum((LARGEST_APPROACHED / side).log().clamp(min=0))
        path = np.linspace(0, 1, self.frames)
        path = np.where((rng.random(self.clips) < 0.5)[:, None], path, path[::-1])
        zoom = (-most.unsqueeze(1) * self._on_device(path)).exp()
        theta = torch.zeros(*zoom.shape, 3, 3, device=self.device)
        theta[..., 0, 0] = theta[..., 1, 1] = zoom
        theta[..., 0, 2], theta[..., 1, 2] = across * (1 - zoom), down * (1 - zoom)
        theta[..., 2, 2] = 1
        return theta

    def _find_views(self, rng: np.random.Generator, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A square of each clip without objects on any frame, theta [B, 3, 3], and whether there is one."""
        side = rng.uniform(SMALLEST_VIEW, LARGEST_VIEW, (self.clips, TRIED_VIEWS))
        centre = rng.uniform(-1, 1, (self.clips, TRIED_VIEWS, 2)) * (1 - side[..., None])
        edges = np.stack([centre - side[..., None], centre + side[..., None]], axis=-1)  # [B, V, xy, 2]
        edges = np.stack([np.floor(edges[..., 0] * 32 + 32), np.ceil(edges[..., 1] * 32 + 32)], axis=-1)
        (left, right), (top, bottom) = self._on_device(edges.clip(0, SEARCH_PX)).long().permute(2, 3, 0, 1)
        is_object = F.adaptive_max_pool2d(labels.amax(1).float().unsqueeze(1), SEARCH_PX)[:, 0] > 0
        total = F.pad(is_object.float().cumsum(1).cumsum(2), (1, 0, 1, 0))
        rows = torch.arange(self.clips, device=self.device).unsqueeze(1)
        inside = total[rows, bottom, right] - total[rows, top, right]
        inside = inside - total[rows, bottom, left] + total[rows, top, left]
        is_empty = inside == 0
        theta = np.zeros((self.clips, TRIED_VIEWS, 3, 3))
        theta[..., 0, 0] = theta[..., 1, 1] = side
        theta[..., :2, 2] = centre
        theta[..., 2, 2] = 1
        return self._on_device(theta)[rows[:, 0], is_empty.int().argmax(1)], is_empty.any(dim=1)

    def _draw_sprites(
        self,
        rng: np.random.Generator,
        place: int,
        clip: Ints,
        frames: Ints,
        is_pasted: BoolArray,
        is_gone: BoolArray,
        geometry: Floats,
    ) -> _Sprites:
        """Cut-outs of this place: of pasted clips objects, in the last place of any clip look-alikes."""
        count = self.clips
        drift = _draw_drift(rng, count, self.frames, 1.0, still_zoom=0.3)
        source, source_frame = self._any(rng, count, is_fresh=False), frames[:, 0].copy()
        if place == SPRITES - 1:
            is_look_alike = rng.random(count) < LOOK_ALIKE_SHARE
            source = np.where(is_look_alike, clip, source)
            aside = rng.uniform(0, 2 * np.pi, count)
            shift = rng.uniform(0.2, 1.0, count)[:, None] * np.stack([np.cos(aside), np.sin(aside)], axis=1)
            drift[:, :, :2, 2] += np.where(is_look_alike[:, None], shift, 0)[:, None]
        else:
            is_look_alike = np.zeros(count, dtype=bool)
        picked = rng.integers(self.pool.shown.shape[1], size=count)
        source_frame = np.where(is_look_alike, source_frame, picked)
        shown = self.pool.shown[source, source_frame]
        label = (shown * rng.random(shown.shape)).argmax(axis=1)
        is_chosen = is_look_alike | (is_pasted & (rng.random(count) < (1.0, 0.6, 0.4)[place]))
        owners = np.flatnonzero(is_chosen & shown.any(axis=1))
        # While the object itself can be followed a copy may be its twin. Where it is away for a while the
        # copy carries a mark or another colour, as else nobody could tell the two apart.
        is_marked = is_look_alike & (is_gone | is_pasted | (rng.random(count) < 0.7))
        is_there = _draw_stay(rng, count, self.frames, is_look_alike)
        flip = np.where(rng.random(count) < 0.5, -1.0, 1.0)
        drift[:, :, 0] *= flip[:, None, None]
        return _Sprites(
            owners=owners,
            clip=source[owners],
            frame=source_frame[owners],
            label=label[owners],
            object_id=np.where(is_look_alike, 0, FIRST_SPRITE_ID + place)[owners],
            theta=(drift @ geometry)[owners, :, :2],
            is_there=is_there[owners],
            mark=np.where(is_marked, rng.integers(1, 3, size=count), 0)[owners],
        )

    def _paint(self, rng: np.random.Generator, sprites: _Sprites, images: Tensor, labels: Tensor) -> None:
        """Paint sprites over images [B, T, 3, S, S] and labels [B, T, S, S], in place."""
        count = len(sprites.owners)
        if not count:
            return
        owners = self._on_device(sprites.owners)
        source = self.pool.pixels[self._on_device(sprites.clip), self._on_device(sprites.frame)]
        alpha = (source[..., 3] == self._on_device(sprites.label)[:, None, None]).float()
        rgb = _mark(
            source[..., :3].permute(0, 3, 1, 2).float(),
            alpha,
            self._on_device(sprites.mark),
            self._on_device(rng.uniform(0, 1, (count, 12))),
        )
        cut_out = torch.cat([rgb, alpha.unsqueeze(1)], dim=1)
        there = self._on_device(sprites.is_there)
        object_id = self._on_device(sprites.object_id).to(torch.uint8)[:, None, None]
        theta = self._on_device(sprites.theta)
        for t in range(self.frames):
            grid = F.affine_grid(theta[:, t], [count, 1, *images.shape[3:]], align_corners=False)
            moved = F.grid_sample(cut_out, grid, padding_mode="zeros", align_corners=False)
            opacity = moved[:, 3:] * there[:, t, None, None, None]
            # Outside the cut-out its own picture goes on, so that edges mix no black.
            below = images[owners, t]
            images[owners, t] = below + (moved[:, :3] - below) * opacity
            labels[owners, t] = torch.where(opacity[:, 0] > 0.5, object_id, labels[owners, t])

    def _colour(self, rng: np.random.Generator, images: Tensor, generator: torch.Generator) -> Tensor:
        """Light, lens, sensor and recorder of each clip, with little change: uint8 [B, T, S, S, 3]."""
        count, frames = images.shape[:2]
        value = images.flatten(0, 1) / 255
        look = _draw_looks(rng, count, frames)
        value = torch.einsum("nij,njhw->nihw", self._on_device(look.matrix), value)
        fog, fog_colour = self._on_device(look.fog), self._on_device(look.fog_colour)
        noise = torch.randn(count, 1, HAZE_PX, HAZE_PX, device=self.device, generator=generator)
        haze = F.interpolate(noise, size=images.shape[3:], mode="bicubic").sigmoid()
        haze = haze.repeat_interleave(frames, dim=0) * fog.view(-1, 1, 1, 1)
        value = value + (fog_colour.view(-1, 3, 1, 1) - value) * haze
        ticks = torch.linspace(-1, 1, images.shape[-1], device=self.device)
        radius = ticks.square().unsqueeze(0) + ticks.square().unsqueeze(1)
        value = value * (1 - self._on_device(look.vignette).view(-1, 1, 1, 1) * radius / 2)
        value = value.clamp(0, 1) ** self._on_device(look.gamma).view(-1, 1, 1, 1)
        soft = F.avg_pool2d(value, 5, stride=1, padding=2, count_include_pad=False)
        value = value.lerp(soft, self._on_device(look.blur).view(-1, 1, 1, 1))
        grain = torch.randn(value.shape, device=self.device, generator=generator)
        value = value + grain * self._on_device(look.noise).view(-1, 1, 1, 1)
        pixels = (value.clamp(0, 1) * 255).round().to(torch.uint8).unflatten(0, (count, frames))
        if frames > 1:
            # Interlaced: every second row was taken one frame before.
            mixed = self._on_device(look.is_interlaced)
            before = pixels[mixed, :-1, :, 1::2]
            pixels[mixed, 1:, :, 1::2] = before
        channels_last: Tensor = pixels.permute(0, 1, 3, 4, 2)
        return channels_last.contiguous()

    def _choose_objects(
        self, pixels: Tensor, labels: Tensor, classes: Tensor, generator: torch.Generator
    ) -> Sample:
        fewest = FEWEST_PIXELS * labels.shape[-1] ** 2 / 256**2
        first = labels[:, 0].flatten(1).long()
        counts = torch.zeros(len(first), MOST_IDS, device=self.device)
        counts.scatter_add_(1, first, torch.ones_like(first, dtype=torch.float32))
        is_there = counts[:, 1:] >= fewest
        drawn = torch.rand(is_there.shape, device=self.device, generator=generator) + is_there.float()
        best = drawn.topk(self.objects, dim=1)
        # Where too few show, the first is taken again.
        ids = torch.where(best.values >= 1, best.indices, best.indices[:, :1]) + 1
        masks = labels.unsqueeze(1) == ids.to(torch.uint8)[:, :, None, None, None]
        is_shown = is_there.any(dim=1, keepdim=True).expand(-1, self.objects)
        return Sample(pixels=pixels, masks=masks, classes=classes.gather(1, ids), is_shown=is_shown)


def _draw_geometry(rng: np.random.Generator, count: int) -> Floats:
    """One crop, aspect and orientation for each clip, [B, 3, 3]."""
    extent = np.where((rng.random(count) < 0.65)[:, None], rng.uniform(0.5, 1.0, (count, 2)), 1.0)
    geometry = np.zeros((count, 3, 3))
    geometry[:, 0, 0], geometry[:, 1, 1], geometry[:, 2, 2] = extent[:, 0], extent[:, 1], 1
    geometry[:, :2, 2] = rng.uniform(-1, 1, (count, 2)) * (1 - extent)
    geometry[:, 0] *= np.where(rng.random(count) < 0.5, -1, 1)[:, None]
    geometry[:, 1] *= np.where(rng.random(count) < 0.3, -1, 1)[:, None]
    is_turned = (rng.random(count) < 0.2)[:, None, None]
    return np.where(is_turned, geometry[:, [1, 0, 2]], geometry)


def _draw_turns(rng: np.random.Generator, is_away: BoolArray) -> Floats:
    """From some frame on, of those clips that are chosen, everything is mirrored or turned, [B, T, 3, 3].

    What comes back often comes from another side; keys that have only seen it as it was take it for
    background (measured: an instrument that returned mirrored was read as -18 logits, mirrored back as 3).

    Args:
        is_away: [B, T] frames on which the camera looks elsewhere; the turn comes behind them.
    """
    count, frames = is_away.shape
    t = np.arange(frames)
    begin = rng.integers(1, frames + 1, size=count)
    begin = np.where(is_away.any(axis=1), is_away.argmax(axis=1), begin)
    is_chosen = np.asarray(rng.random(count) < TURNED_SHARE)
    is_turned = is_chosen[:, None] & (t >= begin[:, None])
    mirrored = np.eye(3) * np.where(rng.random((count, 1, 3)) < 0.5, -1, 1)
    mirrored[:, 2, 2] = 1
    is_square = np.asarray(rng.random(count) < 0.3)
    mirrored = np.where(is_square[:, None, None], mirrored[:, [1, 0, 2]], mirrored)
    angle, squeeze = rng.uniform(-0.5, 0.5, count), np.exp(rng.uniform(-0.5, 0.5, count))
    # So much closer, that no turned picture shows what lies outside it.
    zoom = rng.uniform(0.55, 1.0, count) / (np.abs(np.cos(angle)) + np.abs(np.sin(angle)) * np.exp(0.5))
    turn = np.zeros((count, 3, 3))
    turn[:, 0, 0] = turn[:, 1, 1] = zoom * np.cos(angle)
    turn[:, 0, 1], turn[:, 1, 0] = -zoom * np.sin(angle) * squeeze, zoom * np.sin(angle) / squeeze
    turn[:, 2, 2] = 1
    is_bent = np.asarray(rng.random(count) < 0.5)
    turned = np.where(is_bent[:, None, None], turn @ mirrored, mirrored)
    return np.where(is_turned[..., None, None], turned[:, None], np.eye(3))


def _draw_drift(
    rng: np.random.Generator, count: int, frames: int, strength: float, *, still_zoom: float = 0.15
) -> Floats:
    """Smooth paths of rotation, zoom and shift, [B, T, 3, 3]."""
    start = rng.normal(0, [0.26, still_zoom, 0.24, 0.24], (count, 1, 4))
    speed = rng.normal(0, [0.14, 0.08, 0.12, 0.12], (count, 1, 4)) * rng.choice(
        [0.2, 0.6, 1.2], (count, 1, 1)
    )
    shake = rng.normal(0, [0.026, 0.02, 0.02, 0.02], (count, frames, 4))
    path = strength * (start + np.arange(frames)[None, :, None] * speed + shake)
    # Beyond, a still under it would be seen mirrored over and over.
    angle, zoom, x, y = np.moveaxis(np.clip(path, [-3, -1, -2, -2], [3, 1, 2, 2]), 2, 0)
    cos, sin = np.exp(zoom) * np.cos(angle), np.exp(zoom) * np.sin(angle)
    zero, one = np.zeros_like(cos), np.ones_like(cos)
    rows = [[cos, -sin, x], [sin, cos, y], [zero, zero, one]]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _draw_stay(rng: np.random.Generator, count: int, frames: int, is_late: BoolArray) -> BoolArray:
    """When a sprite is in the picture, [B, T]: most always, some leave, and return; late ones come later."""
    t = np.arange(frames)
    begin = rng.integers(1, max(2, frames), size=count)
    end = rng.integers(begin + 1, frames + 2)
    leaves = rng.random(count) < 0.4
    is_out = leaves[:, None] & (t >= begin[:, None]) & (t < end[:, None])
    comes_at = np.where(is_late & (rng.random(count) < 0.6), rng.integers(1, frames + 1, size=count), 0)
    return np.asarray(~is_out & (t >= comes_at[:, None]))


def _mark(rgb: Tensor, alpha: Tensor, kind: Tensor, drawn: Tensor) -> Tensor:
    """Give cut-outs a coloured band (1) or another colour (2); 0 leaves them as they are.

    Args:
        rgb: [M, 3, S, S] in 0..255.
        alpha: [M, S, S], 1 on the cut-out.
        kind: [M].
        drawn: [M, 12] in 0..1.
    """
    size = rgb.shape[-1]
    ticks = torch.arange(size, device=rgb.device).float()
    angle = (drawn[:, 0] * np.pi).view(-1, 1, 1)
    along = ticks.view(1, 1, -1) * angle.cos() + ticks.view(1, -1, 1) * angle.sin()
    low = torch.where(alpha > 0, along, torch.inf).amin((1, 2))
    high = torch.where(alpha > 0, along, -torch.inf).amax((1, 2))
    width = (0.1 + 0.2 * drawn[:, 1]) * (high - low + 1)
    begin = (low + drawn[:, 2] * (high - low - width)).view(-1, 1, 1)
    is_band = (along >= begin) & (along <= begin + width.view(-1, 1, 1))
    band = (0.75 * ((kind == 1).view(-1, 1, 1) & is_band)).unsqueeze(1)
    banded = rgb + (255 * drawn[:, 3:6, None, None] - rgb) * band
    recoloured = rgb * (0.5 + drawn[:, 6:9, None, None]) + 60 * drawn[:, 9:12, None, None] - 30
    chosen: Tensor = torch.where((kind == 2).view(-1, 1, 1, 1), recoloured, banded)
    return chosen.clamp(0, 255)


@dataclass(frozen=True, kw_only=True)
class _Looks:
    """What a scope, a light source and a recorder do to each of B·T frames; pixels are in 0..1.

    Args:
        matrix: [B·T, 3, 3] from RGB to RGB.
        gamma: [B·T] exponent.
        blur: [B·T] share of the mean over 5x5 pixels.
        noise: [B·T] standard deviation.
        fog: [B·T] its greatest opacity, and `fog_colour`, [B·T, 3].
        vignette: [B·T] share of the light that is lost in the corners.
        is_interlaced: [M] clips of the batch.
    """

    matrix: Floats
    gamma: Floats
    blur: Floats
    noise: Floats
    fog: Floats
    fog_colour: Floats
    vignette: Floats
    is_interlaced: Ints


def _draw_looks(rng: np.random.Generator, count: int, frames: int) -> _Looks:
    """One look a clip with a little change from frame to frame, at times a new one at a single frame."""
    # Two looks a clip; a frame has the second from some frame on, mostly never.
    changes_at = np.where(rng.random(count) < 0.3, rng.integers(1, frames + 1, size=count), frames)
    is_second = np.arange(frames) >= changes_at[:, None]

    def by_frame(drawn: Floats) -> Floats:
        """[2, B, …] to [B·T, …]."""
        chosen = np.where(
            is_second.reshape(count, frames, *[1] * (drawn.ndim - 2)), drawn[1][:, None], drawn[0][:, None]
        )
        return np.asarray(chosen.reshape(count * frames, *drawn.shape[2:]))

    twice = (2, count)
    saturation = np.where(rng.random(twice) < 0.15, 0.0, rng.uniform(0.5, 1.4, twice))[..., None, None]
    mixing = 1 / 3 + saturation * (np.eye(3) - 1 / 3)
    gain = rng.normal(1, 0.12, (*twice, 3)) * rng.uniform(0.6, 1.35, (*twice, 1))
    matrix = gain[..., None] * mixing
    is_swapped = rng.random(twice) < 0.1
    swapped = np.take_along_axis(matrix, np.argsort(rng.random((*twice, 1, 3)), axis=-1), axis=-1)
    matrix = np.where(is_swapped[..., None, None], swapped, matrix)
    flicker = rng.normal(1, 0.03, (count * frames, 1, 1))
    return _Looks(
        matrix=by_frame(matrix) * flicker,
        gamma=by_frame(np.exp(rng.normal(0, 0.25, twice))),
        blur=by_frame(np.where(rng.random(twice) < 0.25, rng.uniform(0.2, 1.0, twice), 0.0)),
        noise=by_frame(np.where(rng.random(twice) < 0.3, rng.uniform(0.01, 0.05, twice), 0.0)),
        fog=by_frame(np.where(rng.random(twice) < 0.12, rng.uniform(0.1, 0.7, twice), 0.0)),
        fog_colour=by_frame(rng.uniform(0.3, 0.95, (*twice, 1)) * rng.normal(1, 0.05, (*twice, 3))),
        vignette=by_frame(np.where(rng.random(twice) < 0.2, rng.uniform(0.2, 1.0, twice), 0.0)),
        is_interlaced=np.flatnonzero(rng.random(count) < 0.03),
    )
