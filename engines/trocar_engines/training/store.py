"""Clips of real footage, and what rendered pictures belong to."""

import gc
import hashlib
from pathlib import Path

import cv2
import numpy as np
import torch

from trocar_engines.davis import davis_clips, read_label
from trocar_engines.errors import TrocarError
from trocar_engines.masklets import UInt8Array
from trocar_engines.preprocess import resize_to_model
from trocar_engines.training import canvas, instruments, motion, optics, scenes, texture, tissue

NO_CLASS = -1


def identify_renderer(*files: Path) -> str:
    """Hash of the code that renders surgery, and of further files: what rendered pictures belong to."""
    modules = (canvas, instruments, motion, optics, scenes, texture, tissue)
    sources = [Path(str(module.__file__)) for module in modules] + list(files)
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]


def begin_rendering() -> None:
    """For a process that renders, before all else.

    One thread, as more would fight over the cores. Garbage of the process that it was forked from stays where
    it is: to collect a gRPC channel of asyncio takes a thread that was not forked, and waits for it for ever.
    """
    gc.freeze()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


class StoredClip:
    """One clip.

    Args:
        pixels: uint8 [T, S, S, 4]: RGB and the label.
        classes: index into `INSTRUMENT_CLASSES` per object id (from 1), or `NO_CLASS`.
        is_dense: consecutive frames lie close together, so that a stride may be drawn.
    """

    def __init__(self, pixels: UInt8Array, classes: tuple[int, ...], *, is_dense: bool) -> None:
        self.pixels = pixels
        self.classes = classes
        self.is_dense = is_dense


def load_davis(folder: Path, size_px: int) -> list[StoredClip]:
    """Every clip of a folder in DAVIS layout, at the network's input size."""
    clips = []
    for _, frames, masks in davis_clips(folder):
        pixels = np.stack([_load_frame(*pair, size_px) for pair in zip(frames, masks, strict=True)])
        objects = int(pixels[..., 3].max())
        clips.append(StoredClip(pixels, (NO_CLASS,) * objects, is_dense=True))
    return clips


def _load_frame(frame: Path, mask: Path, size_px: int) -> UInt8Array:
    picture = cv2.imread(str(frame), cv2.IMREAD_COLOR)
    if picture is None:
        raise TrocarError(f"{frame}: cannot be read as a picture")
    label = read_label(mask)
    rgb = resize_to_model(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), size_px)  # type: ignore[arg-type]
    small = cv2.resize(label, (size_px, size_px), interpolation=cv2.INTER_NEAREST)
    return np.dstack([rgb, small])
