"""J&F, the metric of DAVIS (Perazzi et al., CVPR 2016), written once.

J, region similarity, is the overlap of two masks. F, contour accuracy, is the F-measure of their boundaries,
where a boundary pixel counts as found when the other boundary passes within 0.8% of the picture's diagonal.
J judges the body, F the outline: missing the jaws of a grasper costs little J, a shaft drawn one pixel too
wide little F.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from trocar_engines.masklets import BoolArray, UInt8Array

TOLERANCE_OF_DIAGONAL = 0.008
"""How far boundaries may lie apart: 8 pixels at 854x480, 18 at 1080p."""


class MaskScore(NamedTuple):
    """How well one mask fits another, each 0 to 1."""

    region_similarity: float
    contour_accuracy: float


def score_mask(predicted: BoolArray, truth: BoolArray) -> MaskScore:
    """J and F of one object on one frame; two empty masks agree perfectly.

    Args:
        predicted: bool [H, W].
        truth: bool [H, W].

    Raises:
        ValueError: the masks differ in size.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"predicted mask {predicted.shape}: expected {truth.shape}, as the truth")
    window = _find_window(predicted | truth)
    if window is None:
        return MaskScore(1.0, 1.0)
    predicted, truth, diagonal = predicted[window], truth[window], math.hypot(*truth.shape)
    overlap, union = np.count_nonzero(predicted & truth), np.count_nonzero(predicted | truth)
    return MaskScore(overlap / union, _score_contours(predicted, truth, diagonal))


class MaskletScore:
    """J, F and J&F of one object over the frames after its prompt, each 0 to 100.

    DAVIS' own script leaves out the last frame of a clip as well; here it counts.

    Args:
        prompted_frame: place in the clip of the frame whose truth the tracker was shown.
    """

    def __init__(self, prompted_frame: int = 0) -> None:
        self.prompted_frame = prompted_frame
        self._scores: list[MaskScore] = []

    def add(self, frame: int, predicted: BoolArray, truth: BoolArray | None) -> None:
        """Score one frame, unless it is the prompted one, an earlier one, or one without truth."""
        if frame > self.prompted_frame and truth is not None:
            self._scores.append(score_mask(predicted, truth))

    @property
    def scored_frames(self) -> int:
        """Frames that count; the means below need one."""
        return len(self._scores)

    @property
    def region_similarity(self) -> float:
        """Mean J."""
        return 100 * sum(score.region_similarity for score in self._scores) / self.scored_frames

    @property
    def contour_accuracy(self) -> float:
        """Mean F."""
        return 100 * sum(score.contour_accuracy for score in self._scores) / self.scored_frames

    @property
    def jf(self) -> float:
        """Mean of J and F."""
        return (self.region_similarity + self.contour_accuracy) / 2


def _find_window(either: BoolArray) -> tuple[slice, slice] | None:
    """Rows and columns that hold every mask and boundary pixel; None where there is none.

    A boundary pixel may lie one above or left of its mask. One more row and column of background below and
    right keeps the window's own border from being taken for the picture's.
    """
    rows, columns = np.flatnonzero(either.any(axis=1)), np.flatnonzero(either.any(axis=0))
    if rows.size == 0:
        return None
    return slice(max(0, rows[0] - 1), rows[-1] + 2), slice(max(0, columns[0] - 1), columns[-1] + 2)


def _score_contours(predicted: BoolArray, truth: BoolArray, diagonal: float) -> float:
    disk = _disk(math.ceil(TOLERANCE_OF_DIAGONAL * diagonal))
    predicted_contour, true_contour = _find_contour(predicted), _find_contour(truth)
    if not (predicted_contour.any() and true_contour.any()):
        return float(predicted_contour.any() == true_contour.any())
    precision = _share_near(predicted_contour, true_contour, disk)
    recall = _share_near(true_contour, predicted_contour, disk)
    return 2 * precision * recall / (precision + recall) if precision and recall else 0.0


def _share_near(contour: UInt8Array, other: UInt8Array, disk: UInt8Array) -> float:
    """Share of the pixels of one contour that the other passes within reach of."""
    reached = np.asarray(cv2.dilate(other, disk), np.uint8)
    return np.count_nonzero(contour & reached) / np.count_nonzero(contour)


def _find_contour(mask: BoolArray) -> UInt8Array:
    """uint8 [H, W], 1 where a pixel differs from the one right, below, or right below of it.

    Where a mask meets the picture's border it has no contour: what lies beyond is not known.
    """
    below, right = mask[1:] ^ mask[:-1], mask[:, 1:] ^ mask[:, :-1]
    contour = np.zeros(mask.shape, np.bool_)
    contour[:-1] |= below
    contour[:, :-1] |= right
    contour[:-1, :-1] |= mask[1:, 1:] ^ mask[:-1, :-1]
    return contour.view(np.uint8)


@lru_cache
def _disk(radius_px: int) -> UInt8Array:
    """uint8 [2r + 1, 2r + 1], 1 where the centre is at most r pixels away."""
    y, x = np.ogrid[-radius_px : radius_px + 1, -radius_px : radius_px + 1]
    disk: UInt8Array = (x * x + y * y <= radius_px * radius_px).astype(np.uint8)
    return disk
