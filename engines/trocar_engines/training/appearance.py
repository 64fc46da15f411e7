"""Views along rendered instruments' shafts: what the appearance head learns to tell objects apart from.

One ground shows a few instruments again and again: in other places, poses and light, with and without blood.
Some differ in nothing but tape round the shaft. Views of two casts that show the same looks are views of one
object, since nothing could tell them apart.
"""

import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from trocar_engines.network import appearance, window
from trocar_engines.network.appearance import EVEN, LEAST_AREA, SHAFT, SHARPNESS, shaft_of_object
from trocar_engines.network.sam2s import IMAGE_MEAN, IMAGE_STD
from trocar_engines.network.window import find_pose
from trocar_engines.training.canvas import Material
from trocar_engines.training.instruments import (
    INSTRUMENT_KINDS,
    Style,
    draw_instrument,
    draw_style,
)
from trocar_engines.training.motion import draw_camera
from trocar_engines.training.optics import Optics, draw_optics
from trocar_engines.training.pool import FEWEST_PIXELS
from trocar_engines.training.returns import TapedInstrument, draw_rings, draw_tape
from trocar_engines.training.scenes import Cast, Performer, Scene, SceneConfig
from trocar_engines.training.store import NO_CLASS, StoredClip, begin_rendering, identify_renderer
from trocar_engines.training.tissue import Structure, draw_palette, draw_structure

FAMILIES = 3
"""Looks of a ground; each comes plain and with tape."""
CASTS = 10
MOMENTS = 2
"""Pictures of each cast."""
VIEWS_A_GROUND = 48
"""Of a sample."""
LONGEST_S = 260.0
FIRST_SEED = 4_000_000
"""Grounds that no clip of a training or a benchmark shows."""
SURE = 10.0
"""Logit of a mask that knows."""
LARGEST_CUT = 12 / 256
"""What is thinner may be cut off a mask, in sides of the picture."""
CLIP_SHARE = 0.4
"""Of samples that come from clips where there are any."""
CLIP_FRAMES = 8
NOTHING = -1
"""Instead of an object's number: tissue or several objects at once, like nothing else."""
TWIN = -2
"""Instead of the number of an object that is left out."""


class Views(NamedTuple):
    """Objects as the appearance head sees them.

    Args:
        seen: [N, 5, along, across] from `shaft_of_object`.
        objects: int64 [N] number within its ground, or `NOTHING`.
        grounds: int64 [N].
    """

    seen: Tensor
    objects: Tensor
    grounds: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class _Looks:
    """What makes an object itself: kind, style, size and tape."""

    kind: str
    style: Style
    radius: float
    tape: Material | None
    rings: tuple[tuple[float, float], ...]


def _draw_families(rng: np.random.Generator) -> list[_Looks]:
    pool: list[_Looks] = []
    kind = ""
    for _ in range(FAMILIES):
        if not kind or rng.random() < 0.6:
            kind = str(rng.choice(INSTRUMENT_KINDS))
        style = _stained(draw_style(rng, kind), 0.0)
        radius = math.exp(rng.uniform(math.log(0.05), math.log(0.15)))
        pool.append(_Looks(kind=kind, style=style, radius=radius, tape=None, rings=()))
        for _ in range(int(rng.choice([0, 1, 2], p=[0.1, 0.6, 0.3]))):
            pool.append(replace(pool[-1], tape=draw_tape(rng, style), rings=draw_rings(rng)))
    return pool


def _stained(style: Style, stain: float) -> Style:
    parts = {name: replace(getattr(style, name), stain=stain) for name in ("shaft", "wrist", "tip")}
    return replace(style, **parts)


def _draw_cast(
    rng: np.random.Generator, pool: list[_Looks], structures: tuple[Structure, ...], tower: Cast
) -> tuple[Cast, list[int]]:
    """Some of the pool's instruments at new places, at times among the structures; and their numbers."""
    numbers = rng.permutation(len(pool))[: rng.integers(2, 5)].tolist()
    stain = rng.uniform(0.1, 0.9) if rng.random() < 0.3 else 0.0
    turn = rng.uniform(0, 2 * math.pi)
    players: list[Performer] = []
    for place, number in enumerate(numbers):
        looks = pool[number]
        player = draw_instrument(
            rng,
            looks.kind,
            style=_stained(looks.style, stain * rng.uniform(0, 1)),
            entry_angle=turn + 2 * math.pi * (place + rng.uniform(0, 0.8)) / len(numbers),
            home=(rng.uniform(-0.6, 0.6), rng.uniform(-0.6, 0.6)),
            aspect=1.0,
            liveliness=rng.uniform(0.2, 1.6),
        )
        player = replace(player, radius=looks.radius * rng.uniform(0.8, 1.25))
        players.append(player if looks.tape is None else TapedInstrument(player, looks.tape, looks.rings))
    shown = structures if rng.random() < 0.25 else ()
    numbers += range(len(pool), len(pool) + len(shown))
    camera, optics = draw_camera(rng, rng.uniform(0.0, 1.3)), _vary(rng, tower.optics)
    return Cast(tower.palette, camera, optics, tuple(players), shown), numbers


