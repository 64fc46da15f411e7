"""Clips where a training reads them: on its device, rendered while it runs."""

from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trocar_engines.masklets import BoolArray, UInt8Array
from trocar_engines.network.config import INSTRUMENT_CLASSES
from trocar_engines.preprocess import resize_to_model
from trocar_engines.training.clip import Clip
from trocar_engines.training.returns import draw_return_cast
from trocar_engines.training.scenes import Scene, SceneConfig, render_clip
from trocar_engines.training.store import NO_CLASS, StoredClip, begin_rendering
from trocar_engines.training.worlds import render_world

MOST_IDS = 16
"""Object ids of a sample, 0 included."""
SPRITES = 3
"""Cut-out objects that move over a sample's clip at most; they have the last ids."""
FIRST_SPRITE_ID = MOST_IDS - SPRITES
FEWEST_PIXELS = 60
"""An object is chosen on a frame where at least so many of its 256x256 pixels show."""
FRAME_RATES_HZ = (1.5, 3.0, 6.0, 12.0)
"""Steps from a twelfth of a second to most of one: a live stream and a memory minutes apart."""
ASPECTS = (1.0, 1.25, 4 / 3, 16 / 9)
"""Width over height of rendered operations before they are squeezed."""
RETURNS_SHARE = 0.4
"""Of surgical scenes that show a return, see `returns`."""
REAL_STRIDES = (1, 2, 4, 8)
"""Frames of a real clip are taken so far apart: their rate is mostly higher than a memory is long."""
REAL_OVERLAP = 4
"""Stretches of a real clip begin a fourth of their length apart."""


class LabelledFrames(NamedTuple):
    """One clip.

    Args:
        pixels: uint8 [T, S, S, 4], RGB and the object id that shows, 0 for none.
        classes: int [MOST_IDS], index into `INSTRUMENT_CLASSES` by object id, or `NO_CLASS`.
        objects: number of ids, from 1.
        shown: bool [T, MOST_IDS], which ids show on at least `FEWEST_PIXELS` pixels of 256x256.
    """

    pixels: Tensor
    classes: npt.NDArray[np.int64]
    shown: BoolArray
    objects: int


def label_frames(pixels: UInt8Array, classes: tuple[int, ...]) -> LabelledFrames:
    """A clip with what is known of its ids, from uint8 [T, S, S, 4] and a class per id from 1.

    Ids from `FIRST_SPRITE_ID` on become background, in place.
    """
    fewest = FEWEST_PIXELS * pixels.shape[1] ** 2 / 256**2
    labels = pixels[..., 3]
    labels[labels >= FIRST_SPRITE_ID] = 0
    counts = [np.bincount(frame.ravel(), minlength=MOST_IDS) for frame in labels]
    shown = np.stack(counts) >= fewest
    shown[:, 0] = False
    known = np.full(MOST_IDS, NO_CLASS)
    known[1:FIRST_SPRITE_ID][: len(classes)] = classes[: FIRST_SPRITE_ID - 1]
    return LabelledFrames(torch.from_numpy(pixels), known, shown, len(classes))


class RenderedClips(Dataset[LabelledFrames]):
    """Synthetic clips without end; the index is the seed.

    Args:
        size_px: side of the pictures.
        frames: of each clip.
        worlds: share of worlds beyond surgery.
        begin: seed of the first one.
        count: how many there are.
    """

    def __init__(self, *, size_px: int, frames: int, worlds: float, begin: int, count: int) -> None:
        self.size_px, self.frames, self.worlds, self.begin, self.count = size_px, frames, worlds, begin, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> LabelledFrames:
        seed = self.begin + index
        rng = np.random.default_rng([seed, 7])
        if rng.random() < self.worlds:
            return label_frames(*_stack(render_world(self.size_px, self.size_px, self.frames, seed)))
        # Wide pictures are squeezed as inference squeezes them: what turns there changes its width.
        config = SceneConfig(
            height_px=self.size_px,
            width_px=round(self.size_px * float(rng.choice(ASPECTS))),
            frames=self.frames,
            frame_rate=float(rng.choice(FRAME_RATES_HZ)),
            seed=seed,
        )
        if rng.random() < RETURNS_SHARE:
            return label_frames(*_stack(render_clip(Scene(config, draw_cast=draw_return_cast))))
        return label_frames(*_stack(render_clip(Scene(config))))


def _stack(clip: Clip) -> tuple[UInt8Array, tuple[int, ...]]:
    size_px = clip.images.shape[1]
    images = [resize_to_model(image, size_px) for image in clip.images.numpy()]
    labels = [
        cv2.resize(label, (size_px, size_px), interpolation=cv2.INTER_NEAREST)
        for label in clip.labels.numpy()
    ]
    pixels: UInt8Array = np.concatenate([np.stack(images), np.stack(labels)[..., None]], axis=-1)
    known = {name: index for index, name in enumerate(INSTRUMENT_CLASSES)}
    return pixels, tuple(known.get(name, NO_CLASS) for name in clip.classes)


def render_clips(clips: RenderedClips, workers: int) -> Iterator[LabelledFrames]:
    """Every clip in order of its seed, rendered ahead by so many processes; 0 renders on demand."""
    loader = DataLoader(
        clips,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=lambda _: begin_rendering(),
    )
    return iter(loader)


def cut_stretches(clip: StoredClip, frames: int) -> Iterator[LabelledFrames]:
    """Every part of a clip that a training may show, `frames` long; a short clip is played to and fro."""
    length = len(clip.pixels)
    turn = max(1, 2 * (length - 1))
    for stride in REAL_STRIDES if clip.is_dense else (1,):
        span = (frames - 1) * stride + 1
        if span > 2 * length and stride > 1:
            continue
        step = max(1, frames * stride // REAL_OVERLAP)
        for start in range(0, max(1, length - span + 1), step):
            index = (start + stride * np.arange(frames)) % turn
            index = np.where(index >= length, turn - index, index)
            yield label_frames(np.ascontiguousarray(clip.pixels[index]), clip.classes)


class ClipPool:
    """Clips of one length on a device; some stay, the others make room for newer ones.

    Args:
        kept: that stay, in the first slots.
        slots: how many others it holds.
        frames: of each clip.
        size_px: side of the pictures.
        device: of the pixels; what is known of them stays on the host.
    """

    def __init__(
        self,
        kept: list[LabelledFrames],
        *,
        slots: int,
        frames: int,
        size_px: int,
        device: torch.device | str,
    ) -> None:
        every = len(kept) + slots
        self.pixels = torch.zeros(every, frames, size_px, size_px, 4, dtype=torch.uint8, device=device)
        self.classes = np.full((every, MOST_IDS), NO_CLASS)
        self.shown: BoolArray = np.zeros((every, frames, MOST_IDS), dtype=bool)
        self.kept, self.added = len(kept), 0
        for slot, clip in enumerate(kept):
            self._write(slot, clip)

    @property
    def fresh(self) -> int:
        """How many clips it holds beside those that stay."""
        return min(self.added, len(self.shown) - self.kept)

    def add(self, clip: LabelledFrames) -> None:
        """Put a clip in a free slot, else in the place of the oldest."""
        self._write(self.kept + self.added % (len(self.shown) - self.kept), clip)
        self.added += 1

    def _write(self, slot: int, clip: LabelledFrames) -> None:
        self.pixels[slot].copy_(clip.pixels, non_blocking=True)
        self.classes[slot] = clip.classes
        self.shown[slot] = clip.shown
