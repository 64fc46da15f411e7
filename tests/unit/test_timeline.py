"""What counts as presence, absence, return and change of identity, on clips of a few frames."""

import math

import numpy as np
import pytest

from trocar_bench.davis import ObjectFacts
from trocar_bench.figures import ObjectResult, bootstrap, compare, mean_jf, sum_up
from trocar_bench.timeline import Timeline
from trocar_engines.masklets import BoolArray, UInt8Array

RATE_HZ = 10.0
HERE, THERE = slice(2, 12), slice(20, 30)
"""Columns of the object and of the other one."""


def _labels(*, own: bool, other: bool = False) -> UInt8Array:
    labels = np.zeros((16, 40), np.uint8)
    if own:
        labels[2:12, HERE] = 1
    if other:
        labels[2:12, THERE] = 2
    return labels


def _mask(where: slice | None) -> BoolArray:
    mask = np.zeros((16, 40), np.bool_)
    if where is not None:
        mask[2:12, where] = True
    return mask


def _play(script: str, facts: ObjectFacts | None = None) -> Timeline:
    """A timeline of a frame per letter, the first of which is the prompted one.

    o: the object is seen and found, m: seen and missed, a: absent, and so is the mask, g: absent, a mask on
    nothing, t: absent, the other one is taken for it, s: seen, but the other one taken for it.
    """
    timeline = Timeline(1, 0, RATE_HZ, facts)
    for frame, letter in enumerate(script):
        labels = _labels(own=letter in "oms", other=letter in "ts")
        where = {"o": HERE, "g": HERE, "t": THERE, "s": THERE}.get(letter)
        timeline.add(frame, _mask(where), labels, "hook", 0.8)
    return timeline


def test_prompted_frame_is_not_scored() -> None:
    assert [record.frame for record in _play("ooo").records] == [1, 2]


def test_empty_mask_of_an_absent_object_is_right_but_says_nothing_of_visible_frames() -> None:
    timeline = _play("ommaa")
    assert mean_jf(timeline.scored) == pytest.approx(50)
    assert mean_jf(timeline.visible) == 0


def test_presence_precision_and_recall() -> None:
    timeline = _play("ooomag")
    assert timeline.presence_precision == pytest.approx(2 / 3)
    assert timeline.presence_recall == pytest.approx(2 / 3)


def test_sliver_at_the_border_is_neither_present_nor_absent() -> None:
    timeline = Timeline(1, 0, RATE_HZ)
    labels = np.zeros((100, 100), np.uint8)
    labels[0, :3] = 1  # 3 of 10,000 pixels
    timeline.add(1, np.zeros((100, 100), np.bool_), labels)
    assert timeline.presence_recall is None
    assert not timeline.absences


def test_absence_of_half_a_second_counts_and_flicker_does_not() -> None:
    assert [absence[:2] for absence in _play("ooaaaao").absences] == []
    assert [absence[:2] for absence in _play("ooaaaaao").absences] == [(2, 7)]
    assert [absence[:2] for absence in _play("ooaaaaa").absences] == [(2, None)]


def test_time_to_find_counts_from_the_return() -> None:
    timeline = _play("oaaaaammmoo" + "aaaaammm")
    assert timeline.seconds_to_find == [pytest.approx(0.3), math.inf]
    figures = sum_up([ObjectResult(clip="a", timeline=timeline)], ())
    assert (figures.returns, figures.returns_found) == (2, 50)
    assert figures.seconds_to_find == pytest.approx(0.3)


def test_return_is_not_found_on_the_next_visit() -> None:
    assert _play("oaaaaamm" + "aaaaaoo").seconds_to_find == [math.inf, 0]


def test_run_on_another_object_is_a_switch_and_a_slip_is_not() -> None:
    assert _play("oosooooo").switches == []
    assert _play("oosssooo").switches == [2]
    assert _play("oosssooosss").switches == [2, 8]


def test_mask_over_both_objects_is_no_switch() -> None:
    timeline = Timeline(1, 0, RATE_HZ)
    for frame in range(6):
        timeline.add(frame, _mask(HERE) | _mask(THERE), _labels(own=True, other=True))
    assert timeline.switches == []


