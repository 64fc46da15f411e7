"""What became of every frame, and what that comes to: rates, windows, percentiles, slopes."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import linear_regression

import numpy as np
import numpy.typing as npt

from trocar.telemetry import STAGES
from trocar_engines.errors import TrocarError

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

WINDOWS = 5
"""Stretches of a run that are compared: a figure that changes under one's hands is none."""
UNSTEADY_SPREAD = 0.1
"""Between the fastest and the slowest window; beyond it the run is flagged."""
NEVER = -1
AFTER_REPLY = "write_memory"
"""The one stage that a reply does not wait for; what is reported with a frame is that of the frame before."""
OF_OTHERS = ("decode", "queue", "encode_image", "attend_memory", "decode_masks", "readback")
"""Decoding, tracking and the wait for either: the rest of a frame's time is what the service adds."""


class NothingTrackedError(TrocarError):
    """A stream got no result at all: an overload beyond measure."""


class FrameLog:
    """What became of the frames of one stream. Thread safe, as long as each frame is noted by one thread.

    Args:
        warmup: frames 0 to `warmup` don't count: the one that objects are prompted on, and so many more.
        frames: that count, after these.
    """

    def __init__(self, *, warmup: int, frames: int) -> None:
        self.warmup = warmup
        count = 1 + warmup + frames
        self.due_ns: Int64Array = np.full(count, NEVER, np.int64)
        self.sent_ns: Int64Array = np.full(count, NEVER, np.int64)
        self.received_ns: Int64Array = np.full(count, NEVER, np.int64)
        self.service_ns: Int64Array = np.full(count, NEVER, np.int64)
        self.stage_ns: dict[str, Int64Array] = {}
        self.reported: set[int] = set()
        self.settled = 0
        self.masklets = self.visible_masklets = 0
        self._counting = threading.Lock()

    @property
    def is_warm(self) -> bool:
        """Whether every frame that does not count is settled."""
        return self.settled > self.warmup

    def note_sent(self, frame_id: int, due_ns: int, sent_ns: int) -> None:
        """Note the moment from which a frame's latency counts, and that at which it went."""
        self.due_ns[frame_id] = due_ns
        self.sent_ns[frame_id] = sent_ns

    def note_result(
        self,
        frame_id: int,
        received_ns: int,
        stage_ns: Mapping[str, int],
        *,
        masklets: int,
        visible_masklets: int,
        service_ns: int = NEVER,
    ) -> None:
        """Note that a frame's masklets came.

        Args:
            frame_id: whose.
            received_ns: when.
            stage_ns: durations by name.
            masklets: objects on it.
            visible_masklets: those of them that are VISIBLE.
            service_ns: service latency; without a service there is none.
        """
        self.received_ns[frame_id] = received_ns
        self.service_ns[frame_id] = service_ns
        for stage, duration_ns in stage_ns.items():
            if stage not in self.stage_ns:
                self.stage_ns[stage] = np.full_like(self.due_ns, NEVER)
            self.stage_ns[stage][frame_id] = duration_ns
        with self._counting:
            self.settled += 1
            if frame_id > self.warmup:
                self.masklets += masklets
                self.visible_masklets += visible_masklets

    def note_dropped(self, frame_ids: Iterable[int]) -> None:
        """Note frames of which we were told that no result will come."""
        with self._counting:
            told = set(frame_ids) - self.reported
            self.reported |= told
            self.settled += len(told)

    def counted(self, values: Int64Array) -> Int64Array:
        """Values of the frames that count and were answered."""
        first = self.warmup + 1
        counted: Int64Array = values[first:][self.received_ns[first:] != NEVER]
        return counted

    def beyond(self, stages: Iterable[str], whole_ns: Int64Array) -> Int64Array:
        """What is left of durations without some stages; of the frames that count and were answered."""
        rest_ns = whole_ns.copy()
        for stage in stages:
            if stage in self.stage_ns:
                rest_ns -= self.stage_ns[stage]
        return self.counted(rest_ns)

    @property
    def missing(self) -> set[int]:
        """Frames that count and have no result."""
        unanswered = np.flatnonzero(self.received_ns[self.warmup + 1 :] == NEVER)
        return {self.warmup + 1 + int(place) for place in unanswered}


