"""Windows on the tips of rendered instruments: what the semantic head learns kinds of instruments from.

The head sees an object through `view_of_object` and nothing else, so it needs neither clips nor a network
that tracks: stills with true masks, roughened to what a tracker says. Painting the tissue takes most of a
scene's time, so each ground is used for many casts of instruments, no two of them alike.
"""

import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trocar_engines.network import semantic, window
from trocar_engines.network.config import INSTRUMENT_CLASSES
from trocar_engines.network.sam2s import IMAGE_MEAN, IMAGE_STD
from trocar_engines.network.semantic import view_of_object
from trocar_engines.network.window import find_pose
from trocar_engines.training.instruments import INSTRUMENT_KINDS, Instrument, draw_instrument, draw_style
from trocar_engines.training.motion import draw_camera
from trocar_engines.training.optics import draw_optics
from trocar_engines.training.pool import FEWEST_PIXELS
from trocar_engines.training.scenes import Cast, Scene, SceneConfig
from trocar_engines.training.store import begin_rendering, identify_renderer
from trocar_engines.training.tissue import Palette, draw_palette, draw_structure

CASTS = 12
"""Of each ground."""
STRUCTURES_EVERY = 4
"""One cast of so many has structures of tissue beside its instruments."""
LONGEST_S = 260.0
"""Each cast is shown at some moment of so many seconds."""
FIRST_SEED = 3_000_000
"""Grounds that no clip of a training or a benchmark shows."""
SURE = 10.0
"""Logit of a mask that knows."""
LARGEST_CUT = 12 / 256
"""What is thinner may be cut off a mask, in sides of the picture."""
ENDS_EARLY_SHARE = 0.35
"""Of objects whose mask ends before their tip: a tracker's ends at the wrist of a needle driver."""
LONGEST_LOSS = 3.0
"""So much of a mask is missing at its tip at most, in widths of the object."""


class Windows(NamedTuple):
    """Objects as the semantic head sees them.

    Args:
        seen: [N, 4, h, w] mask, -1 to 1, and normalised picture, from `view_of_object`.
        shape: [N, 2], likewise.
        classes: int64 [N] index into `INSTRUMENT_CLASSES`.
    """

    seen: Tensor
    shape: Tensor
    classes: Tensor


def render_windows(folder: Path, size_px: int, index: int) -> Path:
    """Render the windows of one ground into `folder` unless they are there; returns their path."""
    path = folder / f"windows-{_identify()}-{size_px}-{index:06d}.npz"
    if not path.exists():
        torch.set_num_threads(1)
        seen, shape, classes = _draw_windows(size_px, FIRST_SEED + index)
        write_arrays(path, seen=seen.half(), shape=shape, classes=classes.to(torch.int8))
    return path


def write_arrays(path: Path, **arrays: Tensor) -> None:
    """Write tensors to an npz file; a run that is stopped leaves no half file behind."""
    partial_path = path.with_suffix(".part")
    with partial_path.open("wb") as file:
        np.savez(file, allow_pickle=False, **{name: values.numpy() for name, values in arrays.items()})
    partial_path.rename(path)


