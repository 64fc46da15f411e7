"""What goes into the tracker and what comes out: plain values on the host."""

import enum
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

MOST_POINTS = 256
"""Of an object on a frame, prompts added up: the decoder attends to every one; far more than anyone taps, far
less than an attack."""


class ObjectState(enum.Enum):
    """Where an object is, as far as the tracker can tell."""

    VISIBLE = "visible"
    OCCLUDED = "occluded"
    """Absent for less than `lost_after_s`."""
    LOST = "lost"
    """Absent for longer; still looked for on every frame."""


class PromptMode(enum.Enum):
    """What a prompt does to an object that exists already."""

    REFINE = "refine"
    """Adds its points to those given on the same frame; the mask so far is the starting point."""
    REPLACE = "replace"
    """Forgets the object's memory and starts it anew."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Picture:
    """One decoded frame, already at the model's input size.

    Args:
        frame_id: the client's number of the frame.
        pixels: uint8 [S, S, 3] RGB, S the model's input size, from `preprocess.resize_to_model`.
        width_px: width of the source picture.
        height_px: height of the source picture.
        time_s: presentation time in seconds, the clock of `lost_after_s` and of candidate intervals.
        is_trusted: False after a gap or decoding error; such a frame is tracked, never remembered.
    """

    frame_id: int
    pixels: UInt8Array
    width_px: int
    height_px: int
    time_s: float
    is_trusted: bool = True


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prompt:
    """Where an object is on one frame: points, a box, points and a box, or a mask.

    Args:
        object_id: 1 to 65535, chosen by the client.
        frame_id: the frame that the prompt was drawn on.
        points: (x, y) in source pixels, origin top left.
        labels: one per point; 1 on the object, 0 off it.
        box: (x_min, y_min, x_max, y_max) in source pixels.
        mask: bool [H, W] in source pixels; excludes points and box.
        mode: what it does to an object that exists already.
    """

    object_id: int
    frame_id: int
    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()
    box: tuple[float, float, float, float] | None = None
    mask: BoolArray | None = None
    mode: PromptMode = PromptMode.REFINE


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Masklet:
    """One object on one frame.

    Args:
        object_id: the client's number, constant for the object's life.
        state: VISIBLE, OCCLUDED or LOST.
        mask_logits: float32 [h, w] at the network's mask resolution; above 0 is the object. All −32 when
            the object is absent.
        predicted_iou: 0 to 1, the network's estimate of the mask's overlap with the truth.
        presence: 0 to 1, probability that the object is in the picture.
        class_name: instrument class, "unknown" where the model has no semantic head or is unsure.
        class_probability: 0 to 1, 0 where the model has no semantic head.
        frames_since_seen: 0 while VISIBLE.
    """

    object_id: int
    state: ObjectState
    mask_logits: Float32Array
    predicted_iou: float
    presence: float
    class_name: str
    class_probability: float
    frames_since_seen: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FrameMasklets:
    """Everything the tracker says about one picture.

    Args:
        frame_id: the picture's.
        masklets: in the order in which the objects were added.
        is_trusted: the picture's flag, handed through.
        is_dropped: True when a newer picture replaced this one before the tracker saw it; no masklets then.
        stage_ns: duration of each stage by name: queue, encode_image, attend_memory, decode_masks,
            readback, write_memory (of the frame before, since it follows the reply). A GPU may encode a
            picture while the tick before it is answered; then they add up to more than its latency.
    """

    frame_id: int
    masklets: tuple[Masklet, ...] = ()
    is_trusted: bool = True
    is_dropped: bool = False
    stage_ns: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PromptOutcome:
    """A prompt that was applied.

    Args:
        frame_id: the frame it was applied to.
        masklet: the object on that frame.
    """

    frame_id: int
    masklet: Masklet
