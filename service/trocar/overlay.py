"""Masks drawn over a picture, for people: tint, outline and label."""

from collections.abc import Sequence

import cv2
import numpy as np

from trocar.client_core import TrackedObject
from trocar_engines.masklets import BoolArray, ObjectState, UInt8Array

COLORS = (
    (86, 180, 233),
    (240, 228, 66),
    (0, 158, 115),
    (255, 255, 255),
    (204, 121, 167),
    (0, 114, 178),
)
"""RGB: Okabe and Ito's palette for all kinds of colour vision, without what drowns in red tissue."""
TINT = 0.45
OUTLINE_DARK = (0, 0, 0)
PLATE = (24, 24, 24)
TEXT = (255, 255, 255)
FONT = cv2.FONT_HERSHEY_SIMPLEX


def color_of(object_id: int) -> tuple[int, int, int]:
    """Pick an object's colour: the same in every frame and every run."""
    return COLORS[(object_id - 1) % len(COLORS)]


def draw_overlay(rgb: UInt8Array, objects: Sequence[TrackedObject], *, note: str = "") -> UInt8Array:
    """Draw objects over a copy of the picture.

    Args:
        rgb: uint8 [H, W, 3].
        objects: whose masks have the picture's size.
        note: about the picture as a whole.

    Returns:
        uint8 [H, W, 3].
    """
    canvas = rgb.copy()
    scale = max(0.4, rgb.shape[0] / 1_080)
    for tracked in objects:
        _tint(canvas, tracked.mask, color_of(tracked.object_id), scale)
    for row, tracked in enumerate(one for one in objects if one.box is None):
        _write(
            canvas, describe(tracked), (10, int(44 * scale) * (row + 1)), color_of(tracked.object_id), scale
        )
    for tracked in objects:
        if tracked.box is not None:
            x, y = int(tracked.box[0]), int(tracked.box[1]) - int(8 * scale)
            _write(canvas, describe(tracked), (x, y), color_of(tracked.object_id), scale)
    if note:
        _write(canvas, note, (10, rgb.shape[0]), TEXT, scale)
    return canvas


def describe(tracked: TrackedObject) -> str:
    """Say an object's id, class, state and score in a few words."""
    name = "" if tracked.class_name in ("", "unknown") else f" {tracked.class_name}"
    if tracked.state is ObjectState.VISIBLE:
        return f"{tracked.object_id}{name} {tracked.predicted_iou:.2f}"
    return f"{tracked.object_id}{name} {tracked.state.value}"


def _tint(canvas: UInt8Array, mask: BoolArray, color: tuple[int, int, int], scale: float) -> None:
    rows = np.flatnonzero(mask.any(axis=1))
    if rows.size == 0 or mask.shape != canvas.shape[:2]:
        return
    band = slice(int(rows[0]), int(rows[-1]) + 1)
    inside = mask[band]
    tinted = canvas[band][inside] * (1 - TINT) + np.array(color) * TINT
    canvas[band][inside] = tinted.astype(np.uint8)
    contours, _ = cv2.findContours(inside.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    offset = (0, int(rows[0]))
    shifted = [contour + np.array(offset, contour.dtype) for contour in contours]
    # Dark under light: one of the two stands out on wet highlights and on dark tissue alike.
    cv2.drawContours(canvas, shifted, -1, OUTLINE_DARK, max(2, round(4 * scale)), cv2.LINE_AA)
    cv2.drawContours(canvas, shifted, -1, color, max(1, round(2 * scale)), cv2.LINE_AA)


def _write(
    canvas: UInt8Array, text: str, place: tuple[int, int], color: tuple[int, int, int], scale: float
) -> None:
    """Write on a dark plate: legible on highlights, tissue and steel alike; a stripe tells the object."""
    thickness = max(1, round(2 * scale))
    (width, height), baseline = cv2.getTextSize(text, FONT, scale, thickness)
    margin = max(3, round(6 * scale))
    plate_width, plate_height = width + 3 * margin, height + baseline + margin
    left = min(max(0, place[0]), max(0, canvas.shape[1] - plate_width))
    top = min(max(0, place[1] - plate_height), max(0, canvas.shape[0] - plate_height))
    cv2.rectangle(canvas, (left, top), (left + plate_width, top + plate_height), PLATE, cv2.FILLED)
    cv2.rectangle(canvas, (left, top), (left + margin, top + plate_height), color, cv2.FILLED)
    corner = (left + 2 * margin, top + height + margin // 2)
    cv2.putText(canvas, text, corner, FONT, scale, TEXT, thickness, cv2.LINE_AA)
