"""Where to look for an object that is away: not only where its memory finds something.

Memory follows one thing. What comes back from another side is like the remembered pictures in parts only, and
the memory's mask lies on nothing, or on another object that is more like them than the object itself is.
Trackers for long videos therefore also search the whole picture (TLD, Kalal et al., PAMI 2012; LTMU, arXiv
2004.00305). Here a glance is a click where nobody has looked yet, the most alike point first: the decoder
makes a mask of it, and the gallery says whether that is the object (`Tracker._search`).
"""

import math
from collections import deque
from dataclasses import dataclass

import cv2
import numpy as np

from trocar_engines.masklets import BoolArray, Float32Array

GLANCE_INTERVAL_S = 0.05
"""Least time between two glances for one object; each costs as much as a frame of another object."""
GLANCE_MEMORY_S = 1.0
"""So long a place where a glance found another thing is not looked at again."""
LEAST_GLANCES = 8
"""So many glances are remembered for longer, lest a source of a picture a second be searched at one place."""
AROUND = 2
"""A glance also covers so many points to each side of its click, of the map it was chosen from."""
LARGEST_SHARE = 0.25
"""Of the picture. A larger mask is the background, and covers its click alone."""
TRIAL_S = 0.7
"""What a glance found is followed so long, unseen by anyone, until the looks at it have told what it is."""
LEAST_TRIAL_FRAMES = 3
"""A trial takes more: a look, and a frame to act on it, of a source of a picture a second."""
MOST_TRIAL_FRAMES = 100
"""And no more, where a clock stands still."""


@dataclass(kw_only=True, eq=False, slots=True)
class Trial:
    """What a glance found that is like the object.

    Args:
        point: of the glance, from `Search.choose_point`.
        mask: bool [h, w], what it found there.
        from_s: time of the picture, and `frames`, how many came since.
    """

    point: tuple[float, float]
    mask: BoolArray
    from_s: float
    frames: int = 0

    def is_over(self, time_s: float) -> bool:
        """Whether it had its time, in which looks at it could tell; some clocks are slow or stand still."""
        is_late = abs(time_s - self.from_s) > TRIAL_S or self.frames >= MOST_TRIAL_FRAMES
        return is_late and self.frames >= LEAST_TRIAL_FRAMES


class Search:
    """Glances for one object; times are those of the pictures, in seconds.

    `glances` counts them, `glanced_at_s` is when the last one was; `trial` is what is followed of what they
    found, or None.
    """

    def __init__(self) -> None:
        self.glanced_at_s, self.glances = -math.inf, 0
        self.trial: Trial | None = None
        self._covered: deque[tuple[float, BoolArray]] = deque()

    def choose_point(
        self, affinity: Float32Array, taken: BoolArray, time_s: float
    ) -> tuple[float, float] | None:
        """Where to glance, (x, y) as shares of the picture's sides; None where all has been looked at.

        Args:
            affinity: float32 [h, w], how much each point is like the object.
            taken: bool [m·h, m·w], where it is not looked for, such as the masks of other objects.
            time_s: of the picture.
        """
        self.glanced_at_s, self.glances = time_s, self.glances + 1
        while self._covered and self._is_forgotten(time_s - self._covered[0][0]):
            self._covered.popleft()
        height, width = affinity.shape
        # In the middle of what is alike rather than on its brightest point, which may lie on an edge.
        calm = cv2.blur(affinity, (3, 3))
        for mask in (taken, *(mask for _, mask in self._covered)):
            calm[shrink(mask, height, width)] = -np.inf
        best = int(calm.argmax())
        if calm.flat[best] == -np.inf:
            self._covered.clear()
            return None
        row, column = divmod(best, width)
        return (column + 0.5) / width, (row + 0.5) / height

    def _is_forgotten(self, age_s: float) -> bool:
        """Whether the oldest glance says nothing any more; a slow source's last ones do for longer."""
        return age_s < 0 or (age_s > GLANCE_MEMORY_S and len(self._covered) > LEAST_GLANCES)

    def reject(self, point: tuple[float, float], mask: BoolArray, time_s: float) -> None:
        """Do not look again soon where a glance found another thing.

        Args:
            point: of the glance, from `choose_point`.
            mask: bool [h, w], what it found.
            time_s: of the picture.
        """
        covered = np.zeros(mask.shape, np.bool_)
        if mask.mean() <= LARGEST_SHARE:
            covered |= cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        height, width = mask.shape
        row, column = int(point[1] * height), int(point[0] * width)
        around = 2 * AROUND
        covered[max(0, row - around) : row + around + 1, max(0, column - around) : column + around + 1] = True
        self._covered.append((time_s, covered))


def shrink(mask: BoolArray, height: int, width: int) -> BoolArray:
    """A mask of whole multiples of a size at that size; on where any of its points is."""
    blocks = mask.reshape(height, mask.shape[0] // height, width, mask.shape[1] // width)
    return np.asarray(blocks.any(axis=(1, 3)))
