"""What became of one object over a clip: how well its mask fits, whether it is present, and who it is."""

import math
from bisect import bisect_left
from collections.abc import Iterator
from functools import cached_property
from statistics import fmean
from typing import NamedTuple

import numpy as np

from trocar_bench.davis import ObjectFacts
from trocar_bench.jf import score_mask
from trocar_engines.masklets import BoolArray, UInt8Array

LEAST_SHARE = 0.0005
"""Of the picture (65 of 480x270 pixels). An object of which less shows is neither present nor absent, and a
mask that shares less with another object does not lie on it."""
LEAST_ABSENCE_S = 0.5
"""Shorter gaps are flicker, or another object passing by."""
FOUND_J = 0.5
"""An object is found again on the first frame whose mask fits so well."""
LEAST_SWITCH_S = 0.2
"""A mask that lies on another object for less is a slip, not a change of identity."""


class FrameRecord(NamedTuple):
    """One frame of one object.

    Args:
        frame: place in the clip.
        region_similarity: J, 0 to 1.
        contour_accuracy: F, 0 to 1.
        true_px: pixels of the truth.
        mask_px: pixels of the mask.
        rival: object whose truth the mask covers more of than of its own, 0 for none.
        class_name: as told, "unknown" included.
        class_probability: 0 to 1.
        predicted_iou: 0 to 1, what the tracker believes of its mask; NaN for a method that does not tell.
        presence: 0 to 1, likewise.
    """

    frame: int
    region_similarity: float
    contour_accuracy: float
    true_px: int
    mask_px: int
    rival: int
    class_name: str
    class_probability: float
    predicted_iou: float
    presence: float


class Absence(NamedTuple):
    """A time without the object.

    Args:
        begin: place in the clip of the first frame without it.
        back: of the frame that shows it again; None when it does not return.
        until: of the first frame of its next absence, or of the clip's end.
    """

    begin: int
    back: int | None
    until: int


