"""A folder in DAVIS layout, checked before anything is tracked on it."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from trocar_engines.davis import davis_clips, read_label
from trocar_engines.errors import TrocarError
from trocar_engines.masklets import BoolArray, UInt8Array

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png"}
OBJECTS_FILE = "objects.json"
"""May lie beside JPEGImages/ and Annotations/ and tell what masks cannot:
{"clips": {NAME: {"frame_rate_hz": HZ, "objects": {ID: {"class_name": ..., ...}}}}}, see `ObjectFacts`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectFacts:
    """What is known of an object beside its masks.

    Args:
        class_name: "" where it is not known.
        is_prompted: False for an object that is only in the way.
        is_ambiguous: once it has been away, nothing tells it from a look-alike in view: staying LOST is
            right, and taking the other one for it is wrong.
        is_apart: of a class that no training showed; its figures stay out of the means.
    """

    class_name: str = ""
    is_prompted: bool = True
    is_ambiguous: bool = False
    is_apart: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationClip:
    """One clip, checked: sizes agree, every mask has a frame, every frame but the first may be scored.

    Args:
        name: of its folder.
        frames: every picture in order, with or without a mask.
        masks: the mask of a frame, by its place in `frames`.
        prompted_frames: place of the first frame that shows an object, by object_id.
        width_px: of every picture.
        height_px: of every picture.
        objects: facts by object_id, where there are any.
        frame_rate_hz: None where it is not known.
    """

    name: str
    frames: tuple[Path, ...]
    masks: Mapping[int, Path]
    prompted_frames: Mapping[int, int]
    width_px: int
    height_px: int
    objects: Mapping[int, ObjectFacts] = field(default_factory=dict)
    frame_rate_hz: float | None = None

    def read_rgb(self, index: int) -> UInt8Array:
        """uint8 [H, W, 3], RGB.

        Raises:
            TrocarError: the file is no picture.
        """
        picture = cv2.imread(str(self.frames[index]), cv2.IMREAD_COLOR)
        if picture is None:
            raise TrocarError(f"{self.frames[index]}: cannot be read as a picture")
        return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)

    def read_truth(self, index: int) -> UInt8Array | None:
        """uint8 [H, W] object ids; None for a frame without a mask."""
        return read_label(self.masks[index]) if index in self.masks else None

    def new_objects(self, index: int) -> Iterator[tuple[int, BoolArray]]:
        """Objects to prompt on a frame, with their masks."""
        ids = [object_id for object_id, first in self.prompted_frames.items() if first == index]
        truth = self.read_truth(index) if ids else None
        if truth is not None:
            yield from ((object_id, truth == object_id) for object_id in ids)


def find_clips(folder: Path, chosen: Sequence[str], on_mask: Callable[[], None]) -> list[EvaluationClip]:
    """Every clip of the folder, or those chosen; `on_mask` is called for every mask that was read.

    Raises:
        TrocarError: the folder cannot be scored; the message names the file.
    """
    names = [name for name, _, _ in davis_clips(folder)]
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise TrocarError(f"{folder}: holds no clip {', '.join(unknown)}; it holds {', '.join(names)}")
    for path in sorted((folder / "Annotations").iterdir()):
        if path.is_dir() and path.name not in names:
            raise TrocarError(f"{path}: has masks but no frames in {folder / 'JPEGImages' / path.name}")
    facts = _read_facts(folder / OBJECTS_FILE)
    return [_check_clip(folder, name, facts.get(name, _NO_FACTS), on_mask) for name in chosen or names]


class _ClipFacts(NamedTuple):
    objects: Mapping[int, ObjectFacts]
    frame_rate_hz: float | None


_NO_FACTS = _ClipFacts({}, None)


def _read_facts(path: Path) -> dict[str, _ClipFacts]:
    """Facts by clip; none without the file."""
    if not path.exists():
        return {}
    try:
        return {
            name: _ClipFacts(
                {int(object_id): ObjectFacts(**known) for object_id, known in clip["objects"].items()},
                _read_rate(clip["frame_rate_hz"]),
            )
            for name, clip in json.loads(path.read_text())["clips"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrocarError(f"{path}: cannot be read as facts on objects ({error!r})") from error


def _read_rate(value: object) -> float:
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"frame_rate_hz {value!r}: must be above 0")
    return float(value)


def _check_clip(folder: Path, name: str, facts: _ClipFacts, on_mask: Callable[[], None]) -> EvaluationClip:
    images, annotations = folder / "JPEGImages" / name, folder / "Annotations" / name
    frames = sorted(path for path in images.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
    if len(frames) < 2:
        raise TrocarError(f"{images}: holds {len(frames)} frame; scoring needs one after the prompted one")
    places = {path.stem: index for index, path in enumerate(frames)}
    size = _read_size(frames[0])
    for path in frames:
        _check_size(path, size, frames[0])
    masks: dict[int, Path] = {}
    prompted_frames: dict[int, int] = {}
    for path in sorted(annotations.glob("*.png")):
        if path.stem not in places:
            raise TrocarError(f"{path}: has no frame of that name in {images}")
        index = places[path.stem]
        _check_size(path, size, frames[index])
        masks[index] = path
        for object_id in np.flatnonzero(np.bincount(read_label(path).ravel())).tolist():
            if object_id and facts.objects.get(object_id, ObjectFacts()).is_prompted:
                prompted_frames.setdefault(object_id, index)
        on_mask()
    if not prompted_frames:
        raise TrocarError(f"{annotations}: no mask shows an object to prompt")
    if max(masks) <= min(prompted_frames.values()):
        raise TrocarError(f"{masks[max(masks)]}: no mask follows it, so there is nothing to score")
    width_px, height_px = size
    return EvaluationClip(
        name=name,
        frames=tuple(frames),
        masks=masks,
        prompted_frames=dict(sorted(prompted_frames.items())),
        width_px=width_px,
        height_px=height_px,
        objects=facts.objects,
        frame_rate_hz=facts.frame_rate_hz,
    )


def _read_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:  # reads the header only
            return image.size
    except OSError as error:
        raise TrocarError(f"{path}: cannot be read as a picture ({error})") from error


def _check_size(path: Path, expected: tuple[int, int], reference: Path) -> None:
    size = _read_size(path)
    if size != expected:
        raise TrocarError(
            f"{path}: {size[0]}x{size[1]} pixels, expected {expected[0]}x{expected[1]} as {reference}"
        )
