"""One run: all streams at once, each fed by a thread of its own, watched by the one that asked.

Or, to compare trackers that cannot share a machine without slowing each other down: a few frames of one, a
few of the other, in turn.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from trocar_bench.footage import FRAME_RATE_HZ
from trocar_bench.frame_log import WINDOWS, Figures, FrameLog, sum_up
from trocar_bench.pacing import NS_PER_S, BackPressure, Clock, OpenLoop, Pacing
from trocar_bench.process_meter import CpuReading, CpuUse, ProcessMeter, add_up, compare
from trocar_engines.gpu_meter import GpuFigures, GpuMeter, sum_up_gpu

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
        mode: "engine", "service" or "reference".
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


class BlockLane(Lane, Protocol):
    """A stream that can be halted between two frames."""

    def drain(self) -> None:
        """Wait until every frame sent is settled and nothing is left to do for it.

        Raises:
            TrocarError: the stream broke.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a run took of the machine.

    Args:
        cpu: while the frames that count were on their way; of all frames when that took but a moment.
        rss_mb: most memory of the server; None without one.
        rss_growth_mb: of the server's memory after the first `SETTLED_FRAMES`; None when it ran no longer.
        gpu: while the frames that count were on their way; None without one.
    """

    cpu: CpuUse
    rss_mb: float | None
    rss_growth_mb: float | None
    gpu: GpuFigures | None


class Watch:
    """What is seen of a run from outside, and tells how far it is.

    Args:
        meter: of the processes.
        gpu: of the device.
        on_progress: called with the settled frames of the slowest stream.
    """

    def __init__(self, meter: ProcessMeter, gpu: GpuMeter, on_progress: Callable[[int], None]) -> None:
        self._meter = meter
        self._gpu = gpu
        self._gpu_readings: list[GpuFigures] = []
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
        if self._warm is not None and (reading := self._gpu.read()) is not None:
            self._gpu_readings.append(reading)
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
            gpu=sum_up_gpu(self._gpu_readings),
        )


class SpeedRun:
    """Feeds every lane until all is settled.

    Args:
        plan: what to run.
        open_lane: opens one of its streams.
        watch: looks on.
        clock: of the lanes' pacing.
    """

    def __init__(
        self,
        plan: RunPlan,
        open_lane: Callable[[RunPlan], Lane],
        watch: Watch,
        clock: Clock = time.perf_counter_ns,
    ) -> None:
        self._clock = clock
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
        started_ns = self._clock() + LEAD_NS
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
                lane.log.note_sent(frame_id, due_ns, self._clock())
                lane.send(frame_id)
            lane.finish()
        except Exception as failure:  # told by the thread that watches
            self._failures.append(failure)


class AlternatingRun:
    """Feeds several trackers in turn, a block of frames each, so that what slows the machine slows all.

    One block to warm up, then `WINDOWS` that count. A block ends when nothing is left to do for its frames,
    so that no tracker works in another one's time.

    Args:
        plan: of each tracker; unpaced, one stream.
        lanes: one per tracker.
        meter: of this process.
        gpu: of the device.
        on_frame: called after each frame of each tracker, for progress.
    """

    def __init__(
        self,
        plan: RunPlan,
        lanes: Sequence[BlockLane],
        meter: ProcessMeter,
        gpu: GpuMeter,
        on_frame: Callable[[], None],
    ) -> None:
        self._plan = plan
        self._lanes = lanes
        self._meter = meter
        self._gpu = gpu
        self._on_frame = on_frame

    def run(self) -> list[tuple[Figures, Usage]]:
        """Run; what comes of each lane, in their order. The lanes are closed afterwards.

        Raises:
            TrocarError: a stream was refused or broke.
        """
        first, last = self._plan.warmup + 1, self._plan.frame_ids.stop
        edges = np.linspace(first, last, min(WINDOWS, self._plan.frames) + 1).round().astype(int).tolist()
        stretches: list[list[_Stretch]] = [[] for _ in self._lanes]
        with ExitStack() as resources:
            for lane in self._lanes:
                resources.callback(lane.close)
                lane.begin()
            for block in (range(1, first), *(range(*pair) for pair in pairwise(edges))):
                for lane, its_stretches in zip(self._lanes, stretches, strict=True):
                    stretch = self._feed(lane, block)
                    if block.start >= first:
                        its_stretches.append(stretch)
        return [self._sum_up(lane, of) for lane, of in zip(self._lanes, stretches, strict=True)]

    def _feed(self, lane: BlockLane, block: range) -> "_Stretch":
        before, readings = self._meter.read_cpu(), [self._gpu.read()]
        began_ns = time.perf_counter_ns()
        for frame_id in block:
            due_ns = lane.pacing.wait()
            if due_ns is None:
                break
            lane.log.note_sent(frame_id, due_ns, time.perf_counter_ns())
            lane.send(frame_id)
            self._on_frame()
        lane.drain()
        ended_ns = time.perf_counter_ns()
        readings.append(self._gpu.read())
        return _Stretch(
            frames=len(block),
            began_ns=began_ns,
            ended_ns=ended_ns,
            cpu=compare(before, self._meter.read_cpu()),
            gpu=[reading for reading in readings if reading is not None],
        )

    def _sum_up(self, lane: BlockLane, stretches: "Sequence[_Stretch]") -> tuple[Figures, Usage]:
        figures = sum_up([lane.log], stretches[0].began_ns)
        taken_ns = sum(stretch.ended_ns - stretch.began_ns for stretch in stretches)
        # The figures know nothing of the pauses in which the others ran.
        figures = dataclasses.replace(
            figures,
            fps=self._plan.frames * NS_PER_S / taken_ns,
            window_fps=tuple(stretch.fps for stretch in stretches),
        )
        usage = Usage(
            cpu=add_up([stretch.cpu for stretch in stretches]),
            rss_mb=None,
            rss_growth_mb=None,
            gpu=sum_up_gpu([reading for stretch in stretches for reading in stretch.gpu]),
        )
        return figures, usage


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stretch:
    """One block of one lane."""

    frames: int
    began_ns: int
    ended_ns: int
    cpu: CpuUse
    gpu: list[GpuFigures]

    @property
    def fps(self) -> float:
        return self.frames * NS_PER_S / (self.ended_ns - self.began_ns)
