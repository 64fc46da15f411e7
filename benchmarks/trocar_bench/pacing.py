"""When the next frame of a stream may go, and from which moment its latency counts.

Two disciplines, as different as a camera and a file. A camera does not wait: frame i is due at start + i/fps,
whatever became of the frames before it. A load generator that waits for answers before it asks again, or that
counts latency from the moment it got round to asking, slows down together with the system it measures and
reports the few good moments in between; Gil Tene named it coordinated omission. `OpenLoop` therefore counts
from the absolute schedule: a server that stalls for a second owes every frame of that second its share.

A file waits: `BackPressure` sends the next frame once there is room, which gives the throughput. Its latency
counts from sending, and tells how long the pipeline is rather than how late a picture is.
"""

import threading
import time
from collections.abc import Callable
from typing import Protocol

Clock = Callable[[], int]
"""Monotonic, ns."""
Sleep = Callable[[float], None]
"""Waits for seconds."""
NS_PER_S = 1_000_000_000
LONGEST_SLEEP_S = 0.1
"""So that a stopped source notices."""


class Pacing(Protocol):
    """One stream's source of frames; `wait` belongs to the sender, the rest to anybody."""

    def start(self, at_ns: int) -> None:
        """Set when the first frame is due."""

    def wait(self) -> int | None:
        """Wait for the next frame's turn.

        Returns:
            The moment from which its latency counts, ns; None after `stop`.
        """

    def settle(self) -> None:
        """Say that a frame was answered, dropped or lost."""

    def stop(self) -> None:
        """Let nobody wait any more."""


class OpenLoop:
    """An absolute schedule: late frames go at once, and their latency counts from when they were due.

    Args:
        fps: frames per second.
        clock: monotonic, ns.
        sleep: of the same clock.
    """

    def __init__(self, fps: float, *, clock: Clock = time.perf_counter_ns, sleep: Sleep = time.sleep) -> None:
        self._fps = fps
        self._clock = clock
        self._sleep = sleep
        self._is_stopped = False
        self._start_ns = 0
        self._frame = 0

    def start(self, at_ns: int) -> None:
        """See `Pacing.start`."""
        self._start_ns = at_ns

    def wait(self) -> int | None:
        """See `Pacing.wait`."""
        # From the start each time: adding up a rounded period would drift.
        due_ns = self._start_ns + round(self._frame * NS_PER_S / self._fps)
        self._frame += 1
        # Not `Event.wait`: it counts from when it gets round to it, and just after a frame was sent everybody
        # else wants this core. Measured with one core for all: 4.3 ms late in the median, 0.1 ms with this.
        while not self._is_stopped and (early_ns := due_ns - self._clock()) > 0:
            self._sleep(min(early_ns / NS_PER_S, LONGEST_SLEEP_S))
        return None if self._is_stopped else due_ns

    def settle(self) -> None:
        """See `Pacing.settle`; a camera does not care."""

    def stop(self) -> None:
        """See `Pacing.stop`."""
        self._is_stopped = True


class BackPressure:
    """As many frames on their way as the receiver takes, and the next one when one of them is settled.

    Args:
        window: frames on their way at most.
        clock: monotonic, ns.
    """

    def __init__(self, window: int, *, clock: Clock = time.perf_counter_ns) -> None:
        self._clock = clock
        self._room = threading.Semaphore(window)
        self._is_stopped = False

    def start(self, at_ns: int) -> None:
        """See `Pacing.start`; the first frame goes as soon as anybody asks."""

    def wait(self) -> int | None:
        """See `Pacing.wait`."""
        self._room.acquire()
        return None if self._is_stopped else self._clock()

    def settle(self) -> None:
        """See `Pacing.settle`."""
        self._room.release()

    def stop(self) -> None:
        """See `Pacing.stop`."""
        self._is_stopped = True
        self._room.release()
