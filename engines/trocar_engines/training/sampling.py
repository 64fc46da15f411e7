"""Training samples: a few frames of a clip, some of its objects, and the changes a scope could make."""

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trocar_engines.masklets import UInt8Array
from trocar_engines.training.store import NO_CLASS, StoredClip

FEWEST_PIXELS = 60
"""An object is chosen on a frame where at least so many of its 256x256 pixels show."""
LONGEST_STRIDE = 8
"""Consecutive frames of a real clip are taken up to this far apart."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How often each source is drawn; the shares are relative.

    Args:
        synthetic: rendered scenes and worlds.
        real: real clips.
        pasted: moving pictures made of a still, with cut-out objects moving over it.
    """

    synthetic: float = 0.5
    real: float = 0.2
    pasted: float = 0.3


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one training step sees of one clip; N objects on T frames.

    Args:
        pixels: uint8 [T, S, S, 3].
        masks: bool [N, T, S, S].
        classes: int64 [N], `NO_CLASS` where unknown.
    """

    pixels: Tensor
    masks: Tensor
    classes: Tensor


class ClipSamples(Dataset[Sample]):
    """Endless samples; the index is the seed, so that a stopped training resumes with the same ones.

    Args:
        synthetic: rendered clips.
        real: real clips, may be empty.
        frames: T.
        objects: N, drawn with replacement where a clip has fewer.
        size_px: side of the pictures.
        mix: shares of the sources.
        count: how many samples there are.
    """

    def __init__(
        self,
        synthetic: list[StoredClip],
        real: list[StoredClip],
        *,
        frames: int,
        objects: int,
        size_px: int,
        mix: Mix,
        count: int,
        seed: int = 0,
    ) -> None:
        self.synthetic, self.real = synthetic, real
        self.frames, self.objects, self.size_px, self.count, self.seed = frames, objects, size_px, count, seed
        shares = np.array([mix.synthetic, mix.real if real else 0.0, mix.pasted])
        self.shares = shares / shares.sum()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng([self.seed, index])
        while True:
            source = rng.choice(3, p=self.shares)
            if source == 2:
                pixels, classes = self._paste(rng)
            else:
                clip = _pick(rng, self.real if source == 1 else self.synthetic)
                pixels, classes = _take_frames(rng, clip, self.frames), clip.classes
            pixels = augment(rng, pixels, self.size_px)
            objects = _choose_objects(rng, pixels[0, :, :, 3], self.objects, len(classes))
            if objects is not None:
                break
        masks = torch.from_numpy(np.stack([pixels[..., 3] == object_id for object_id in objects]))
        return Sample(
            pixels=torch.from_numpy(np.ascontiguousarray(pixels[..., :3])),
            masks=masks,
            classes=torch.tensor([classes[object_id - 1] for object_id in objects]),
        )

    def _paste(self, rng: np.random.Generator) -> tuple[UInt8Array, tuple[int, ...]]:
        """A still under a moving camera, and up to three cut-out objects moving over it on their own."""
        everything = [*self.synthetic, *self.real] if rng.random() < 0.5 or not self.real else self.real
        still = _still(rng, _pick(rng, everything))
        size = still.shape[0]
        still[..., 3] = (still[..., 3] > 0) & (rng.random() < 0.5)
        frames = _drift(rng, still, self.frames, strength=0.5, border=cv2.BORDER_REFLECT_101)
        count = int(rng.integers(1, 4))
        for object_id in range(2, count + 2):
            donor = _still(rng, _pick(rng, everything))
            ids = np.flatnonzero(np.bincount(donor[..., 3].ravel(), minlength=256)[1:] >= FEWEST_PIXELS) + 1
            if not len(ids):
                continue
            donor[..., 3] = (donor[..., 3] == rng.choice(ids)) * 255
            moved = _drift(rng, donor, self.frames, strength=1.0, border=cv2.BORDER_CONSTANT)
            leaves_at = self.frames if rng.random() < 0.7 else int(rng.integers(1, self.frames))
            for t in range(leaves_at):
                alpha = cv2.GaussianBlur(moved[t, :, :, 3], (3, 3), 0)[..., None].astype(np.float32) / 255
                frames[t, :, :, :3] = moved[t, :, :, :3] * alpha + frames[t, :, :, :3] * (1 - alpha)
                frames[t, :, :, 3][alpha[..., 0] > 0.5] = object_id
        assert frames.shape[1] == size
        return frames, (NO_CLASS,) * (count + 1)


def collate(samples: list[Sample]) -> Sample:
    """Stack samples: pixels [B, T, S, S, 3], masks [B, N, T, S, S], classes [B, N]."""
    return Sample(
        pixels=torch.stack([sample.pixels for sample in samples]),
        masks=torch.stack([sample.masks for sample in samples]),
        classes=torch.stack([sample.classes for sample in samples]),
    )


def _pick(rng: np.random.Generator, clips: list[StoredClip]) -> StoredClip:
    return clips[int(rng.integers(len(clips)))]


def _still(rng: np.random.Generator, clip: StoredClip) -> UInt8Array:
    return np.array(clip.pixels[int(rng.integers(len(clip.pixels)))])


def _take_frames(rng: np.random.Generator, clip: StoredClip, frames: int) -> UInt8Array:
    """T frames in order, sometimes backwards; a short clip is played to and fro."""
    longest = LONGEST_STRIDE if clip.is_dense else 2
    stride = int(rng.integers(1, longest + 1))
    span = (frames - 1) * stride + 1
    start = int(rng.integers(max(1, len(clip.pixels) - span + 1)))
    indices = start + stride * np.arange(frames)
    period = max(1, 2 * (len(clip.pixels) - 1))
    indices = indices % period
    indices = np.where(indices >= len(clip.pixels), period - indices, indices)
    if rng.random() < 0.3:
        indices = indices[::-1]
    return np.array(clip.pixels[indices])


def _choose_objects(
    rng: np.random.Generator, label: UInt8Array, count: int, objects: int
) -> npt.NDArray[np.int64] | None:
    """`count` ids that show on the first frame, each once if there are enough; None if none shows."""
    shown = np.bincount(label.ravel(), minlength=objects + 1)[1 : objects + 1]
    ids = np.flatnonzero(shown >= FEWEST_PIXELS) + 1
    if not len(ids):
        return None
    return rng.permutation(np.resize(rng.permutation(ids), count))


def _affine(size: int, angle: float, scale: float, shift: npt.ArrayLike) -> npt.NDArray[np.float64]:
    matrix = cv2.getRotationMatrix2D((size / 2, size / 2), angle, scale)
    matrix[:, 2] += np.asarray(shift) * size
    return np.asarray(matrix)


def _drift(
    rng: np.random.Generator, still: UInt8Array, frames: int, *, strength: float, border: int
) -> UInt8Array:
    """The still along a smooth path of rotation, zoom and shift: uint8 [T, S, S, 4]."""
    size = still.shape[0]
    start = rng.normal(0, [15, 0.15, 0.12, 0.12]) * strength
    speed = rng.normal(0, [8, 0.08, 0.06, 0.06]) * strength * rng.choice([0.3, 1.0, 2.0])
    moved = []
    for t in range(frames):
        angle, zoom, *shift = start + t * speed + rng.normal(0, [1.5, 0.02, 0.01, 0.01]) * strength
        matrix = _affine(size, angle, float(np.exp(zoom)), shift)
        rgb = cv2.warpAffine(still[..., :3], matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=border)
        label = cv2.warpAffine(
            still[..., 3], matrix, (size, size), flags=cv2.INTER_NEAREST, borderMode=border
        )
        moved.append(np.dstack([rgb, label]))
    return np.stack(moved)


def augment(rng: np.random.Generator, pixels: UInt8Array, size_px: int) -> UInt8Array:
    """Geometry and colour that a scope, a light source and a recorder could have given the clip.

    One geometry for all frames (flips, quarter turns, crop, aspect), one colour for the clip with a little
    change from frame to frame, and sometimes a strong one at a single frame.

    Args:
        pixels: uint8 [T, H, W, 4], RGB and label.
        size_px: side of the result.

    Returns:
        uint8 [T, S, S, 4].
    """
    if rng.random() < 0.5:
        pixels = pixels[:, :, ::-1]
    if rng.random() < 0.3:
        pixels = pixels[:, ::-1]
    if rng.random() < 0.2:
        pixels = pixels.transpose(0, 2, 1, 3)
    side = pixels.shape[1]
    height, width = side * rng.uniform(0.6, 1.0, 2) if rng.random() < 0.6 else (side, side)
    top, left = rng.uniform(0, side - height), rng.uniform(0, side - width)
    rows, columns = slice(int(top), int(top + height)), slice(int(left), int(left + width))
    colour = _draw_colour(rng)
    changed = []
    for frame in pixels[:, rows, columns]:
        frame = np.ascontiguousarray(frame)
        rgb = cv2.resize(frame[..., :3], (size_px, size_px), interpolation=cv2.INTER_LINEAR)
        label = cv2.resize(frame[..., 3], (size_px, size_px), interpolation=cv2.INTER_NEAREST)
        if rng.random() < 0.1:
            colour = _draw_colour(rng)
        changed.append(np.dstack([_recolour(rng, np.asarray(rgb, dtype=np.uint8), colour), label]))
    return np.stack(changed)


@dataclass(frozen=True)
class _Colour:
    matrix: npt.NDArray[np.float32]
    gamma: float
    blur: float
    noise: float


def _draw_colour(rng: np.random.Generator) -> _Colour:
    grey = np.full((3, 3), 1 / 3, dtype=np.float32)
    saturation = 0.0 if rng.random() < 0.15 else rng.uniform(0.5, 1.4)
    gain = np.diag(rng.normal(1, 0.12, 3)) * rng.uniform(0.6, 1.35)
    matrix = gain @ (grey + saturation * (np.eye(3) - grey))
    if rng.random() < 0.1:
        matrix = matrix[:, rng.permutation(3)]
    return _Colour(
        matrix.astype(np.float32),
        float(np.exp(rng.normal(0, 0.25))),
        rng.uniform(0.5, 1.6) if rng.random() < 0.2 else 0.0,
        rng.uniform(2, 12) if rng.random() < 0.3 else 0.0,
    )


def _recolour(rng: np.random.Generator, rgb: UInt8Array, colour: _Colour) -> UInt8Array:
    value = cv2.transform(rgb.astype(np.float32), colour.matrix * rng.normal(1, 0.03))
    value = 255 * (np.clip(value, 0, 255) / 255) ** colour.gamma
    if colour.blur:
        value = cv2.GaussianBlur(value, (0, 0), colour.blur)
    if colour.noise:
        value = value + rng.normal(0, colour.noise, value.shape).astype(np.float32)
    return np.clip(value, 0, 255).astype(np.uint8)