def test_switch_is_charged_to_the_absence_it_follows() -> None:
    timeline = _play("oo" + "aaaaa" + "oo" + "atttt" + "mm" + "aaaaa" + "oo")
    assert len(timeline.absences) == 3
    assert timeline.switched_absences == 1


def test_ambiguous_object_may_stay_lost_but_may_not_be_confused() -> None:
    facts = ObjectFacts(is_ambiguous=True)
    stays_lost = _play("oooaaaaammmm", facts)
    assert mean_jf(stays_lost.visible) == 100
    assert stays_lost.presence_recall == 1
    assert stays_lost.seconds_to_find == []
    assert _play("oooaaaaaoooo", facts).switched_absences == 0
    confused = _play("oooattttssss", facts)
    assert confused.switched_absences == 1
    assert confused.presence_precision is not None
    assert confused.presence_precision < 1


def test_class_is_judged_where_the_mask_lies_on_the_object() -> None:
    timeline = _play("oommoo", ObjectFacts(class_name="hook"))
    assert timeline.told_classes == [("hook", 0.8)] * 3
    figures = sum_up([ObjectResult(clip="a", timeline=timeline)], ("hook",))
    assert figures.class_accuracy == 100
    assert figures.class_calibration_error == pytest.approx(0.2)


def test_unknown_class_is_asked_of_objects_apart_only() -> None:
    facts = ObjectFacts(class_name="fan_retractor", is_apart=True)
    figures = sum_up([ObjectResult(clip="a", timeline=_play("oooo", facts))], ("hook",))
    assert (figures.class_accuracy, figures.unknown_share) == (None, 0)


def _results(*scripts: str) -> list[ObjectResult]:
    return [ObjectResult(clip=str(index), timeline=_play(script)) for index, script in enumerate(scripts)]


def test_bootstrap_repeats_and_holds_the_mean() -> None:
    results = _results("oooo", "ommm", "oomm", "ooom")
    first, second = (bootstrap(results, lambda one: mean_jf(one.timeline.visible)) for _ in range(2))
    assert first is not None
    assert first == second
    assert 0 <= first[0] < 50 < first[1] <= 100


def test_one_clip_has_no_interval() -> None:
    results = [ObjectResult(clip="a", timeline=_play(script)) for script in ("oooo", "ommm")]
    assert bootstrap(results, lambda one: mean_jf(one.timeline.visible)) is None


def test_gain_is_paired() -> None:
    # Clips differ more than rows do: only object by object is the gain certain.
    gain = compare(
        _results("ommmo", "ooooo", "omoom"), _results("ommmm", "oooom", "omomm"), lambda one: one.visible
    )
    assert gain is not None
    assert gain.points == pytest.approx(25)
    assert gain.interval is not None
    assert list(gain.interval) == pytest.approx([25, 25])


def test_predicted_iou_and_presence_are_held_against_the_truth() -> None:
    timeline = Timeline(1, 0, RATE_HZ)
    for frame, (own, told, presence) in enumerate(
        [(True, 0.0, 0.0), (True, 0.9, 0.95), (True, 0.7, 0.95), (False, 0.9, 0.15)]
    ):
        timeline.add(frame, _mask(HERE), _labels(own=own), predicted_iou=told, presence=presence)
    figures = sum_up([ObjectResult(clip="one", timeline=timeline)], ())
    assert figures.iou_calibration_error == pytest.approx(0.2), "J is 1 where 0.9 and 0.7 were predicted"
    assert [tuple(one) for one in figures.iou_calibration] == [(0.7, 1.0, 1.0), (0.9, 1.0, 1.0)]
    assert figures.presence_calibration_error == pytest.approx((0.05 + 0.05 + 0.15) / 3)
    assert figures.good_iou == pytest.approx(0.75), "a quarter of the way from 0.7 to 0.9"


def test_what_a_method_does_not_say_is_not_held_against_it() -> None:
    figures = sum_up([ObjectResult(clip="one", timeline=_play("ooo"))], ())
    assert (figures.iou_calibration, figures.iou_calibration_error, figures.good_iou) == ((), None, None)
    assert figures.presence_calibration_error is None
