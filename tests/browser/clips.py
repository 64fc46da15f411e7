"""A clip for the screen: a red disc that leaves and comes back, a green one that stays; numbered pictures."""

from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from trocar_bench.barcode import stamp
from trocar_engines.masklets import UInt8Array
from wire.clips import encode_clip

WIDTH_PX, HEIGHT_PX = 640, 360
RATE_HZ = 10
FRAMES = 50
AWAY = range(30, 40)
"""Frames without the red disc."""
GREEN_CENTER = (480, 250)
RADIUS_PX = 40


def red_center(index: int) -> tuple[int, int]:
    return 120 + 2 * (index % FRAMES), 150


def draw_frame(index: int) -> UInt8Array:
    frame = np.full((HEIGHT_PX, WIDTH_PX, 3), 40, np.uint8)
    cv2.circle(frame, GREEN_CENTER, RADIUS_PX, (40, 200, 60), -1)
    if index % FRAMES not in AWAY:
        cv2.circle(frame, red_center(index), RADIUS_PX, (220, 40, 40), -1)
    return stamp(frame, index)


def encode_round() -> tuple[bytes, ...]:
    return tuple(encode_clip([draw_frame(index) for index in range(FRAMES)], keyframe_interval=RATE_HZ))


def write_clip(path: Path, *, frames: int = FRAMES, encoder: str = "libx264") -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=RATE_HZ)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = WIDTH_PX, HEIGHT_PX, "yuv420p"
        stream.codec_context.time_base = Fraction(1, RATE_HZ)
        for index in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(draw_frame(index), format="rgb24")))
        container.mux(stream.encode(None))
    return path