class Timeline:
    """Everything that is scored of one object; only frames after its prompt, only those with truth.

    Of an object that `is_ambiguous`, frames that show it after its first absence are not scored: whether the
    tracker takes it back or leaves it LOST, it may be right. What counts there is whether another object was
    taken for it.

    Args:
        object_id: value in the masks.
        prompted_frame: place in the clip of the frame on which it was prompted.
        frame_rate_hz: of the clip.
        facts: what is known of it.
    """

    def __init__(
        self, object_id: int, prompted_frame: int, frame_rate_hz: float, facts: ObjectFacts | None = None
    ) -> None:
        self.object_id, self.prompted_frame = object_id, prompted_frame
        self.frame_rate_hz = frame_rate_hz
        self.facts = facts or ObjectFacts()
        self.records: list[FrameRecord] = []
        self._least_px = 1

    def add(
        self,
        frame: int,
        mask: BoolArray,
        labels: UInt8Array,
        class_name: str = "",
        class_probability: float = 0.0,
        predicted_iou: float = math.nan,
        presence: float = math.nan,
    ) -> None:
        """Score one frame, unless it is the prompted one or an earlier one.

        Args:
            frame: place in the clip, greater than any before.
            mask: bool [H, W], what the tracker says.
            labels: uint8 [H, W], the true object of every pixel.
            class_name: what the tracker says of its class.
            class_probability: 0 to 1.
            predicted_iou: 0 to 1, what it says of its mask.
            presence: 0 to 1, whether it says that the object is there.
        """
        if frame <= self.prompted_frame:
            return
        truth = labels == self.object_id
        self._least_px = max(1, round(LEAST_SHARE * labels.size))
        score = score_mask(mask, truth)
        record = FrameRecord(
            frame=frame,
            region_similarity=score.region_similarity,
            contour_accuracy=score.contour_accuracy,
            true_px=int(np.count_nonzero(truth)),
            mask_px=int(np.count_nonzero(mask)),
            rival=self._find_rival(labels[mask]),
            class_name=class_name,
            class_probability=class_probability,
            predicted_iou=predicted_iou,
            presence=presence,
        )
        self.records.append(record)

    def _find_rival(self, covered: UInt8Array) -> int:
        """Object that has more of the mask than its own, 0 for none."""
        shares = np.bincount(covered, minlength=256)
        own = shares[self.object_id]
        shares[[0, self.object_id]] = 0
        rival = int(shares.argmax())
        return rival if shares[rival] > own and shares[rival] >= self._least_px else 0

    # --- masks ------------------------------------------------------------------------------------------

    @cached_property
    def scored(self) -> list[FrameRecord]:
        """Frames on which there is a right mask."""
        if not self.facts.is_ambiguous or not self.absences:
            return self.records
        first = self.absences[0].begin
        return [record for record in self.records if record.frame < first or record.true_px == 0]

    @property
    def visible(self) -> list[FrameRecord]:
        """Scored frames that show the object."""
        return [record for record in self.scored if record.true_px]

    # --- presence ---------------------------------------------------------------------------------------

    def _is_shown(self, record: FrameRecord) -> bool:
        return record.true_px >= self._least_px

    @property
    def presence_precision(self) -> float | None:
        """Of the frames with a mask, the share that shows the object; None without such a frame."""
        clear = [record for record in self.scored if self._is_shown(record) or not record.true_px]
        return _mean(record.true_px > 0 for record in clear if record.mask_px)

    @property
    def presence_recall(self) -> float | None:
        """Of the frames that show the object, the share with a mask; None without such a frame."""
        return _mean(record.mask_px > 0 for record in self.scored if self._is_shown(record))

    # --- identity ---------------------------------------------------------------------------------------

    @cached_property
    def absences(self) -> list[Absence]:
        """Absences of `LEAST_ABSENCE_S` and longer, in order."""
        spans: list[tuple[int, int | None]] = []
        begin: int | None = None
        for record in self.records:
            if begin is None and record.true_px == 0:
                begin = record.frame
            elif begin is not None and self._is_shown(record):
                spans.append((begin, record.frame))
                begin = None
        end = self.records[-1].frame + 1 if self.records else 0
        if begin is not None:
            spans.append((begin, None))
        shortest = LEAST_ABSENCE_S * self.frame_rate_hz
        spans = [(first, back) for first, back in spans if (back or end) - first >= shortest]
        following = [first for first, _ in spans[1:]] + [end]
        return [Absence(first, back, until) for (first, back), until in zip(spans, following, strict=False)]

    @cached_property
    def switches(self) -> list[int]:
        """First frames of the runs on which the mask lies on another object."""
        starts: list[int] = []
        run: list[FrameRecord] = []
        for record in [*self.records, None]:
            if record is not None and record.rival:
                run.append(record)
                continue
            if len(run) > 1 and run[-1].frame - run[0].frame >= LEAST_SWITCH_S * self.frame_rate_hz:
                starts.append(run[0].frame)
            run = []
        return starts

    @property
    def switched_absences(self) -> int:
        """Absences in or after which, until the next one, another object was taken for this one."""
        return sum(
            any(absence.begin <= start < absence.until for start in self.switches)
            for absence in self.absences
        )

    @cached_property
    def seconds_to_find(self) -> list[float]:
        """For every return that a tracker can know, how long it took to find the object; inf for never."""
        if self.facts.is_ambiguous:
            return []
        return [
            self._seek(absence.back, absence.until) for absence in self.absences if absence.back is not None
        ]

    def _seek(self, back: int, until: int) -> float:
        first = bisect_left(self.records, back, key=lambda record: record.frame)
        for record in self.records[first:]:
            if record.frame >= until:
                break
            if record.region_similarity >= FOUND_J:
                return (record.frame - back) / self.frame_rate_hz
        return math.inf

    # --- class ------------------------------------------------------------------------------------------

    @property
    def told_classes(self) -> list[tuple[str, float]]:
        """Name and probability on every frame on which the mask lies on the object."""
        return [
            (record.class_name, record.class_probability)
            for record in self.records
            if record.true_px and record.region_similarity >= FOUND_J
        ]

    # --- what the tracker believes ----------------------------------------------------------------------

    @property
    def told_iou(self) -> list[tuple[float, float]]:
        """Predicted IoU and J on every scored frame with a mask that shows the object."""
        return [(record.predicted_iou, record.region_similarity) for record in self.visible if record.mask_px]

    @property
    def told_presence(self) -> list[tuple[float, float]]:
        """Presence and truth, 1 or 0, on every scored frame that clearly shows the object or none of it."""
        return [
            (record.presence, float(record.true_px > 0))
            for record in self.scored
            if self._is_shown(record) or not record.true_px
        ]


def _mean(facts: Iterator[bool]) -> float | None:
    values = list(facts)
    return fmean(values) if values else None