@dataclass(frozen=True, kw_only=True, slots=True)
class Percentiles:
    """Of a duration, ms."""

    p50: float
    p95: float
    p99: float
    p99_9: float
    max: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Timeline:
    """Latency over time, of every frame that counts and was answered, stream after stream.

    Args:
        at_s: from the start of the run to when the frame was due (paced) or sent (unpaced).
        latency_ms: from then to its result.
    """

    at_s: Float64Array
    latency_ms: Float64Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Added:
    """What the service adds to decoding and tracking, and to the wait for them, ms.

    Args:
        server: of service latency: fitting pictures to the network, coding masks, hops between threads.
        client: from sent to received, so with both transports and the client's own work.
        between: the part of `server` that no stage accounts for.
    """

    server: Percentiles
    client: Percentiles
    between: Percentiles


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What a run comes to.

    Args:
        fps: results a second, all streams together.
        window_fps: the same in each of `WINDOWS` consecutive parts of the run; empty when it was too short.
        dropped_ids: frames that got no result, of each stream.
        unreported: those of them of which nobody told us; anything but 0 is a defect of the service.
        source_late_ms: from due to sent, a part of the latency that is our own: of a camera it would be 0.
        latency_ms: from due (paced) or sent (unpaced) to received.
        service_latency_ms: as the server measured it; None without a service.
        stages_ms: of each stage that ran, in the order of the design.
        added_ms: what the service adds; None without one.
        visible_share: of the masklets, those with a mask; None without objects.
        timeline: latency of each frame.
    """

    fps: float
    window_fps: tuple[float, ...]
    dropped_ids: tuple[tuple[int, ...], ...]
    unreported: int
    source_late_ms: Percentiles
    latency_ms: Percentiles
    service_latency_ms: Percentiles | None
    stages_ms: dict[str, Percentiles]
    added_ms: Added | None
    visible_share: float | None
    timeline: Timeline

    @property
    def dropped(self) -> int:
        """Frames that got no result, of all streams."""
        return sum(len(frame_ids) for frame_ids in self.dropped_ids)

    @property
    def fps_spread(self) -> float | None:
        """Fastest minus slowest window, as a share of the median one."""
        return measure_spread(self.window_fps) if self.window_fps else None

    @property
    def is_unsteady(self) -> bool:
        """Whether the windows differ too much for `fps` to mean anything."""
        return self.fps_spread is not None and self.fps_spread > UNSTEADY_SPREAD


def sum_up(logs: Sequence[FrameLog], started_ns: int) -> Figures:
    """Put the streams of a run together.

    Args:
        logs: one per stream.
        started_ns: when the first frame after frame 0 was due.

    Raises:
        NothingTrackedError: a stream got no result at all.
    """
    if any(log.counted(log.received_ns).size == 0 for log in logs):
        raise NothingTrackedError(
            "no frame that counts was tracked: ask for more frames, or for fewer a second"
        )
    ticks = find_ticks(logs, started_ns)
    service = _collect_ms(log.counted(log.service_ns) for log in logs if (log.service_ns != NEVER).any())
    latency_ms = _collect_ms(log.counted(log.received_ns - log.due_ns) for log in logs)
    due_ms = _collect_ms(log.counted(log.due_ns - started_ns) for log in logs)
    masklets = sum(log.masklets for log in logs)
    return Figures(
        fps=rate(ticks),
        window_fps=tuple(window_rates(ticks)),
        dropped_ids=tuple(tuple(sorted(log.missing)) for log in logs),
        unreported=sum(len(log.missing - log.reported) for log in logs),
        source_late_ms=percentiles(_collect_ms(log.counted(log.sent_ns - log.due_ns) for log in logs)),
        latency_ms=percentiles(latency_ms),
        service_latency_ms=percentiles(service) if service.size else None,
        stages_ms=_sum_up_stages(logs),
        added_ms=_sum_up_added(logs) if service.size else None,
        visible_share=sum(log.visible_masklets for log in logs) / masklets if masklets else None,
        timeline=Timeline(at_s=due_ms / 1e3, latency_ms=latency_ms),
    )


def find_ticks(logs: Sequence[FrameLog], started_ns: int) -> Int64Array:
    """Moments at which results came while every stream ran; before them, the moment from which they count.

    A stream that is still warming up, or done before the others, leaves them more of the machine than they
    are to be measured with.
    """
    warm_ns = [int(log.received_ns[: log.warmup + 1].max()) if log.warmup else started_ns for log in logs]
    began_ns = max(warm_ns)
    ended_ns = min(int(log.received_ns.max()) for log in logs)
    received = np.concatenate([log.counted(log.received_ns) for log in logs])
    during = received[(received > began_ns) & (received <= ended_ns)]
    return np.concatenate([np.array([began_ns], np.int64), np.sort(during)])


def rate(ticks: Int64Array) -> float:
    """Frames per second between the first tick, which opens the first interval, and the last."""
    if len(ticks) < 2 or ticks[-1] == ticks[0]:
        return 0.0
    return (len(ticks) - 1) * 1e9 / float(ticks[-1] - ticks[0])


def window_rates(ticks: Int64Array, windows: int = WINDOWS) -> list[float]:
    """Rates of consecutive parts with equally many frames; none when a part would have fewer than two.

    By count, not by time: a part of 2 s at 45 frames/s would be off by 1% for where its edges fall.
    """
    if len(ticks) - 1 < 2 * windows:
        return []
    edges = np.linspace(0, len(ticks) - 1, windows + 1).round().astype(int)
    return [rate(ticks[first : last + 1]) for first, last in pairwise(edges)]


def measure_spread(rates: Sequence[float]) -> float:
    """Largest minus smallest, as a share of the median."""
    return (max(rates) - min(rates)) / float(np.median(rates))


def percentiles(values_ms: Float64Array) -> Percentiles:
    """p50, p95, p99, p99.9 and maximum; values between two ranks are interpolated."""
    p50, p95, p99, p99_9, largest = np.percentile(values_ms, [50, 95, 99, 99.9, 100]).tolist()
    return Percentiles(p50=p50, p95=p95, p99=p99, p99_9=p99_9, max=largest)


def slope_per_object(ms_by_objects: Sequence[tuple[int, float]]) -> float | None:
    """Milliseconds that each further object takes: the least-squares line through the runs.

    Args:
        ms_by_objects: number of objects and milliseconds, of each run.

    Returns:
        None when fewer than two numbers of objects were run.
    """
    objects, ms = [float(count) for count, _ in ms_by_objects], [duration for _, duration in ms_by_objects]
    return linear_regression(objects, ms).slope if len(set(objects)) > 1 else None


def _sum_up_stages(logs: Sequence[FrameLog]) -> dict[str, Percentiles]:
    stages = {}
    for stage in STAGES:
        durations = _collect_ms(log.counted(log.stage_ns[stage]) for log in logs if stage in log.stage_ns)
        if durations.size:
            stages[stage] = percentiles(durations)
    return stages


def _sum_up_added(logs: Sequence[FrameLog]) -> Added:
    answered = {stage for log in logs for stage in log.stage_ns} - {AFTER_REPLY}
    return Added(
        server=percentiles(_collect_ms(log.beyond(OF_OTHERS, log.service_ns) for log in logs)),
        client=percentiles(_collect_ms(log.beyond(OF_OTHERS, log.received_ns - log.sent_ns) for log in logs)),
        between=percentiles(_collect_ms(log.beyond(answered, log.service_ns) for log in logs)),
    )


def _collect_ms(durations_ns: Iterable[Int64Array]) -> Float64Array:
    return np.concatenate([np.empty(0), *(durations / 1e6 for durations in durations_ns)])
