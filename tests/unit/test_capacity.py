"""The search for the largest number of streams."""

import pytest

from trocar_bench.capacity import ROWS, Capacity, Limits, Probe, find_largest, name_limit
from trocar_bench.fps_report import describe_capacity

LIMITS = Limits(p99_ms=33, drop_share=0.01)


def search(capacity: int, most: int) -> list[Probe]:
    """A device that carries so many streams."""

    def probe(streams: int) -> Probe:
        p99_ms = 10.0 if streams <= capacity else 90.0
        return Probe(streams=streams, p99_ms=p99_ms, drop_share=0.0, holds=streams <= capacity)

    return find_largest(most, probe)


@pytest.mark.parametrize("capacity", [0, 1, 2, 3, 5, 11, 12, 16, 63, 64])
def test_largest_number_that_holds_is_found(capacity: int) -> None:
    probes = search(capacity, most=64)
    assert max((one.streams for one in probes if one.holds), default=0) == capacity
    assert len({one.streams for one in probes}) == len(probes), "nothing is tried twice"
    assert len(probes) <= 12


def test_search_never_tries_more_than_fit() -> None:
    assert [probe.streams for probe in search(1_000, most=21)] == [1, 2, 4, 8, 16, 21]


def test_one_stream_too_many_ends_the_search() -> None:
    assert [probe.streams for probe in search(0, most=64)] == [1]


def test_limit_is_that_of_the_smallest_number_that_broke_it() -> None:
    fine = Probe(streams=2, p99_ms=20, drop_share=0, holds=True)
    late = Probe(streams=3, p99_ms=40, drop_share=0.005, holds=False)
    lost = Probe(streams=4, p99_ms=32, drop_share=0.5, holds=False)
    drowned = Probe(streams=8, p99_ms=None, drop_share=1, holds=False)
    assert name_limit([fine, lost, late], LIMITS) == "latency"
    assert name_limit([fine, lost], LIMITS) == "drops"
    assert name_limit([fine, drowned], LIMITS) == "latency and drops"
    assert name_limit([fine], LIMITS) == ROWS


def test_capacity_bound_by_the_tracker_says_at_least() -> None:
    probes = tuple(search(64, most=64))
    capacity = Capacity(
        mode="engine", objects=1, paced_fps=60, limits=LIMITS, streams=64, limited_by=ROWS, probes=probes
    )
    told = describe_capacity(capacity)
    assert "at least 64 streams" in told
    assert "p99 33 ms and 1.0% drops" in told
