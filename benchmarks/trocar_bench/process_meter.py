"""CPU time and memory of the processes of a run, from Linux' /proc; elsewhere they stay unknown."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

PROC = Path("/proc")
RESET_PEAK = "5"
"""What /proc/PID/clear_refs takes to start the peak of the resident set anew; see proc(5)."""
BYTES_PER_KB = 1024
STAT_USER, STAT_SYSTEM = 11, 12
"""Fields 14 and 15 of /proc/PID/stat, counted from after the command's name, which may hold spaces."""
IDLE_FIELDS = (3, 4)
"""idle and iowait, of a core's line in /proc/stat."""
WARM_UP_SHARE = 0.1
COMPARED_READINGS = 10
COUNTED_FIELDS = 8
"""user to steal; guest time, which follows, is part of user time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuReading:
    """CPU seconds used so far.

    Args:
        at_s: monotonic clock.
        client_s: by this process.
        server_s: by the server; None without one.
        busy_s: by anybody, on the cores that we may use; None where unknown.
    """

    at_s: float
    client_s: float
    server_s: float | None
    busy_s: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuUse:
    """CPU time of a stretch; 100% is one core.

    Args:
        seconds: how long it was.
        client_percent: of this process.
        server_percent: of the server; None without one.
        others_percent: of everything else on our cores, which a clean measurement does not have.
    """

    seconds: float
    client_percent: float
    server_percent: float | None
    others_percent: float | None


def compare(before: CpuReading, after: CpuReading) -> CpuUse:
    """What was used between two readings."""
    seconds = max(after.at_s - before.at_s, 1e-9)
    client_s = after.client_s - before.client_s
    server_s = None
    if before.server_s is not None and after.server_s is not None:
        server_s = after.server_s - before.server_s
    others_s = None
    if before.busy_s is not None and after.busy_s is not None:
        # The kernel counts in ticks of 10 ms: an idle machine can come out a little below nothing.
        others_s = max(after.busy_s - before.busy_s - client_s - (server_s or 0.0), 0.0)
    return CpuUse(
        seconds=seconds,
        client_percent=100 * client_s / seconds,
        server_percent=None if server_s is None else 100 * server_s / seconds,
        others_percent=None if others_s is None else 100 * others_s / seconds,
    )


def add_up(stretches: Sequence[CpuUse]) -> CpuUse:
    """What was used in several stretches, at least one, together."""
    seconds = sum(one.seconds for one in stretches)

    def mean(percents: Sequence[float | None]) -> float | None:
        told = [p * one.seconds for p, one in zip(percents, stretches, strict=True) if p is not None]
        return sum(told) / seconds if len(told) == len(stretches) else None

    return CpuUse(
        seconds=seconds,
        client_percent=sum(one.client_percent * one.seconds for one in stretches) / seconds,
        server_percent=mean([one.server_percent for one in stretches]),
        others_percent=mean([one.others_percent for one in stretches]),
    )


class ProcessMeter:
    """Reads this process, the machine, and the server where there is one.

    Args:
        server_pid: None without a server.
        proc: where the kernel tells.
    """

    def __init__(self, server_pid: int | None, proc: Path = PROC) -> None:
        self._server_pid = server_pid
        self._proc = proc

    def read_cpu(self) -> CpuReading:
        """Read CPU times now."""
        return CpuReading(
            at_s=time.perf_counter(),
            client_s=time.process_time(),
            server_s=self._read_server_cpu_s(),
            busy_s=self._read_busy_s(),
        )

    def reset_peak(self) -> None:
        """Start the server's peak of memory anew."""
        if self._server_pid is not None:
            try:
                (self._proc / str(self._server_pid) / "clear_refs").write_text(RESET_PEAK)
            except OSError:
                return  # the peak is then that of the server's life

    def read_rss_mb(self) -> float | None:
        """Server memory now, MB (10^6 bytes)."""
        return self._read_memory_mb("VmRSS")

    def read_peak_mb(self) -> float | None:
        """Most server memory since `reset_peak`, MB."""
        return self._read_memory_mb("VmHWM")

    def _read_server_cpu_s(self) -> float | None:
        stat = None if self._server_pid is None else self._read(f"{self._server_pid}/stat")
        if stat is None:
            return None
        fields = stat.rpartition(")")[2].split()
        return (int(fields[STAT_USER]) + int(fields[STAT_SYSTEM])) / _ticks_per_s()

    def _read_busy_s(self) -> float | None:
        stat = self._read("stat")
        if stat is None:
            return None
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        busy = 0
        for line in stat.splitlines():
            name, *fields = line.split()
            if name in cores:
                ticks = [int(field) for field in fields[:COUNTED_FIELDS]]
                busy += sum(ticks) - sum(ticks[field] for field in IDLE_FIELDS)
        return busy / _ticks_per_s()

    def _read_memory_mb(self, field: str) -> float | None:
        status = None if self._server_pid is None else self._read(f"{self._server_pid}/status")
        if status is None:
            return None
        for line in status.splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * BYTES_PER_KB / 1e6
        return None

    def _read(self, name: str) -> str | None:
        try:
            return (self._proc / name).read_text()
        except OSError:
            return None


def _ticks_per_s() -> int:
    return os.sysconf("SC_CLK_TCK")


class MemoryFigures(NamedTuple):
    """Medians of ten readings each, after a tenth of the time and at the end, MB; allocators breathe."""

    after_warm_up_mb: float
    end_mb: float
    growth_percent: float


def compare_memory(readings_mb: Sequence[float]) -> MemoryFigures | None:
    """What the readings come to; None when there are too few."""
    warm = after_warm_up(readings_mb)
    if len(warm) < 2 * COMPARED_READINGS:
        return None
    first, last = (float(median(part)) for part in (warm[:COMPARED_READINGS], warm[-COMPARED_READINGS:]))
    return MemoryFigures(round(first, 1), round(last, 1), round(100 * (last - first) / first, 2))


def after_warm_up(values: Sequence[float]) -> Sequence[float]:
    """What comes after the first tenth."""
    return values[int(len(values) * WARM_UP_SHARE) :]
