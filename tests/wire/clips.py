"""Small clips for tests: a red disc moves over a dark background."""

from fractions import Fraction

import av
import cv2
import numpy as np

from trocar_engines.masklets import UInt8Array

WIDTH_PX, HEIGHT_PX = 160, 120
DISC_RADIUS_PX = 18
RATE = 30


def disc_center(index: int) -> tuple[int, int]:
    return 30 + 2 * (index % 50), 60


def draw_frame(index: int, width_px: int = WIDTH_PX, height_px: int = HEIGHT_PX) -> UInt8Array:
    frame = np.full((height_px, width_px, 3), 40, np.uint8)
    cv2.circle(frame, disc_center(index), DISC_RADIUS_PX, (220, 40, 40), -1)
    return frame


def draw_frames(count: int) -> list[UInt8Array]:
    return [draw_frame(index) for index in range(count)]


def encode_clip(
    frames: list[UInt8Array],
    *,
    encoder: str = "libx264",
    keyframe_interval: int = 10,
    has_b_frames: bool = False,
) -> list[bytes]:
    """Access units in Annex B form, one per frame."""
    context = av.CodecContext.create(encoder, "w")
    assert isinstance(context, av.VideoCodecContext)
    context.height, context.width = frames[0].shape[:2]
    context.pix_fmt = "yuv420p"
    context.time_base = Fraction(1, RATE)
    context.framerate = Fraction(RATE)
    context.gop_size = keyframe_interval
    context.options = (
        {"preset": "veryfast"} if has_b_frames else {"preset": "ultrafast", "tune": "zerolatency"}
    )
    if encoder == "libx265":
        context.options["x265-params"] = f"log-level=none:keyint={keyframe_interval}"
    packets = []
    for index, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts = index
        packets += context.encode(frame)
    packets += context.encode(None)
    return [bytes(packet) for packet in packets]


def encode_jpeg(pixels: UInt8Array) -> bytes:
    is_encoded, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    assert is_encoded
    return data.tobytes()
