"""Where a frame's time goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

STAGES = (
    "decode",
    "preprocess",
    "queue",
    "encode_image",
    "attend_memory",
    "decode_masks",
    "readback",
    "encode_masklets",
    "write_memory",
)
"""Names and order as in `StageTimes` of the contract, the benchmarks' columns and the screen."""


class StageClock:
    """One frame's durations by stage, on the monotonic clock.

    Handed from thread to thread with the frame; never used by two at once.
    """

    def __init__(self, received_ns: int) -> None:
        self.received_ns = received_ns
        self.stage_ns: dict[str, int] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to a stage."""
        started_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter_ns() - started_ns)

    def add(self, stage: str, duration_ns: int) -> None:
        """Add a duration to a stage."""
        if stage not in STAGES:
            raise KeyError(stage)
        self.stage_ns[stage] = self.stage_ns.get(stage, 0) + duration_ns

    def elapsed_ns(self) -> int:
        """Measure the time since the frame was received."""
        return time.perf_counter_ns() - self.received_ns
