"""One run: all streams at once, each fed by a thread of its own, watched by the one that asked."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from trocar_bench.footage import FRAME_RATE_HZ
from trocar_bench.frame_log import Figures, FrameLog, sum_up
from trocar_bench.pacing import NS_PER_S, BackPressure, OpenLoop, Pacing
from trocar_bench.process_meter import CpuReading, CpuUse, ProcessMeter, compare

WATCH_INTERVAL_S = 0.1
LEAD_NS = NS_PER_S // 20
"""From the order to start to the first frame: every thread stands ready by then."""
LEAST_CPU_STRETCH_S = 1.0
"""The kernel counts CPU time in ticks of 10 ms: a shorter stretch says little."""
SETTLED_FRAMES = 1_000
"""Memory that a stream takes for its first frames is its own; what it takes later is a leak."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """What to run.

    Args:
        mode: "engine" or "service".
        objects: on each stream.
        streams: at once.
        paced_fps: frames a second that each stream's camera delivers; 0 sends as fast as they are taken.
        frames: of each stream that count.
        warmup: of each stream before these.
    """

    mode: str
    objects: int
    streams: int
    paced_fps: float
    frames: int
    warmup: int

    @property
    def is_live(self) -> bool:
        """Delivery LATEST: what waits when its successor comes is dropped."""
        return self.paced_fps > 0

    @property
    def rate_hz(self) -> float:
        """The streams' own clock, by which the tracker's memory goes."""
        return self.paced_fps or float(FRAME_RATE_HZ)

    @property
    def frame_ids(self) -> range:
        """Frames after frame 0."""
        return range(1, 1 + self.warmup + self.frames)

    def make_pacing(self, window: int) -> Pacing:
        """The source of one stream.

        Args:
            window: frames on their way at most, where nothing is dropped.
        """
        return OpenLoop(self.paced_fps) if self.is_live else BackPressure(window)

    def make_log(self) -> FrameLog:
        """The log of one stream."""
        return FrameLog(warmup=self.warmup, frames=self.frames)

    def find_offset_ns(self, stream: int) -> int:
        """How much later than the first a stream starts: cameras are not in step with each other."""
        return round(stream * NS_PER_S / (self.paced_fps * self.streams)) if self.is_live else 0


class Lane(Protocol):
    """One stream of a run."""

    log: FrameLog
    pacing: Pacing

    def begin(self) -> None:
        """Track frame 0 and prompt every object on it.

        Raises:
            TrocarError: the stream or a prompt was refused.
        """

    def send(self, frame_id: int) -> None:
        """Send a frame."""

    def finish(self) -> None:
        """Wait until every frame is settled.

        Raises:
            TrocarError: the stream broke.
        """

    def close(self) -> None:
        """Let go of the stream at once; may be called twice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a run took of the machine.

    Args:
        cpu: while the frames that count were on their way; of all frames when that took but a moment.
        rss_mb: most memory of the server; None without one.
        rss_growth_mb: of the server's memory after the first `SETTLED_FRAMES`; None when it ran no longer.
    """

    cpu: CpuUse
    rss_mb: float | None
    rss_growth_mb: float | None


class Watch:
    """What is seen of a run from outside, and tells how far it is.

    Args:
        meter: of the processes.
        on_progress: called with the settled frames of the slowest stream.
    """

    def __init__(self, meter: ProcessMeter, on_progress: Callable[[int], None]) -> None:
        self._meter = meter
        self._on_progress = on_progress
        self._began = meter.read_cpu()
        self._warm: CpuReading | None = None
        self._settled_rss_mb: float | None = None

    def begin(self) -> None:
        """Before the first frame."""
        self._meter.reset_peak()
        self._began = self._meter.read_cpu()

    def look(self, logs: Sequence[FrameLog]) -> None:
        """Look once; called several times a second."""
        settled = min(log.settled for log in logs)
        if self._warm is None and all(log.is_warm for log in logs):
            self._warm = self._meter.read_cpu()
        if self._settled_rss_mb is None and settled >= SETTLED_FRAMES:
            self._settled_rss_mb = self._meter.read_rss_mb()
        self._on_progress(settled)

    def end(self) -> Usage:
        """After the last result."""
        now, warm = self._meter.read_cpu(), self._warm
        is_long = warm is not None and now.at_s - warm.at_s >= LEAST_CPU_STRETCH_S
        rss_mb, settled_mb = self._meter.read_rss_mb(), self._settled_rss_mb
        return Usage(
            cpu=compare(warm if warm and is_long else self._began, now),
            rss_mb=self._meter.read_peak_mb(),
            rss_growth_mb=None if rss_mb is None or settled_mb is None else rss_mb - settled_mb,
        )


class SpeedRun:
    """Feeds every lane until all is settled.

    Args:
        plan: what to run.
        open_lane: opens one of its streams.
        watch: looks on.
    """

    def __init__(self, plan: RunPlan, open_lane: Callable[[RunPlan], Lane], watch: Watch) -> None:
        self._plan = plan
        self._open_lane = open_lane
        self._watch = watch
        self._lanes: list[Lane] = []
        self._failures: list[BaseException] = []

    def run(self) -> tuple[Figures, Usage]:
        """Run.

        Raises:
            TrocarError: a stream was refused or broke.
        """
        with ExitStack() as resources:
            for _ in range(self._plan.streams):
                lane = self._open_lane(self._plan)
                resources.callback(lane.close)
                self._lanes.append(lane)
                lane.begin()
            self._watch.begin()
            started_ns = self._feed_all()
            usage = self._watch.end()
        return sum_up([lane.log for lane in self._lanes], started_ns), usage

    def _feed_all(self) -> int:
        started_ns = time.perf_counter_ns() + LEAD_NS
        threads = []
        for number, lane in enumerate(self._lanes):
            lane.pacing.start(started_ns + self._plan.find_offset_ns(number))
            threads.append(threading.Thread(target=self._feed, args=(lane,), name=f"bench-source-{number}"))
        for thread in threads:
            thread.start()
        try:
            self._look_on(threads)
        finally:
            if any(thread.is_alive() for thread in threads):
                for lane in self._lanes:
                    lane.close()
            for thread in threads:
                thread.join()
        if self._failures:
            raise self._failures[0]
        return started_ns

    def _look_on(self, threads: Sequence[threading.Thread]) -> None:
        logs = [lane.log for lane in self._lanes]
        while any(thread.is_alive() for thread in threads) and not self._failures:
            self._watch.look(logs)
            time.sleep(WATCH_INTERVAL_S)
        self._watch.look(logs)

    def _feed(self, lane: Lane) -> None:
        try:
            for frame_id in self._plan.frame_ids:
                due_ns = lane.pacing.wait()
                if due_ns is None:
                    break
                lane.log.note_sent(frame_id, due_ns, time.perf_counter_ns())
                lane.send(frame_id)
            lane.finish()
        except Exception as failure:  # told by the thread that watches
            self._failures.append(failure)