def _vary(rng: np.random.Generator, optics: Optics) -> Optics:
    """The same tower at another time of the operation."""
    other = draw_optics(rng)
    red, green, blue = (float(of_colour * (1 + rng.normal(0, 0.03))) for of_colour in optics.cast)
    return replace(
        optics,
        light=other.light,
        light_sway=other.light_sway,
        exposure=other.exposure,
        cast=(red, green, blue),
        smoke=other.smoke * float(rng.uniform(0, 0.8)),
        smoke_time=other.smoke_time,
        blur=other.blur,
        shutter_s=other.shutter_s,
    )


def draw_views(size_px: int, seed: int) -> Views:
    """The views of one ground; equal arguments give equal views.

    Args:
        size_px: side of the pictures.
        seed: of the ground and of all that is shown on it.
    """
    config = SceneConfig(height_px=size_px, width_px=size_px, frames=1, frame_rate=1.0, seed=seed)
    rng = np.random.default_rng([seed, 2])
    palette = draw_palette(rng, held_out=False)
    pool = _draw_families(rng)
    structures = tuple(draw_structure(rng, palette, 1.0) for _ in range(int(rng.integers(1, 3))))
    tower = Cast(palette, draw_camera(rng, 1.0), draw_optics(rng), (), structures)
    scene = Scene(config, draw_cast=lambda _rng, _config: tower)
    found: list[Views] = []
    for _ in range(CASTS):
        cast, numbers = _draw_cast(rng, pool, structures, tower)
        scene.restage(cast)
        for _ in range(MOMENTS):
            image, labels = scene.render(int(rng.uniform(0, LONGEST_S)))
            found.append(_see(rng, image, labels, numbers, seed))
    return collate_views(found)


def clip_views(rng: np.random.Generator, clip: StoredClip, ground: int) -> Views:
    """Views of a few frames of a clip, as those of a ground: other things than instruments, and real ones.

    Of objects of one class only the first, since others may be its twins.
    """
    classes = clip.classes
    is_first = [known == NO_CLASS or known not in classes[:index] for index, known in enumerate(classes)]
    numbers = [index if is_one else TWIN for index, is_one in enumerate(is_first)]
    frames = rng.permutation(len(clip.pixels))[:CLIP_FRAMES].tolist()
    pictures = [torch.from_numpy(np.array(clip.pixels[frame])) for frame in frames]
    views = [_see(rng, picture[..., :3], picture[..., 3], numbers, ground) for picture in pictures]
    every = collate_views(views)
    return Views(*(values[every.objects != TWIN] for values in every))


def _see(rng: np.random.Generator, image: Tensor, labels: Tensor, numbers: list[int], ground: int) -> Views:
    """What a tracker would see of each object of a picture.

    Args:
        rng: roughens the masks.
        image: uint8 [S, S, 3] RGB.
        labels: uint8 [S, S].
        numbers: of the objects with labels 1, 2, ….
        ground: number of what they belong to.
    """
    if not numbers:
        return Views(torch.zeros(0, 5, SHAFT.along, SHAFT.across), *torch.zeros(2, 0, dtype=torch.int64))
    masks = torch.stack([(labels == label).float() for label in range(1, len(numbers) + 1)])
    masks, objects = _add_nothing(rng, masks, torch.tensor(numbers))
    logits = _roughen(rng, _cut_short(rng, masks))
    # A tracker asks only of what it has found.
    is_found = (masks.flatten(1).sum(1) >= FEWEST_PIXELS) & ((logits > 0).flatten(1).sum(1) >= LEAST_AREA)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    picture = (image.float().permute(2, 0, 1)[None] - mean) / std
    seen = shaft_of_object(logits, picture.expand(len(objects), -1, -1, -1))
    return Views(seen[is_found], objects[is_found], torch.full_like(objects[is_found], ground))


