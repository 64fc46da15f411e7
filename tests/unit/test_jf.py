"""The metric on masks whose score can be worked out on paper.

A rectangle of h rows and w columns away from the border has 2 (h + w) contour pixels: rows one above its
first to its last, columns one left of its first to its last. On 100 x 100 pixels, contours may lie
ceil(0.008 · 141.4) = 2 pixels apart.
"""

import numpy as np
import pytest

from trocar_bench.jf import MaskletScore, MaskScore, score_mask
from trocar_engines.masklets import BoolArray

PERFECT, WORST = MaskScore(1.0, 1.0), MaskScore(0.0, 0.0)


def _rectangle(top: int, left: int, height: int, width: int, size_px: int = 100) -> BoolArray:
    mask = np.zeros((size_px, size_px), np.bool_)
    mask[top : top + height, left : left + width] = True
    return mask


EMPTY, SQUARE = _rectangle(0, 0, 0, 0), _rectangle(40, 40, 10, 10)


def test_identical_masks_are_perfect() -> None:
    assert score_mask(SQUARE, SQUARE) == PERFECT


def test_disjoint_masks_score_nothing() -> None:
    assert score_mask(SQUARE, _rectangle(40, 60, 10, 10)) == WORST


def test_shift_within_tolerance_costs_region_only() -> None:
    # 10 x 9 pixels shared of 10 x 11; no contour pixel moves by more than 1.
    assert score_mask(_rectangle(40, 41, 10, 10), SQUARE) == pytest.approx((9 / 11, 1.0))


def test_half_overlap() -> None:
    # Of the 60 predicted contour pixels those left of column 52 are found: 11 + 2 · 12. Of the 40 true ones
    # all but the middle of the right side, rows 42 to 46, which is more than 2 from the upper and lower side.
    precision, recall = 35 / 60, 35 / 40
    expected = 2 * precision * recall / (precision + recall)
    assert expected == pytest.approx(0.7)
    assert score_mask(_rectangle(40, 40, 10, 20), SQUARE) == pytest.approx((0.5, expected))


def test_predicted_and_true_masks_may_be_exchanged() -> None:
    wide = _rectangle(40, 40, 10, 20)
    assert score_mask(wide, SQUARE) == pytest.approx(score_mask(SQUARE, wide))


def test_two_empty_masks_agree() -> None:
    assert score_mask(EMPTY, EMPTY) == PERFECT


@pytest.mark.parametrize(("predicted", "truth"), [(EMPTY, SQUARE), (SQUARE, EMPTY)])
def test_one_empty_mask_scores_nothing(predicted: BoolArray, truth: BoolArray) -> None:
    assert score_mask(predicted, truth) == WORST


@pytest.mark.parametrize(("shift_px", "contour_accuracy"), [(2, 1.0), (3, 0.0)])
def test_contours_count_up_to_the_tolerance(shift_px: int, contour_accuracy: float) -> None:
    # The lower half of the picture: its contour is one line from border to border.
    lower, shifted = _rectangle(50, 0, 50, 100), _rectangle(50 + shift_px, 0, 50 - shift_px, 100)
    assert score_mask(shifted, lower) == ((50 - shift_px) / 50, contour_accuracy)


@pytest.mark.parametrize(("size_px", "tolerance_px"), [(88, 1), (89, 2), (176, 2), (177, 3)])
def test_tolerance_is_rounded_up(size_px: int, tolerance_px: int) -> None:
    # 0.008 · √2 · 88 = 0.996, 89: 1.007, 176: 1.991, 177: 2.003.
    half = size_px // 2

    def lower(top: int) -> BoolArray:
        return _rectangle(top, 0, size_px - top, size_px, size_px)

    assert score_mask(lower(half + tolerance_px), lower(half)).contour_accuracy == 1
    assert score_mask(lower(half + tolerance_px + 1), lower(half)).contour_accuracy == 0


def test_tolerance_is_a_disk() -> None:
    # The contour of one pixel is 2 x 2. Moved by (2, 2), one corner still lies within 2 (√2), the others
    # are √5 and more away; in a square of side 5 all four would count.
    assert score_mask(_rectangle(52, 52, 1, 1), _rectangle(50, 50, 1, 1)) == (0.0, 0.25)


def test_border_of_the_picture_is_no_contour() -> None:
    everything = _rectangle(0, 0, 100, 100)
    assert score_mask(everything, everything) == PERFECT
    # Neither has a contour, as in DAVIS: only the region tells them apart.
    assert score_mask(everything, EMPTY) == (0.0, 1.0)


def test_masks_at_the_border_keep_the_contour_they_have() -> None:
    # 50 x 50 in the corner: 50 contour pixels below it, 50 right of it, one of them shared: 99. A picture
    # wholly covered but for the same corner has the same contour.
    corner = _rectangle(0, 0, 50, 50)
    assert score_mask(~corner, corner) == (0.0, 1.0)
    # Rows 50 and 51 more: the lower line moves by 2, which is within reach.
    assert score_mask(_rectangle(0, 0, 52, 50), corner) == pytest.approx((50 / 52, 1.0))


def test_masks_of_different_size_are_refused() -> None:
    with pytest.raises(ValueError, match="as the truth"):
        score_mask(EMPTY, np.zeros((50, 50), np.bool_))


def test_masklet_counts_frames_after_its_prompt_that_have_truth() -> None:
    score = MaskletScore(prompted_frame=1)
    score.add(0, EMPTY, SQUARE)
    score.add(1, EMPTY, SQUARE)
    score.add(2, SQUARE, SQUARE)
    score.add(3, EMPTY, None)
    score.add(4, _rectangle(40, 40, 10, 20), SQUARE)
    assert score.scored_frames == 2
    assert score.region_similarity == pytest.approx(75)
    assert score.contour_accuracy == pytest.approx(85)
    assert score.jf == pytest.approx(80)


def test_absent_object_rewards_an_empty_mask() -> None:
    score = MaskletScore()
    score.add(1, EMPTY, EMPTY)
    score.add(2, SQUARE, EMPTY)
    assert score.jf == pytest.approx(50)
