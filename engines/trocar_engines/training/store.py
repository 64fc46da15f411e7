"""Clips on disk: rendered once, read many times."""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch

from trocar_engines.davis import davis_clips, read_label
from trocar_engines.errors import TrocarError
from trocar_engines.masklets import UInt8Array
from trocar_engines.network.config import INSTRUMENT_CLASSES
from trocar_engines.preprocess import resize_to_model
from trocar_engines.training import canvas, instruments, motion, optics, scenes, texture, tissue
from trocar_engines.training.clip import Clip
from trocar_engines.training.scenes import SceneConfig, render_clip
from trocar_engines.training.worlds import render_world

CLIP_FRAMES = 8
FRAME_RATES_HZ = (1.5, 3.0, 6.0, 12.0)
"""Steps from a fifteenth of a second to most of one: a live stream and a memory minutes apart."""
NO_CLASS = -1


def identify_renderer(*files: Path) -> str:
    """Hash of the code that renders surgery, and of further files: what rendered pictures belong to."""
    modules = (canvas, instruments, motion, optics, scenes, texture, tissue)
    sources = [Path(str(module.__file__)) for module in modules] + list(files)
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]


class StoredClip:
    """One clip on disk, memory-mapped.

    Args:
        pixels: uint8 [T, S, S, 4]: RGB and the label.
        classes: index into `INSTRUMENT_CLASSES` per object id (from 1), or `NO_CLASS`.
        is_dense: consecutive frames lie close together, so that a stride may be drawn.
    """

    def __init__(self, pixels: UInt8Array, classes: tuple[int, ...], *, is_dense: bool) -> None:
        self.pixels = pixels
        self.classes = classes
        self.is_dense = is_dense


def render_stored(folder: Path, size_px: int, kind: str, seed: int) -> Path:
    """Render one clip of `kind` ("scene" or "world") into `folder` unless it is there; returns its path."""
    path = folder / f"{kind}-{size_px}-{seed:06d}.npy"
    if path.exists():
        return path
    torch.set_num_threads(1)
    rate_hz = FRAME_RATES_HZ[seed % len(FRAME_RATES_HZ)]
    if kind == "scene":
        config = SceneConfig(
            height_px=size_px, width_px=size_px, frames=CLIP_FRAMES, frame_rate=rate_hz, seed=seed
        )
        clip = render_clip(config)
    else:
        clip = render_world(size_px, size_px, CLIP_FRAMES, seed)
    _write(path, clip)
    return path


def _write(path: Path, clip: Clip) -> None:
    pixels = torch.cat([clip.images, clip.labels.unsqueeze(-1)], dim=-1).numpy()
    known = {name: index for index, name in enumerate(INSTRUMENT_CLASSES)}
    path.with_suffix(".json").write_text(json.dumps([known.get(name, NO_CLASS) for name in clip.classes]))
    partial_path = path.with_suffix(".part")
    with partial_path.open("wb") as file:
        np.save(file, pixels)
    partial_path.rename(path)  # a run that is stopped leaves no half clip behind


def render_store(
    folder: Path, *, size_px: int, scenes: int, worlds: int, workers: int, on_clip: Callable[[], None]
) -> None:
    """Render all clips that are missing, seeds 0 and on; `on_clip` is called after each."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [("scene", seed) for seed in range(scenes)] + [("world", seed) for seed in range(worlds)]
    with ProcessPoolExecutor(workers) as pool:
        render = partial(render_stored, folder, size_px)
        for _ in pool.map(render, *zip(*jobs, strict=True), chunksize=4):
            on_clip()


def open_store(folder: Path, size_px: int) -> list[StoredClip]:
    """Every rendered clip of that size in `folder`, in order of name."""
    return [
        StoredClip(
            np.load(path, mmap_mode="r"),
            tuple(json.loads(path.with_suffix(".json").read_text())),
            is_dense=False,
        )
        for path in sorted(folder.glob(f"*-{size_px}-*.npy"))
    ]


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
