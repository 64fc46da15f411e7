"""Means over objects, and how sure they are: a bootstrap over clips."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, median
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trocar_bench.timeline import FrameRecord, Timeline
from trocar_engines.tracked import UNKNOWN_CLASS

RESAMPLES = 2_000
BOOTSTRAP_SEED = 0
INTERVAL = (2.5, 97.5)
"""Percentiles of the resampled means: 95% lie between."""
CALIBRATION_BINS = 10
GOOD_J, GOOD_QUANTILE = 0.75, 0.25

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectResult:
    """One object under one configuration.

    Args:
        clip: name.
        timeline: of the tracker.
    """

    clip: str
    timeline: Timeline


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Means over objects; None where there was nothing to measure.

    Args:
        objects: how many.
        j: region similarity, 0 to 100.
        f: contour accuracy, 0 to 100.
        jf: mean of both; an empty mask of an absent object counts 100.
        jf_visible: the same over frames that show the object.
        jf_interval: of jf.
        jf_visible_interval: of jf_visible.
        presence_precision: 0 to 100.
        presence_recall: 0 to 100.
        switches: how often another object was taken for one of these.
        absences: of `timeline.LEAST_ABSENCE_S` and longer.
        switched_absences: 0 to 100, the share in or after which that happened.
        returns: that a tracker can know.
        returns_found: 0 to 100.
        seconds_to_find: median over the returns that were found.
        class_accuracy: 0 to 100, mean over objects whose class the model knows.
        class_calibration_error: 0 to 1, expected calibration error over the frames with a named class.
        unknown_share: 0 to 100, frames called unknown of objects whose class the model does not know.
        iou_calibration_error: 0 to 1, of the predicted IoU over frames with a mask that show the object.
        iou_calibration: the curve, for every tenth of the predicted IoU: its mean there, the mean J, frames.
        presence_calibration_error: 0 to 1, of the presence over frames that clearly show the object or none.
        good_iou: the lower quartile of the predicted IoU over frames whose J is `GOOD_J` and more: what a
            frame should be believed to have before it becomes a long-term memory.
    """

    objects: int
    j: float | None
    f: float | None
    jf: float | None
    jf_visible: float | None
    jf_interval: Interval | None
    jf_visible_interval: Interval | None
    presence_precision: float | None
    presence_recall: float | None
    switches: int
    absences: int
    switched_absences: float | None
    returns: int
    returns_found: float | None
    seconds_to_find: float | None
    class_accuracy: float | None
    class_calibration_error: float | None
    unknown_share: float | None
    iou_calibration_error: float | None
    iou_calibration: tuple[tuple[float, float, float], ...]
    presence_calibration_error: float | None
    good_iou: float | None


def mean_j(records: Sequence[FrameRecord]) -> float | None:
    """Mean J, 0 to 100."""
    return _mean(100 * record.region_similarity for record in records)


def mean_f(records: Sequence[FrameRecord]) -> float | None:
    """Mean F, 0 to 100."""
    return _mean(100 * record.contour_accuracy for record in records)


def mean_jf(records: Sequence[FrameRecord]) -> float | None:
    """Mean of J and F, 0 to 100."""
    return _mean(50 * (record.region_similarity + record.contour_accuracy) for record in records)


def sum_up(results: Sequence[ObjectResult], known_classes: Sequence[str]) -> Figures:
    """Figures over objects.

    Args:
        results: of one configuration.
        known_classes: those of the model.
    """
    timelines = [result.timeline for result in results]
    seconds = [second for timeline in timelines for second in timeline.seconds_to_find]
    found = [second for second in seconds if math.isfinite(second)]
    absences = sum(len(timeline.absences) for timeline in timelines)
    switched = sum(timeline.switched_absences for timeline in timelines)
    known = [timeline for timeline in timelines if timeline.facts.class_name in known_classes]
    novel = [timeline for timeline in timelines if timeline.facts.is_apart]
    judged = [pair for timeline in timelines for pair in timeline.told_iou]
    iou_curve = calibrate(judged)
    good = [told for told, true in judged if true >= GOOD_J and math.isfinite(told)]
    return Figures(
        objects=len(timelines),
        j=_mean(mean_j(timeline.scored) for timeline in timelines),
        f=_mean(mean_f(timeline.scored) for timeline in timelines),
        jf=_mean(mean_jf(timeline.scored) for timeline in timelines),
        jf_visible=_mean(mean_jf(timeline.visible) for timeline in timelines),
        jf_interval=bootstrap(results, lambda one: mean_jf(one.timeline.scored)),
        jf_visible_interval=bootstrap(results, lambda one: mean_jf(one.timeline.visible)),
        presence_precision=_percent(_mean(timeline.presence_precision for timeline in timelines)),
        presence_recall=_percent(_mean(timeline.presence_recall for timeline in timelines)),
        switches=sum(len(timeline.switches) for timeline in timelines),
        absences=absences,
        switched_absences=100 * switched / absences if absences else None,
        returns=len(seconds),
        returns_found=100 * len(found) / len(seconds) if seconds else None,
        seconds_to_find=median(found) if found else None,
        class_accuracy=_percent(_mean(_share_told(one, one.facts.class_name) for one in known)),
        class_calibration_error=_calibration_error(calibrate(_classes_told(known))),
        unknown_share=_percent(_mean(_share_told(one, UNKNOWN_CLASS) for one in novel)),
        iou_calibration_error=_calibration_error(iou_curve),
        iou_calibration=tuple(iou_curve),
        presence_calibration_error=_calibration_error(
            calibrate(pair for timeline in timelines for pair in timeline.told_presence)
        ),
        good_iou=float(np.quantile(good, GOOD_QUANTILE)) if good else None,
    )


