"""How many streams a device carries: the largest number that holds its limits on latency and drops."""

from collections.abc import Callable
from dataclasses import dataclass

ROWS = "memory rows"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What every stream is owed.

    Args:
        p99_ms: latency from due to received, of all streams together.
        drop_share: of frames, 0 to 1.
    """

    p99_ms: float
    drop_share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """One number of streams that was tried.

    Args:
        streams: at once.
        p99_ms: latency; None when hardly a frame was tracked.
        drop_share: of frames, 0 to 1.
        holds: whether both limits were kept.
    """

    streams: int
    p99_ms: float | None
    drop_share: float
    holds: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What a search came to.

    Args:
        mode: that was run.
        objects: on each stream.
        paced_fps: of each stream.
        limits: that were asked for.
        streams: the largest number that held them; 0 when one stream was too many.
        limited_by: "latency", "drops", "latency and drops", or "memory rows" when all that the tracker admits
            was carried.
        probes: in the order in which they were tried.
    """

    mode: str
    objects: int
    paced_fps: float
    limits: Limits
    streams: int
    limited_by: str
    probes: tuple[Probe, ...]


def find_largest(most: int, probe: Callable[[int], Probe]) -> list[Probe]:
    """Try 1, 2, 4, … streams until the limits break, then halve the gap between the best and the worst.

    Args:
        most: never try more.
        probe: tries a number of streams.

    Returns:
        every probe in order; the best of them that holds is the capacity.
    """
    probes: list[Probe] = []
    holds, breaks = 0, most + 1
    while breaks - holds > 1:
        is_growing = breaks > most
        streams = min(max(1, 2 * holds), most) if is_growing else (holds + breaks) // 2
        probes.append(probe(streams))
        if probes[-1].holds:
            holds = streams
        else:
            breaks = streams
    return probes


def name_limit(probes: list[Probe], limits: Limits) -> str:
    """What the smallest number of streams that broke a limit broke; `ROWS` when none did."""
    broken = min(
        (probe for probe in probes if not probe.holds), key=lambda probe: probe.streams, default=None
    )
    if broken is None:
        return ROWS
    reasons = []
    if broken.p99_ms is None or broken.p99_ms > limits.p99_ms:
        reasons.append("latency")
    if broken.drop_share > limits.drop_share:
        reasons.append("drops")
    return " and ".join(reasons)