def fill_store(
    render: Callable[[Path, int, int], Path],
    folder: Path,
    *,
    size_px: int,
    grounds: int,
    workers: int,
    on_ground: Callable[[], None],
) -> None:
    """Render what is missing of the first `grounds` grounds; `on_ground` is called after each.

    Args:
        render: `render_windows`, or `appearance.render_views`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers, initializer=begin_rendering) as pool:
        for _ in pool.map(partial(render, folder, size_px), range(grounds), chunksize=4):
            on_ground()


def open_windows(folder: Path, size_px: int) -> Windows | None:
    """Every rendered window of that size in `folder`, pictures in half precision; None if there is none."""
    stored = [np.load(path) for path in sorted(folder.glob(f"windows-{_identify()}-{size_px}-*.npz"))]
    if not stored:
        return None
    seen, shape, classes = (
        torch.from_numpy(np.concatenate([one[name] for one in stored])) for name in Windows._fields
    )
    return Windows(seen, shape, classes.long())


@cache
def _identify() -> str:
    """Hash of the code that renders and looks: windows of another view would teach another head."""
    return identify_renderer(*(Path(str(file)) for file in (semantic.__file__, window.__file__, __file__)))


@dataclass(frozen=True, kw_only=True)
class WindowSamples(Dataset[Windows]):
    """Endless windows, each changed a little; the index is the seed.

    Args:
        windows: to draw from.
        count: how many samples there are.
        seed: of all.
    """

    windows: Windows
    count: int
    seed: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Windows:
        rng = np.random.default_rng([self.seed, index])
        chosen = int(rng.integers(len(self.windows.classes)))
        seen, shape, classes = (values[chosen] for values in self.windows)
        return Windows(_change(rng, seen.float()), shape * (1 + 0.1 * normal(rng, 2)), classes)


def collate_windows(samples: list[Windows]) -> Windows:
    """Stack samples to a batch."""
    seen, shape, classes = zip(*samples, strict=True)
    return Windows(torch.stack(seen), torch.stack(shape), torch.stack(classes))


def _change(rng: np.random.Generator, seen: Tensor) -> Tensor:
    """Move the window a little, mirror it, change colours and add noise, each at times."""
    if rng.random() < 0.5:
        seen = seen.flip(2)
    if rng.random() < 0.5:
        turn, (wide, high) = rng.normal(0, 0.12), 1 + rng.normal(0, 0.12, 2)
        move_x, move_y = rng.normal(0, 0.12, 2)
        change = torch.tensor([[[wide, turn, move_x], [-turn, high, move_y]]], dtype=torch.float32)
        grid = torch.nn.functional.affine_grid(change, [1, *seen.shape], align_corners=False)
        moved = torch.nn.functional.grid_sample(seen[None], grid, padding_mode="border", align_corners=False)
        seen = moved[0]
    if rng.random() < 0.5:
        gain, offset = 1 + 0.2 * normal(rng, 3, 1, 1), 0.25 * normal(rng, 3, 1, 1)
        picture = seen[1:] * gain + offset
        if rng.random() < 0.3:
            picture = picture + 0.15 * normal(rng, *picture.shape)
        seen = torch.cat([seen[:1], picture])
    return seen


def normal(rng: np.random.Generator, *shape: int) -> Tensor:
    """Standard normal float32 [*shape]."""
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def _draw_windows(size_px: int, seed: int) -> Windows:
    config = SceneConfig(height_px=size_px, width_px=size_px, frames=1, frame_rate=1.0, seed=seed)
    rng = np.random.default_rng([seed, 1])
    palette = draw_palette(rng, held_out=False)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    casts = [_draw_cast(rng, palette, has_structures=index % STRUCTURES_EVERY == 0) for index in range(CASTS)]
    scene = Scene(config, draw_cast=lambda _rng, _config: casts[0])
    found: list[Windows] = []
    for cast in casts:
        scene.restage(cast)
        image, labels = scene.render(int(rng.uniform(0, LONGEST_S)))
        classes = torch.tensor([INSTRUMENT_CLASSES.index(name) for name in scene.classes])
        masks = torch.stack([(labels == object_id).float() for object_id in range(1, len(classes) + 1)])
        logits = end_early(rng, roughen(rng, masks))
        # A tracker asks only what it is that it has found.
        is_found = (masks.flatten(1).sum(1) >= FEWEST_PIXELS) & (logits > 0).flatten(1).any(1)
        picture = (image.float().permute(2, 0, 1)[None] - mean) / std
        seen, shape = view_of_object(logits, picture.expand(len(classes), -1, -1, -1))
        found.append(Windows(seen[is_found], shape[is_found], classes[is_found]))
    return Windows(*(torch.cat(values) for values in zip(*found, strict=True)))


def _draw_cast(rng: np.random.Generator, palette: Palette, *, has_structures: bool) -> Cast:
    """Two to four instruments of any kind, from all sides."""
    count = int(rng.integers(2, 5))
    players: list[Instrument] = []
    for index in range(count):
        kind = str(rng.choice(INSTRUMENT_KINDS))
        players.append(
            draw_instrument(
                rng,
                kind,
                style=draw_style(rng, kind),
                entry_angle=2 * math.pi * (index + rng.uniform(0, 0.9)) / count,
                home=(rng.uniform(-0.6, 0.6), rng.uniform(-0.6, 0.6)),
                aspect=1.0,
                liveliness=rng.uniform(0.2, 1.6),
            )
        )
    structures = [draw_structure(rng, palette, 1.0) for _ in range(int(rng.integers(1, 3)))]
    camera = draw_camera(rng, rng.uniform(0.0, 1.3))
    shown = tuple(structures) if has_structures else ()
    return Cast(palette, camera, draw_optics(rng), tuple(players), shown)


def end_early(rng: np.random.Generator, mask_logits: Tensor) -> Tensor:
    """Cut the tips off some masks, logits [B, h, w] at stride 4 to the same."""
    pose, count = find_pose(mask_logits), len(mask_logits)
    lost = np.where(rng.random(count) < ENDS_EARLY_SHARE, rng.uniform(0, LONGEST_LOSS, count), -1.0)
    ticks = torch.arange(mask_logits.shape[-1]).float() + 0.5
    tip_x, tip_y, ahead_x, ahead_y, width = (values.view(-1, 1, 1) for values in pose[:5])
    along = (ticks.view(1, 1, -1) - tip_x) * ahead_x + (ticks.view(1, -1, 1) - tip_y) * ahead_y
    is_lost = along > -width * torch.from_numpy(lost).float().view(-1, 1, 1)
    return torch.where(is_lost, mask_logits.amin((1, 2), keepdim=True), mask_logits)


def roughen(rng: np.random.Generator, masks: Tensor) -> Tensor:
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
            normal(rng, len(masks), 1, 10, 10), share.shape[2:], mode="bilinear", align_corners=False
        )
        # Where the mask is unsure, its outline wanders; and all of it is a little too large or too small.
        share = share + rng.uniform(0.0, 1.0) * waves * share * (1 - share) + rng.normal(0, 0.08)
    return (SURE * rng.uniform(0.15, 1.0) * (2 * share - 1)).squeeze(1)
