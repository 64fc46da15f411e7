"""The threads that compute for streams: as many at once as there are cores, live streams first."""

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

LOOK_S = 0.02
KEPT_CORES = 1
"""For live streams: the others use what is left."""
LONG_JOB_S = 0.1
"""A job that takes longer no longer counts as one that keeps a core: it may hang."""


class StreamThreads:
    """Threads that all streams share; knows which of them hang.

    Shared, since OpenCV (5.0) never frees the 0.9 kB that it keeps for each thread: with threads of their
    own, streams that come and go would take more and more.

    More jobs than cores would only take turns on them, and at the interpreter's lock: a frame of an honest
    stream then waits for every job of a flood a little. So jobs wait here instead, and live ones overtake.
    Belongs to one event loop.

    Args:
        count: of threads.
        cores: jobs at once; two at least, of which others than live streams have one.
        hung_after_s: a job that takes longer hangs. A thread cannot be stopped, so it is given up.
    """

    def __init__(self, count: int, cores: int, hung_after_s: float) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="trocar-stream")
        self._hung_after_s = hung_after_s
        self._begun_s: dict[Future[Any], float] = {}
        self._free_cores = max(cores, KEPT_CORES + 1)
        self._on_core: set[Future[Any]] = set()
        self._waiting: list[tuple[bool, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    @property
    def working(self) -> int:
        """Jobs that have not ended, those that hang among them."""
        return len(self._begun_s)

    @property
    def hung(self) -> int:
        """Jobs that take too long, each with a thread and its memory."""
        # A copy, since threads take their jobs out.
        return sum(map(self._is_hung, self._begun_s.copy()))

    async def run(self, work: Callable[..., T], *arguments: object, is_live: bool) -> T:
        """Compute in a thread, once a core is free.

        A caller that is cancelled meanwhile still waits until the thread is free or hangs: so a stream that
        ends keeps its place for as long as it keeps a thread, and no other stream has to do without one.

        Args:
            work: what to call.
            arguments: of it.
            is_live: for a live stream, which goes before those that wait for every frame anyway.

        Raises:
            TimeoutError: it hangs.
        """
        await self._wait_for_core(is_live=is_live)
        job = self._pool.submit(work, *arguments)
        self._on_core.add(job)
        self._begun_s[job] = time.monotonic()
        job.add_done_callback(self._begun_s.pop)
        giving_up = asyncio.get_running_loop().call_later(LONG_JOB_S, self._leave_core, job)
        try:
            async with asyncio.timeout(self._hung_after_s):
                return await asyncio.wrap_future(job)
        except (asyncio.CancelledError, TimeoutError):
            # A job that no thread has taken up yet is never begun.
            while not (job.cancel() or job.done() or self._is_hung(job)):  # noqa: ASYNC110
                await asyncio.sleep(LOOK_S)
            raise
        finally:
            giving_up.cancel()
            self._leave_core(job)
            # It holds the error that it failed with, whose frames would hold it.
            del job

    def close(self) -> None:
        """Take no more jobs; threads end with the jobs that they have."""
        self._pool.shutdown(wait=False)

    async def _wait_for_core(self, *, is_live: bool) -> None:
        if self._free_cores > (0 if is_live else KEPT_CORES):
            self._free_cores -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (not is_live, next(self._numbers), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._free_core()
            raise

    def _leave_core(self, job: Future[Any]) -> None:
        if job in self._on_core:
            self._on_core.remove(job)
            self._free_core()

    def _free_core(self) -> None:
        self._free_cores += 1
        while self._waiting:
            is_patient, _, turn = self._waiting[0]
            if is_patient and self._free_cores <= KEPT_CORES:
                return
            heapq.heappop(self._waiting)
            if not turn.done():
                self._free_cores -= 1
                turn.set_result(None)
                return

    def _is_hung(self, job: Future[Any]) -> bool:
        begun_s = self._begun_s.get(job)
        return begun_s is not None and job.running() and time.monotonic() - begun_s >= self._hung_after_s
