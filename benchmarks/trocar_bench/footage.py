"""What a speed run shows the tracker: a short held-out scene, rendered once, played to and fro without a cut.

A cut would make the tracker lose its objects, and lost objects are cheaper to encode than visible ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Protocol

import av
import numpy as np

from trocar_engines.masklets import UInt8Array
from trocar_engines.training.clicks import farthest_point
from trocar_engines.training.scenes import demo_scene

FOOTAGE_FRAMES = 48
"""1.6 s of the demo scene, before its second instrument leaves."""
SCENE_FRAMES = 600
FRAME_RATE_HZ = 30
CLICK_SPACING_SHARE = 1 / 12
"""Of the height, between two clicks on one instrument: about its width."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Footage:
    """Pictures of one scene, and where to click on the first.

    Args:
        pictures: uint8 [H, W, 3] RGB each, in order.
        labels: uint8 [H, W] of the first picture; 0 is background.
    """

    pictures: tuple[UInt8Array, ...]
    labels: UInt8Array

    @property
    def width_px(self) -> int:
        """Width of every picture."""
        return int(self.labels.shape[1])

    @property
    def height_px(self) -> int:
        """Height of every picture."""
        return int(self.labels.shape[0])

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Index of the picture at each place of one round: to the last one and back to the second."""
        last = len(self.pictures) - 1
        return (*range(last + 1), *range(last - 1, 0, -1))

    @cached_property
    def packets(self) -> tuple[bytes, ...]:
        """One round as H.264 access units, as `encode` makes them; the first is the only keyframe."""
        return self.encode(keyframe_interval=len(self.places))

    def encode(self, *, keyframe_interval: int) -> tuple[bytes, ...]:
        """One round as H.264 access units in Annex B form, one per place; the first is a keyframe.

        Set like a camera's hardware encoder: no B-frames, which hold pictures back, and one slice a picture,
        so that decoding costs the same wherever the footage was encoded.
        """
        context = av.CodecContext.create("libx264", "w")
        assert isinstance(context, av.VideoCodecContext)
        context.width, context.height, context.pix_fmt = self.width_px, self.height_px, "yuv420p"
        context.framerate = Fraction(FRAME_RATE_HZ)
        context.time_base = 1 / context.framerate
        context.gop_size = keyframe_interval
        context.thread_count = 1
        context.options = {
            "preset": "veryfast",
            "tune": "zerolatency",
            "crf": "20",
            "x264-params": "scenecut=0",
        }
        packets = []
        for time, place in enumerate(self.places):
            frame = av.VideoFrame.from_ndarray(self.pictures[place], format="rgb24")
            frame.pts = time
            packets += context.encode(frame)
        packets += context.encode(None)
        assert len(packets) == len(self.places), "an encoder without B-frames answers each picture at once"
        return tuple(bytes(packet) for packet in packets)


class Render(Protocol):
    """Makes footage."""

    def __call__(self, width_px: int, height_px: int, *, on_frame: Callable[[], None]) -> Footage:
        """See `render_footage`."""


def render_footage(width_px: int, height_px: int, *, on_frame: Callable[[], None]) -> Footage:
    """Render `FOOTAGE_FRAMES` pictures of two instruments, in a palette that training never sees.

    Args:
        width_px: even, as H.264 wants it.
        height_px: even.
        on_frame: called after each, for progress.
    """
    scene = demo_scene(
        height_px=height_px, width_px=width_px, frames=SCENE_FRAMES, frame_rate=float(FRAME_RATE_HZ)
    )
    pictures: list[UInt8Array] = []
    labels: list[UInt8Array] = []
    for index in range(FOOTAGE_FRAMES):
        picture, label = scene.render(index)
        pictures.append(picture.numpy())
        labels.append(label.numpy())
        on_frame()
    return Footage(pictures=tuple(pictures), labels=labels[0])


def spread_clicks(labels: UInt8Array, objects: int) -> list[tuple[float, float]]:
    """(x, y) for each object, in turn on every label; further ones on a label lie apart from those before.

    Args:
        labels: uint8 [H, W] with at least one label above 0.
        objects: how many clicks.
    """
    spacing_px = labels.shape[0] * CLICK_SPACING_SHARE
    rows, columns = np.ogrid[: labels.shape[0], : labels.shape[1]]
    masks = [labels == label for label in np.unique(labels[labels > 0])]
    free = [mask.copy() for mask in masks]
    clicks = []
    for number in range(objects):
        index = number % len(masks)
        # A label that is used up begins anew: two objects on one place cost as much as on two.
        point = farthest_point(free[index]) or farthest_point(masks[index])
        assert point is not None, "a label has pixels"
        x, y = point
        free[index] &= (columns - x) ** 2 + (rows - y) ** 2 > spacing_px**2
        clicks.append((float(x), float(y)))
    return clicks
