"""The threads that compute for streams: about as many at once as there are cores, live streams first."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

LOOK_S = 0.02
KEPT_CORES = 1
"""For live streams: the others use at most what is left."""
PATIENCE_S = 1.0
"""After which a job of a stream that is not live no longer lets live ones overtake."""
LONG_JOB_S = 1.0
"""A job that takes longer no longer counts as one that keeps a core: it may hang."""


class _Turn(NamedTuple):
    """A job that waits for a core, and by when it should have one."""

    due_s: float
    granted: "asyncio.Future[None]"


class StreamThreads:
    """Threads that all streams share; knows which of them hang.

    Shared, since OpenCV (5.0) never frees the 0.9 kB that it keeps for each thread: with threads of their
    own, streams that come and go would take more and more.

    More jobs than cores would only take turns on them, and at the interpreter's lock: a frame of an honest
    stream then waits for every job of a flood a little. So jobs wait here instead, and live ones overtake.
    Belongs to one event loop.

    Args:
        count: of threads.
        cores: jobs at once; at least two, of which others than live streams have one.
        hung_after_s: a job that takes longer hangs. A thread cannot be stopped, so it is given up.
        long_job_s: for which a job keeps its core at most.
        patience_s: for which jobs of streams that are not live let others overtake.
    """

    def __init__(
        self,
        count: int,
        *,
        cores: int,
        hung_after_s: float,
        long_job_s: float = LONG_JOB_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="trocar-stream")
        self._hung_after_s, self._long_job_s, self._patience_s = hung_after_s, long_job_s, patience_s
        self._begun_s: dict[Future[Any], float] = {}
        self._free = max(cores, KEPT_CORES + 1)
        self._free_of_recorded = self._free - KEPT_CORES
        self._on_core: dict[Future[Any], bool] = {}
        self._waiting: dict[bool, deque[_Turn]] = {True: deque(), False: deque()}

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
        self._on_core[job] = is_live
        self._begun_s[job] = time.monotonic()
        job.add_done_callback(self._begun_s.pop)
        giving_up = asyncio.get_running_loop().call_later(self._long_job_s, self._leave_core, job)
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
        granted = asyncio.get_running_loop().create_future()
        turn = _Turn(time.monotonic() + (0 if is_live else self._patience_s), granted)
        self._waiting[is_live].append(turn)
        self._grant()
        try:
            await granted
        except asyncio.CancelledError:
            if not granted.cancelled():
                self._free_core(is_live=is_live)
            raise

    def _grant(self) -> None:
        """Give free cores to whoever waits."""
        while self._free:
            open_queues = [
                is_live
                for is_live, waiting in self._waiting.items()
                if waiting and (is_live or self._free_of_recorded)
            ]
            if not open_queues:
                return
            is_live = min(open_queues, key=lambda is_live: self._waiting[is_live][0].due_s)
            granted = self._waiting[is_live].popleft().granted
            if not granted.done():  # cancelled while it waited
                self._free -= 1
                self._free_of_recorded -= not is_live
                granted.set_result(None)

    def _leave_core(self, job: Future[Any]) -> None:
        is_live = self._on_core.pop(job, None)
        if is_live is not None:
            self._free_core(is_live=is_live)

    def _free_core(self, *, is_live: bool) -> None:
        self._free += 1
        self._free_of_recorded += not is_live
        self._grant()

    def _is_hung(self, job: Future[Any]) -> bool:
        begun_s = self._begun_s.get(job)
        return begun_s is not None and job.running() and time.monotonic() - begun_s >= self._hung_after_s