def _add_nothing(rng: np.random.Generator, masks: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """One mask more that shows no object: one of them at another place, or two in one."""
    first, second = rng.integers(len(masks), size=2).tolist()
    if not masks[first].any():
        return masks, numbers
    if rng.random() < 0.3 and first != second:
        more = torch.maximum(masks[first], masks[second])
        # Where one is a sliver beside the other, that other it is.
        least = 0.3 * float(torch.maximum(masks[first].sum(), masks[second].sum()))
        if min(float(masks[first].sum()), float(masks[second].sum())) < least:
            return masks, numbers
    else:
        side = masks.shape[-1]
        shift = rng.integers(side // 6, side - side // 6, 2).tolist()
        more = masks[first].rot90(int(rng.integers(4))).roll(shift, dims=(0, 1))
        if float((more * masks.amax(0)).sum()) > 0.2 * float(more.sum()):
            return masks, numbers
    return torch.cat([masks, more[None]]), torch.cat([numbers, torch.tensor([NOTHING])])


def _cut_short(rng: np.random.Generator, masks: Tensor) -> Tensor:
    """At times only the tip's side of the masks: a tracker's mask may end at a ring of tape."""
    if rng.random() > 0.3:
        return masks
    side = masks.shape[-1]
    pose = find_pose(torch.nn.functional.adaptive_avg_pool2d(masks, side // 4) - 0.5)
    ticks = (torch.arange(side).float() + 0.5) / 4
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    tip_x, tip_y, ahead_x, ahead_y, width, _ = (of_each.view(-1, 1, 1) for of_each in pose)
    behind = (tip_x - x) * ahead_x + (tip_y - y) * ahead_y
    return masks * (behind < rng.uniform(2.5, 8.0) * width)


def _roughen(rng: np.random.Generator, masks: Tensor) -> Tensor:
    """Logits at stride 4 of true masks [B, S, S]: some as they are, most as a tracker has them."""
    if rng.random() < 0.6:
        # Thin jaws, hooks and points are what a tracker's mask lacks.
        side = 2 * int(rng.integers(1, max(1, int(LARGEST_CUT * masks.shape[-1]) // 2) + 1)) + 1
        kept = torch.nn.functional.max_pool2d(1 - masks.unsqueeze(1), side, stride=1, padding=side // 2)
        kept = torch.nn.functional.max_pool2d(1 - kept, side, stride=1, padding=side // 2)
        masks = torch.minimum(masks, kept.squeeze(1))
    share = torch.nn.functional.adaptive_avg_pool2d(masks.unsqueeze(1), masks.shape[-1] // 4)
    if rng.random() < 0.6:
        offsets = torch.arange(-4, 5).float()
        kernel = torch.exp(-offsets.square() / (2 * rng.uniform(0.6, 1.6) ** 2))
        kernel = torch.outer(kernel, kernel)
        share = torch.nn.functional.conv2d(share, (kernel / kernel.sum()).view(1, 1, 9, 9), padding=4)
        waves = torch.nn.functional.interpolate(
            _normal(rng, len(masks), 1, 10, 10), share.shape[2:], mode="bilinear", align_corners=False
        )
        # Where the mask is unsure, its outline wanders; and all of it is a little too large or too small.
        share = share + rng.uniform(0.0, 1.0) * waves * share * (1 - share) + rng.normal(0, 0.08)
    return (SURE * rng.uniform(0.15, 1.0) * (2 * share - 1)).squeeze(1)


def render_views(folder: Path, size_px: int, index: int) -> Path:
    """Render the views of one ground into `folder` unless they are there; returns their path."""
    path = folder / f"views-{_identify()}-{size_px}-{index:06d}.npz"
    if not path.exists():
        torch.set_num_threads(1)
        seen, objects, grounds = draw_views(size_px, FIRST_SEED + index)
        arrays = {"seen": seen.half(), "objects": objects, "grounds": grounds}
        # A run that is stopped leaves no half file behind.
        partial_path = path.with_suffix(".part")
        with partial_path.open("wb") as file:
            np.savez(file, allow_pickle=False, **{name: values.numpy() for name, values in arrays.items()})
        partial_path.rename(path)
    return path


def fill_store(
    folder: Path, *, size_px: int, grounds: int, workers: int, on_ground: Callable[[], None]
) -> None:
    """Render what is missing of the first `grounds` grounds; `on_ground` is called after each."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers, initializer=begin_rendering) as pool:
        for _ in pool.map(partial(render_views, folder, size_px), range(grounds), chunksize=4):
            on_ground()


@cache
def _identify() -> str:
    """Hash of the code that renders and looks: views through another window would teach another head."""
    files = (appearance.__file__, window.__file__, __file__)
    return identify_renderer(*(Path(str(file)) for file in files))


def open_views(folder: Path, size_px: int) -> list[Views]:
    """The rendered views of that size in `folder`, by ground, pictures in half precision."""
    grounds = []
    for path in sorted(folder.glob(f"views-{_identify()}-{size_px}-*.npz")):
        with np.load(path) as stored:
            grounds.append(Views(*(torch.from_numpy(stored[name]) for name in Views._fields)))
    return grounds


@dataclass(frozen=True, kw_only=True)
class ViewSamples(Dataset[Views]):
    """Endless sets of views of one ground or clip, each changed a little; the index is the seed.

    Args:
        grounds: to draw from.
        clips: likewise.
        count: how many samples there are.
        seed: of all.
    """

    grounds: list[Views]
    clips: list[StoredClip]
    count: int
    seed: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Views:
        rng = np.random.default_rng([self.seed, index])
        if self.clips and rng.random() < CLIP_SHARE:
            ground = clip_views(rng, self.clips[int(rng.integers(len(self.clips)))], index)
        else:
            ground = self.grounds[int(rng.integers(len(self.grounds)))]
        chosen = torch.from_numpy(rng.permutation(len(ground.objects))[:VIEWS_A_GROUND])
        seen = _change(rng, ground.seen[chosen].float())
        return Views(seen, ground.objects[chosen], torch.full_like(ground.objects[chosen], index))


def collate_views(samples: list[Views]) -> Views:
    """Several grounds as one batch."""
    return Views(*(torch.cat(values) for values in zip(*samples, strict=True)))


def _change(rng: np.random.Generator, seen: Tensor) -> Tensor:
    """Mirror views, move them a little, change their light and add noise, each at times."""
    count = len(seen)
    if not count:
        return seen
    seen = torch.where(_is_chosen(rng, count, 0.5), seen.flip(3), seen)
    change = torch.eye(2, 3).expand(count, -1, -1).clone()
    change += _normal(rng, count, 2, 3) * torch.tensor([[0.1, 0.1, 0.1], [0.02, 0.06, 0.04]])
    grid = torch.nn.functional.affine_grid(change, list(seen.shape), align_corners=False)
    moved = torch.nn.functional.grid_sample(seen, grid, padding_mode="border", align_corners=False)
    seen = torch.where(_is_chosen(rng, count, 0.5), moved, seen)
    is_inside, picture = seen[:, 1:2], seen[:, 2:]
    # The white balance is the recording's, how bright it is the moment's.
    picture = picture * (1 + 0.15 * _normal(rng, 1, 3, 1, 1)) + 0.2 * _normal(rng, 1, 3, 1, 1)
    picture = picture * (1 + 0.1 * _normal(rng, count, 1, 1, 1)) + 0.1 * _normal(rng, count, 1, 1, 1)
    noisy = picture + 0.15 * _normal(rng, *picture.shape)
    picture = torch.where(_is_chosen(rng, count, 0.2), noisy, picture)
    return torch.cat([seen[:, :2], picture * is_inside], dim=1)


def _normal(rng: np.random.Generator, *shape: int) -> Tensor:
    """Standard normal float32 [*shape]."""
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def _is_chosen(rng: np.random.Generator, count: int, share: float) -> Tensor:
    return torch.from_numpy(rng.random((count, 1, 1, 1)) < share)


def appearance_loss(descriptors: Tensor, views: Views) -> Tensor:
    """Pairwise sigmoid loss: which views show one object. Pairs of one ground count more than those of two.

    Every kind of pair has a fixed share however many there are: same object a half, other objects of the
    ground, be they alike but for tape, most of the rest.

    Args:
        descriptors: [N, D] of the views.
        views: of several grounds.
    """
    log_odds = SHARPNESS * (descriptors @ descriptors.T - EVEN)
    is_one_ground = views.grounds[:, None] == views.grounds
    is_thing = (views.objects[:, None] != NOTHING) | (views.objects != NOTHING)
    is_same = is_one_ground & (views.objects[:, None] == views.objects) & is_thing
    is_other_pair = ~torch.eye(len(descriptors), dtype=torch.bool, device=descriptors.device)
    kinds = (
        (0.5, is_same & is_other_pair, 1.0),
        (0.4, is_one_ground & ~is_same & is_thing, -1.0),
        (0.1, ~is_one_ground, -1.0),
    )
    loss = descriptors.new_zeros(())
    for share, pairs, sign in kinds:
        if pairs.any():
            loss = loss + share * nn.functional.softplus(-sign * log_odds[pairs]).mean()
    return loss
