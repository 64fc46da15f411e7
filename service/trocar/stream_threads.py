"""The threads that compute for streams."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

LOOK_S = 0.02


class StreamThreads:
    """Threads that all streams share; knows which of them hang.

    Shared, since OpenCV (5.0) never frees the 0.9 kB that it keeps for each thread: with threads of their
    own, streams that come and go would take more and more.

    Args:
        count: of threads.
        hung_after_s: a job that takes longer hangs. A thread cannot be stopped, so it is given up.
    """

    def __init__(self, count: int, hung_after_s: float) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="trocar-stream")
        self._hung_after_s = hung_after_s
        self._begun_s: dict[Future[Any], float] = {}

    @property
    def working(self) -> int:
        """Jobs that have not ended, those that hang among them."""
        return len(self._begun_s)

    @property
    def hung(self) -> int:
        """Jobs that take too long, each with a thread and its memory."""
        # A copy, since threads take their jobs out.
        return sum(map(self._is_hung, self._begun_s.copy()))

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """Compute in a thread.

        A caller that is cancelled meanwhile still waits until the thread is free or hangs: so a stream that
        ends keeps its place for as long as it keeps a thread, and no other stream has to do without one.
        """
        job = self._pool.submit(work, *arguments)
        self._begun_s[job] = time.monotonic()
        job.add_done_callback(self._begun_s.pop)
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            # A job that no thread has taken up yet is never begun.
            while not (job.cancel() or job.done() or self._is_hung(job)):  # noqa: ASYNC110
                await asyncio.sleep(LOOK_S)
            raise
        finally:
            # It holds the error that it failed with, whose frames would hold it.
            del job

    def close(self) -> None:
        """Take no more jobs; threads end with the jobs that they have."""
        self._pool.shutdown(wait=False)

    def _is_hung(self, job: Future[Any]) -> bool:
        begun_s = self._begun_s.get(job)
        return begun_s is not None and job.running() and time.monotonic() - begun_s >= self._hung_after_s
