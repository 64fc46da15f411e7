import asyncio
import threading
from concurrent.futures import Future

import pytest

from trocar.stream_threads import StreamThreads
from wire.calls import until


class Jobs:
    """Jobs that run until they are let go, and tell in which order they began."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self._gates: dict[str, threading.Event] = {}

    def work(self, name: str) -> str:
        gate = self._gates.setdefault(name, threading.Event())
        self.begun.append(name)
        assert gate.wait(10)
        return name

    def let_go(self, *names: str) -> None:
        for name in names:
            self._gates.setdefault(name, threading.Event()).set()

    async def until_begun(self, *names: str) -> None:
        await until(lambda: set(names) <= set(self.begun))


@pytest.fixture
def jobs() -> Jobs:
    return Jobs()


def make_threads(*, cores: int = 2, patience_s: float = 60.0) -> StreamThreads:
    return StreamThreads(8, cores=cores, hung_after_s=60, long_job_s=60, patience_s=patience_s)


def start(threads: StreamThreads, jobs: Jobs, name: str, *, is_live: bool) -> "asyncio.Task[str]":
    return asyncio.create_task(threads.run(jobs.work, name, is_live=is_live))


async def take_both_cores(threads: StreamThreads, jobs: Jobs) -> "list[asyncio.Task[str]]":
    """Live jobs a and b, begun."""
    running = [start(threads, jobs, name, is_live=True) for name in ("a", "b")]
    await jobs.until_begun("a", "b")
    return running


async def test_no_more_jobs_than_cores_and_live_ones_overtake(jobs: Jobs) -> None:
    threads = make_threads()
    running = await take_both_cores(threads, jobs)
    patient = start(threads, jobs, "recorded", is_live=False)
    await asyncio.sleep(0)
    urgent = start(threads, jobs, "live", is_live=True)
    await asyncio.sleep(0.05)
    assert len(jobs.begun) == 2
    jobs.let_go("a")
    await jobs.until_begun("live")
    assert "recorded" not in jobs.begun
    jobs.let_go("b", "live", "recorded")
    assert await asyncio.gather(*running, patient, urgent) == ["a", "b", "recorded", "live"]
    threads.close()


async def test_jobs_of_other_streams_leave_a_core_to_live_ones(jobs: Jobs) -> None:
    threads = make_threads()
    recorded = [start(threads, jobs, name, is_live=False) for name in ("first", "second")]
    await jobs.until_begun("first")
    live = start(threads, jobs, "live", is_live=True)
    await jobs.until_begun("live")
    assert jobs.begun == ["first", "live"]
    jobs.let_go("live")
    await live
    await asyncio.sleep(0.05)
    assert "second" not in jobs.begun, "the free core is kept"
    jobs.let_go("first", "second")
    assert await asyncio.gather(*recorded) == ["first", "second"]
    threads.close()


async def test_one_core_is_taken_for_two(jobs: Jobs) -> None:
    threads = make_threads(cores=1)
    jobs.let_go("recorded")
    assert await start(threads, jobs, "recorded", is_live=False) == "recorded"
    threads.close()


@pytest.mark.parametrize("is_handed_a_core", [False, True])
async def test_job_that_is_cancelled_while_it_waits_takes_no_core_along(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, is_handed_a_core: bool
) -> None:
    threads = make_threads()
    running = await take_both_cores(threads, jobs)
    given_up, next_one = (start(threads, jobs, name, is_live=True) for name in ("given up", "next"))
    await asyncio.sleep(0)

    def leave_and_cancel(job: "Future[str]") -> None:
        leave_core(job)
        given_up.cancel()

    leave_core = threads._leave_core
    if is_handed_a_core:
        monkeypatch.setattr(threads, "_leave_core", leave_and_cancel)
    else:
        given_up.cancel()
    jobs.let_go("a")
    await jobs.until_begun("next")
    assert given_up.cancelled()
    jobs.let_go("b", "next")
    assert await asyncio.gather(*running, next_one) == ["a", "b", "next"]
    assert jobs.begun == ["a", "b", "next"]
    threads.close()


async def test_job_runs_on_the_core_that_one_live_stream_leaves(jobs: Jobs) -> None:
    threads = make_threads()
    live = start(threads, jobs, "live", is_live=True)
    await jobs.until_begun("live")
    jobs.let_go("recorded")
    assert await start(threads, jobs, "recorded", is_live=False) == "recorded"
    jobs.let_go("live")
    await live
    threads.close()


async def test_job_that_has_waited_long_is_overtaken_no_more(jobs: Jobs) -> None:
    threads = make_threads(patience_s=0.01)
    running = await take_both_cores(threads, jobs)
    recorded = start(threads, jobs, "recorded", is_live=False)
    await asyncio.sleep(0.02)
    late = start(threads, jobs, "late", is_live=True)
    await asyncio.sleep(0)
    jobs.let_go("a")
    await jobs.until_begun("recorded")
    assert "late" not in jobs.begun
    jobs.let_go("b", "recorded", "late")
    await asyncio.gather(*running, recorded, late)
    threads.close()


async def test_jobs_that_hang_are_told_and_keep_their_core_for_a_moment_only(jobs: Jobs) -> None:
    threads = StreamThreads(3, cores=2, hung_after_s=0.4, long_job_s=0.02)
    hung = await take_both_cores(threads, jobs)
    jobs.let_go("good")
    assert await start(threads, jobs, "good", is_live=True) == "good"
    assert not any(one.done() for one in hung)
    failures = await asyncio.gather(*hung, return_exceptions=True)
    assert [type(one) for one in failures] == [TimeoutError, TimeoutError]
    assert (threads.hung, threads.working) == (2, 2)
    jobs.let_go("a", "b")
    await until(lambda: not threads.working)
    threads.close()
