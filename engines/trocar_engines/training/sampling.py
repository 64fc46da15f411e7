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
AWAY_SHARE = 0.25
"""Share of clips in which the camera looks away for some frames: what a presence head learns from."""
LOOK_ALIKE_SHARE = 0.35
"""Share of clips in which a copy of an object moves about on its own: it is another one."""
LOOK_ALIKE_COVERS = 0.3
"""Share of an object that its copy may cover on the first frame, where the object is prompted."""
SMALLEST_VIEW = 0.3
"""Side of the smallest view without objects that stands for looking away, over the picture's."""
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
                if rng.random() < AWAY_SHARE and self.frames > 1:
                    _look_away(rng, pixels, _pick(rng, self.synthetic))
            if rng.random() < LOOK_ALIKE_SHARE:
                _add_look_alike(rng, pixels)
            pixels = augment(rng, pixels, self.size_px)
            objects = _choose_objects(rng, pixels[0, :, :, 3], self.objects)
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
            ids = _shown_ids(donor[..., 3])
            if not len(ids):
                continue
            donor[..., 3] = (donor[..., 3] == rng.choice(ids)) * 255
            moved = _drift(rng, donor, self.frames, strength=1.0, border=cv2.BORDER_CONSTANT)
            leaves_at = self.frames if rng.random() < 0.7 else int(rng.integers(1, self.frames))
            for t in range(leaves_at):
                _lay_over(frames[t], moved[t], object_id)
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


def _look_away(rng: np.random.Generator, pixels: UInt8Array, other: StoredClip) -> None:
    """Hide every object from some frames after the first, in place.

    Such a frame shows a part of its own picture without objects, else a picture of another clip, whose
    objects are none of ours.

    Args:
        pixels: uint8 [T, S, S, 4].
        other: of the same size.
    """
    begin = int(rng.integers(1, len(pixels)))
    end = int(rng.integers(begin + 1, len(pixels) + 1))
    size = pixels.shape[1]
    for frame in pixels[begin:end]:
        view = _view_without_objects(rng, frame[..., 3])
        if view is None:
            frame[...] = _still(rng, other)
        else:
            frame[..., :3] = cv2.resize(frame[view][..., :3], (size, size), interpolation=cv2.INTER_LINEAR)
        frame[..., 3] = 0


def _lay_over(frame: UInt8Array, cut_out: UInt8Array, object_id: int) -> None:
    """Draw a cut-out, whose fourth channel is its opacity, over a frame, in place; both uint8 [S, S, 4]."""
    opacity = cv2.GaussianBlur(cut_out[..., 3], (3, 3), 0)[..., None].astype(np.float32) / 255
    frame[..., :3] = cut_out[..., :3] * opacity + frame[..., :3] * (1 - opacity)
    frame[..., 3][opacity[..., 0] > 0.5] = object_id


def _add_look_alike(rng: np.random.Generator, pixels: UInt8Array) -> None:
    """Let a copy of an object of the first frame move about as part of the background, in place.

    While the object itself can be followed the copy may be its twin. Where the object is away for a while
    the copy carries a mark or another colour, as else nobody could tell the two apart.

    Args:
        pixels: uint8 [T, S, S, 4].
    """
    ids = _shown_ids(pixels[0, :, :, 3])
    if not len(ids):
        return
    is_object = pixels[..., 3] == rng.choice(ids)
    copy = np.array(pixels[0])
    copy[..., 3] = is_object[0] * 255
    is_always_there = bool(is_object.any(axis=(1, 2)).all())
    if not is_always_there or rng.random() < 0.7:
        _mark(rng, copy)
    if rng.random() < 0.5:
        copy = np.ascontiguousarray(copy[:, ::-1])
    moved = _drift(rng, copy, len(pixels), strength=1.5, border=cv2.BORDER_CONSTANT)
    covered = np.count_nonzero(is_object[0] & (moved[0, :, :, 3] > 0))
    is_there_at_once = covered < LOOK_ALIKE_COVERS * np.count_nonzero(is_object[0]) and rng.random() < 0.5
    comes_at = 0 if is_there_at_once else int(rng.integers(1, len(pixels) + 1))
    for frame, cut_out in zip(pixels[comes_at:], moved[comes_at:], strict=True):
        _lay_over(frame, cut_out, 0)


def _mark(rng: np.random.Generator, cut_out: UInt8Array) -> None:
    """Give a cut-out, uint8 [S, S, 4], a coloured band or another colour, in place."""
    rgb = cut_out[..., :3].astype(np.float32)
    if rng.random() < 0.5:
        rows, columns = np.nonzero(cut_out[..., 3])
        angle = rng.uniform(0, np.pi)
        along = columns * np.cos(angle) + rows * np.sin(angle)
        low, high = along.min(), along.max()
        width = rng.uniform(0.1, 0.3) * (high - low + 1)
        begin = rng.uniform(low, high - width)
        band = (along >= begin) & (along <= begin + width)
        rgb[rows[band], columns[band]] = 0.25 * rgb[rows[band], columns[band]] + 0.75 * rng.uniform(0, 255, 3)
    else:
        rgb *= rng.uniform(0.5, 1.5, 3)
        rgb += rng.uniform(-30, 30, 3)
    cut_out[..., :3] = np.clip(rgb, 0, 255)


def _view_without_objects(rng: np.random.Generator, label: UInt8Array) -> tuple[slice, slice] | None:
    """Rows and columns of a square without labels, the largest of some tries; None if none is found."""
    size = label.shape[0]
    for share in np.linspace(0.7, SMALLEST_VIEW, 12):
        side = int(size * share)
        top, left = rng.integers(0, size - side + 1, 2)
        view = slice(int(top), int(top) + side), slice(int(left), int(left) + side)
        if not label[view].any():
            return view
    return None


def _choose_objects(rng: np.random.Generator, label: UInt8Array, count: int) -> npt.NDArray[np.int64] | None:
    """`count` ids that show on the first frame, each once if there are enough; None if none shows."""
    ids = _shown_ids(label)
    if not len(ids):
        return None
    return rng.permutation(np.resize(rng.permutation(ids), count))


def _shown_ids(label: UInt8Array) -> npt.NDArray[np.int64]:
    """Ids with at least `FEWEST_PIXELS` pixels."""
    return np.flatnonzero(np.bincount(label.ravel(), minlength=256)[1:] >= FEWEST_PIXELS) + 1


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
