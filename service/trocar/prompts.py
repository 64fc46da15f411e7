"""Prompt messages to values, checked against the picture that they were drawn on."""

import math

from trocar.config import LARGEST_OBJECT_ID
from trocar.errors import MaskDataError
from trocar.masklet_codec import EncodedMask, MaskEncoding, decode_mask
from trocar.v1 import tracking_pb2 as pb
from trocar_engines.errors import InvalidPromptError
from trocar_engines.masklets import MOST_POINTS, BoolArray, Prompt, PromptMode

LABELS = {pb.POINT_LABEL_ON_OBJECT: 1, pb.POINT_LABEL_OFF_OBJECT: 0}
MODES = {
    pb.PROMPT_MODE_UNSPECIFIED: PromptMode.REFINE,
    pb.PROMPT_MODE_REFINE: PromptMode.REFINE,
    pb.PROMPT_MODE_REPLACE: PromptMode.REPLACE,
}
ENCODINGS = {
    pb.MASK_ENCODING_RLE: MaskEncoding.RLE,
    pb.MASK_ENCODING_PACKED_BITS: MaskEncoding.PACKED_BITS,
}


def read_prompt(message: pb.Prompt, width_px: int, height_px: int) -> Prompt:
    """Turn a prompt message into a value.

    Args:
        message: as received.
        width_px: of the picture that the prompt was drawn on.
        height_px: of that picture.

    Raises:
        InvalidPromptError: it makes no sense on that picture; the text says what was received and expected.
    """
    _check_object_id(message.object_id)
    if message.mode not in MODES:
        raise InvalidPromptError(f"mode {message.mode}: expected PROMPT_MODE_REFINE or PROMPT_MODE_REPLACE")
    has_box, has_mask = message.HasField("box"), message.HasField("mask")
    if has_mask and (message.points or has_box):
        raise InvalidPromptError("a mask together with points or a box: send either the mask or the others")
    if not (message.points or has_box or has_mask):
        raise InvalidPromptError("the prompt is empty: send points, a box or a mask")
    if len(message.points) > MOST_POINTS:
        raise InvalidPromptError(f"{len(message.points)} points: expected at most {MOST_POINTS}; send fewer")
    return Prompt(
        object_id=message.object_id,
        frame_id=message.frame_id,
        points=tuple(_read_place(point, width_px, height_px) for point in message.points),
        labels=tuple(_read_label(point) for point in message.points),
        box=_read_box(message.box, width_px, height_px) if has_box else None,
        mask=_read_mask(message.mask, width_px, height_px) if has_mask else None,
        mode=MODES[message.mode],
    )


def _check_object_id(object_id: int) -> None:
    if not 1 <= object_id <= LARGEST_OBJECT_ID:
        raise InvalidPromptError(f"object_id {object_id}: expected 1 to {LARGEST_OBJECT_ID}")


def _read_place(point: pb.Point, width_px: int, height_px: int) -> tuple[float, float]:
    # NaN fails every comparison, so it is refused here too.
    if not (0 <= point.x < width_px and 0 <= point.y < height_px):
        raise InvalidPromptError(
            f"point ({point.x:g}, {point.y:g}) is outside the {width_px}x{height_px} picture: expected "
            f"source pixels, 0 <= x < {width_px} and 0 <= y < {height_px}"
        )
    return point.x, point.y


def _read_label(point: pb.Point) -> int:
    if point.label not in LABELS:
        raise InvalidPromptError(
            f"point ({point.x:g}, {point.y:g}) has label {point.label}: expected POINT_LABEL_ON_OBJECT (1) "
            "or POINT_LABEL_OFF_OBJECT (2)"
        )
    return LABELS[point.label]


def _read_box(box: pb.Box, width_px: int, height_px: int) -> tuple[float, float, float, float]:
    corners = (box.x_min, box.y_min, box.x_max, box.y_max)
    text = f"box ({', '.join(f'{corner:g}' for corner in corners)})"
    if not all(math.isfinite(corner) for corner in corners):
        raise InvalidPromptError(f"{text}: expected finite numbers")
    if box.x_min >= box.x_max:
        raise InvalidPromptError(f"{text}: x_max must exceed x_min")
    if box.y_min >= box.y_max:
        raise InvalidPromptError(f"{text}: y_max must exceed y_min")
    if box.x_min < 0 or box.y_min < 0 or box.x_max > width_px or box.y_max > height_px:
        raise InvalidPromptError(
            f"{text} leaves the {width_px}x{height_px} picture: cut it to (0, 0, {width_px}, {height_px})"
        )
    return corners


def _read_mask(message: pb.Mask, width_px: int, height_px: int) -> BoolArray:
    if (message.width_px, message.height_px) != (width_px, height_px):
        raise InvalidPromptError(
            f"mask of {message.width_px}x{message.height_px} on a picture of {width_px}x{height_px}: send "
            "the mask in the picture's size"
        )
    if message.encoding not in ENCODINGS:
        raise InvalidPromptError(
            f"mask encoding {message.encoding}: expected MASK_ENCODING_RLE or MASK_ENCODING_PACKED_BITS"
        )
    encoded = EncodedMask(
        width_px=width_px, height_px=height_px, encoding=ENCODINGS[message.encoding], data=message.data
    )
    try:
        mask = decode_mask(encoded)
    except MaskDataError as error:
        raise InvalidPromptError(str(error)) from error
    if not mask.any():
        raise InvalidPromptError("the mask has no object pixels: mark at least one")
    return mask
