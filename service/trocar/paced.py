"""A recorded input played at its own speed, as a camera would deliver it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trocar.sources import Source, SourceFrame


@dataclass(frozen=True, kw_only=True)
class PaceClock:
    """Time and sleep, replaceable in tests."""

    now_s: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep


class PacedSource:
    """Delivers each frame when it is due on an absolute schedule; never early, and late only if it must.

    Args:
        source: what to play; closed by its owner.
        frame_rate_hz: frames per second.
        clock: of the schedule.
    """

    def __init__(self, source: Source, frame_rate_hz: float, clock: PaceClock | None = None) -> None:
        self._source = source
        self._interval_s = 1 / frame_rate_hz
        self._clock = clock or PaceClock()
        self.codec = source.codec
        self.width_px, self.height_px = source.width_px, source.height_px
        self.color_matrix = source.color_matrix
        self.time_base = source.time_base
        self.frame_count = source.frame_count
        self.is_live = source.is_live

    def read(self) -> Iterator[SourceFrame]:
        """Frames of the source, each when it is due."""
        started_s = self._clock.now_s()
        for index, frame in enumerate(self._source.read()):
            wait_s = started_s + index * self._interval_s - self._clock.now_s()
            if wait_s > 0:
                self._clock.sleep(wait_s)
            yield frame

    def close(self) -> None:
        """Close the source."""
        self._source.close()
