"""How far the masks of two trackers lie apart on the same frames."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trocar_engines.masklets import Float32Array

COMPARED_FRAMES = 16
"""The prompted frame and those after it. Later ones tell little: a difference feeds on itself, since what a
tracker saw wrongly it remembers, and weights that learned nothing pull nothing back."""

Masks = dict[int, Float32Array | None]
"""By object_id: logits float32 [h, w], None where the tracker does not see the object."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitDifference:
    """How far two trackers lie apart.

    Args:
        per_frame: largest difference of a logit on each compared frame, the prompted one first; None where
            no object was visible to both.
        disagreements: objects that one of the two saw and the other did not, summed over frames.
        largest_logit: largest magnitude of a reference logit, to judge the difference by.
    """

    per_frame: tuple[float | None, ...]
    disagreements: int
    largest_logit: float

    @property
    def largest(self) -> float | None:
        """Over all frames; None where nothing was compared."""
        return max((one for one in self.per_frame if one is not None), default=None)


class MaskComparison:
    """Keeps the first masks of several trackers until they can be compared.

    Args:
        frames: how many are kept.
    """

    def __init__(self, frames: int = COMPARED_FRAMES) -> None:
        self._frames = frames
        self._masks: dict[str, dict[int, Masks]] = {}

    def record(self, tracker: str) -> Callable[[int, Masks], None]:
        """What takes the masks of a tracker, by frame."""
        kept = self._masks.setdefault(tracker, {})

        def take(frame_id: int, masks: Masks) -> None:
            if frame_id < self._frames:
                kept[frame_id] = masks

        return take

    def compare(self, tracker: str, reference: str) -> LogitDifference:
        """Compare the frames that both have seen."""
        ours, theirs = self._masks[tracker], self._masks[reference]
        per_frame: list[float | None] = []
        disagreements, largest_logit = 0, 0.0
        for frame_id in sorted(ours.keys() & theirs.keys()):
            differences = []
            for object_id, expected in theirs[frame_id].items():
                mask = ours[frame_id].get(object_id)
                if mask is None or expected is None:
                    disagreements += (mask is None) != (expected is None)
                    continue
                differences.append(float(np.abs(mask - expected).max()))
                largest_logit = max(largest_logit, float(np.abs(expected).max()))
            per_frame.append(max(differences, default=None))
        return LogitDifference(
            per_frame=tuple(per_frame), disagreements=disagreements, largest_logit=largest_logit
        )