class Bin(NamedTuple):
    """A tenth of the range of something said with a probability: means of both, and how often."""

    told: float
    true: float
    frames: float


def calibrate(pairs: Iterable[tuple[float, float]]) -> list[Bin]:
    """How probable something was said to be against how true it was, both 0 to 1; empty bins are left out."""
    told = [pair for pair in pairs if math.isfinite(pair[0])]
    if not told:
        return []
    said, true = (np.array(column, np.float64) for column in zip(*told, strict=True))
    bins: npt.NDArray[np.int64] = np.minimum(said * CALIBRATION_BINS, CALIBRATION_BINS - 1).astype(int)
    counts = np.bincount(bins)
    sums = np.bincount(bins, weights=said), np.bincount(bins, weights=true)
    return [
        Bin(
            float(sums[0][place] / counts[place]), float(sums[1][place] / counts[place]), float(counts[place])
        )
        for place in np.flatnonzero(counts)
    ]


def _calibration_error(curve: Sequence[Bin]) -> float | None:
    """Expected calibration error: mean distance between what was said and what was true."""
    total = sum(one.frames for one in curve)
    return sum(abs(one.told - one.true) * one.frames for one in curve) / total if curve else None


def _classes_told(timelines: Iterable[Timeline]) -> Iterator[tuple[float, float]]:
    for timeline in timelines:
        for name, probability in timeline.told_classes:
            if name != UNKNOWN_CLASS:
                yield probability, float(name == timeline.facts.class_name)


def bootstrap(
    results: Sequence[ObjectResult], measure: Callable[[ObjectResult], float | None]
) -> Interval | None:
    """The interval of a mean over objects when clips are drawn anew, with replacement.

    Args:
        results: those of a clip follow one another.
        measure: of one object; None leaves it out.

    Returns:
        None with fewer than two clips that were measured.
    """
    sums, counts = [], []
    for _, group in groupby(results, key=lambda result: result.clip):
        values = [value for value in map(measure, group) if value is not None]
        if values:
            sums.append(sum(values))
            counts.append(len(values))
    if len(sums) < 2:
        return None
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = rng.integers(len(sums), size=(RESAMPLES, len(sums)))
    means = np.array(sums)[drawn].sum(axis=1) / np.array(counts)[drawn].sum(axis=1)
    low, high = np.percentile(means, INTERVAL).tolist()
    return low, high


class Gain(NamedTuple):
    """How much better one configuration is than another on the same objects, in points of J&F."""

    points: float
    interval: Interval | None


def compare(
    results: Sequence[ObjectResult],
    baseline: Sequence[ObjectResult],
    select: Callable[[Timeline], Sequence[FrameRecord]],
) -> Gain | None:
    """Gain over a baseline, object by object.

    Args:
        results: of one configuration.
        baseline: of the other, the same objects in the same order.
        select: the frames that count.
    """

    def difference(pair: tuple[ObjectResult, ObjectResult]) -> float | None:
        ours, theirs = (mean_jf(select(one.timeline)) for one in pair)
        return None if ours is None or theirs is None else ours - theirs

    differences = {id(pair[0]): difference(pair) for pair in zip(results, baseline, strict=True)}
    points = _mean(differences.values())
    return None if points is None else Gain(points, bootstrap(results, lambda one: differences[id(one)]))


def _share_told(timeline: Timeline, name: str) -> float | None:
    return _mean(float(told == name) for told, _ in timeline.told_classes)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
