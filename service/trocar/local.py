"""A server in a thread of this process, for commands that were given none."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, Self, TypeVar

from trocar.config import ServerConfig
from trocar.server import TrackingServer
from trocar.tracking import Resize, Scheduler

T = TypeVar("T")


class LocalServer:
    """Serves on a loopback port for as long as the context lasts.

    Args:
        scheduler: the tracker; the caller closes it.
        resize: from source pixels to the tracker's input.
        address: host:port to listen on; port 0 takes a free one.
    """

    def __init__(self, scheduler: Scheduler, resize: Resize, address: str = "127.0.0.1:0") -> None:
        # Whoever waits for the results of an own server has no use for a grace period.
        config = ServerConfig(address=address, shutdown_grace_s=0)
        self._server = TrackingServer(config, scheduler, resize)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trocar-server", daemon=True)

    @property
    def address(self) -> str:
        """host:port that it listens on."""
        return self._server.address

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._await(self._server.start())
            self._await(self._server.warm_up())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._await(self._server.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
