"""Time per stage of a tick: by the host's clock where it computes, by events of a GPU where it launches."""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

import torch

READBACK = "readback"
"""The stage in which the host waits for the device."""


class StageClock(Protocol):
    """Made when a tick begins; laps follow each other without a gap."""

    def lap(self, stage: str) -> None:
        """Charge what was asked of the device since the last lap to `stage`; stages that repeat add up."""

    def read(self) -> dict[str, int]:
        """Durations in ns; on a GPU of the stages that are done, which after a readback are all before it."""


class HostClock:
    """See `StageClock`; of a device whose calls return when the work is done."""

    def __init__(self) -> None:
        self._durations: dict[str, int] = {}
        self._last_ns = time.perf_counter_ns()

    def lap(self, stage: str) -> None:
        """See `StageClock.lap`."""
        now_ns = time.perf_counter_ns()
        self._durations[stage] = self._durations.get(stage, 0) + now_ns - self._last_ns
        self._last_ns = now_ns

    def read(self) -> dict[str, int]:
        """See `StageClock.read`."""
        return dict(self._durations)


class Event(Protocol):
    """A mark in a device's queue of work."""

    def record(self) -> None:
        """Put it behind all that was asked for."""

    def query(self) -> bool:
        """Whether the device has come past it."""

    def elapsed_time(self, end_event: Any, /) -> float:
        """Device time from this mark to another one that both are past, ms."""


def make_cuda_event() -> Event:
    """A mark in the current CUDA stream."""
    return torch.cuda.Event(enable_timing=True)


class DeviceClock:
    """See `StageClock`; of a GPU, whose calls return when the work is queued.

    `readback` is what the host spends beyond the other stages: waiting for the device to begin, launching,
    copying. So the stages add up to the tick as the host sees it.

    Args:
        make_event: of the device.
    """

    def __init__(self, make_event: Callable[[], Event] = make_cuda_event) -> None:
        self._make_event = make_event
        self._began_ns = time.perf_counter_ns()
        self._waited_ns: int | None = None
        self._marks: list[tuple[str, Event]] = []
        self._mark("")

    def lap(self, stage: str) -> None:
        """See `StageClock.lap`."""
        if stage == READBACK:
            self._waited_ns = time.perf_counter_ns() - self._began_ns
        self._mark(stage)

    def _mark(self, stage: str) -> None:
        event = self._make_event()
        event.record()
        self._marks.append((stage, event))

    def read(self) -> dict[str, int]:
        """See `StageClock.read`."""
        durations: dict[str, int] = {}
        for (_, before), (stage, after) in pairwise(self._marks):
            if stage != READBACK and after.query():
                durations[stage] = durations.get(stage, 0) + round(before.elapsed_time(after) * 1e6)
        if self._waited_ns is not None:
            durations[READBACK] = max(0, self._waited_ns - sum(durations.values()))
        return durations
