"""Folders in DAVIS layout: `JPEGImages/<clip>/NNNNN.jpg` and `Annotations/<clip>/NNNNN.png`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from trocar_engines.errors import TrocarError
from trocar_engines.masklets import UInt8Array

LARGEST_ID = 255
"""A paletted PNG holds no greater value."""


def davis_clips(folder: Path) -> Iterator[tuple[str, list[Path], list[Path]]]:
    """Name, frames and masks of every clip of a folder; frames without a mask are left out.

    Raises:
        TrocarError: a folder or a file is missing; the message names it.
    """
    images, annotations = folder / "JPEGImages", folder / "Annotations"
    for part in (images, annotations):
        if not part.is_dir():
            raise TrocarError(f"{folder}: expected DAVIS layout with {part.name}/<clip>/")
    names = sorted(path.name for path in images.iterdir() if path.is_dir())
    if not names:
        raise TrocarError(f"{images}: holds no clip")
    for name in names:
        masks = {path.stem: path for path in (annotations / name).glob("*.png")}
        frames = [path for path in sorted((images / name).iterdir()) if path.stem in masks]
        if not frames:
            raise TrocarError(f"{annotations / name}: holds no mask of a frame of {images / name}")
        yield name, frames, [masks[path.stem] for path in frames]


def read_label(path: Path) -> UInt8Array:
    """A mask as uint8 [H, W] object ids; a paletted file keeps its indices.

    Raises:
        TrocarError: the file is no picture of one channel, or holds an id above `LARGEST_ID`.
    """
    try:
        with Image.open(path) as image:
            label = np.asarray(image)
    except OSError as error:
        raise TrocarError(f"{path}: cannot be read as a mask ({error})") from error
    if label.ndim != 2:
        raise TrocarError(
            f"{path}: expected one channel (a paletted or grey PNG), received {label.shape[-1]}"
        )
    if label.dtype != np.uint8 and label.max() > LARGEST_ID:
        raise TrocarError(f"{path}: object id {label.max()}, expected at most {LARGEST_ID}")
    return label.astype(np.uint8)
