"""Between the surgeon's page and a tracking server: one page, one source, one stream at a time.

page ── WebSocket ── Screen ── Show ── TrackerLink ── trocar.v1 server
                                └── SourcePump: the sources on this side (built-in operation, files, RTSP)
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from trocar.config import Access
from trocar.envelope import Outbox, pack, unpack
from trocar.errors import SourceError, TrocarError
from trocar.overlay import COLORS
from trocar.show import PROGRESS_EVERY_S, Backstage, Show
from trocar.sources import Source

log = logging.getLogger(__name__)

PAGE_SOURCE = "page"
"""The page's own camera or file; everything else lies on this side."""
HELLO_TIMEOUT_S = 10.0
TAKEOVER_TIMEOUT_S = 5.0

OpenSource = Callable[[Callable[[int, int], None]], Source]
"""Opens a source; is handed a callback for the frames prepared and the frames in all."""


@dataclass(frozen=True, kw_only=True)
class SourceEntry:
    """A source on this side that the page may choose.

    Args:
        source_id: for the page.
        label: what people call it; no credentials.
        kind: "operation", "file" or "camera".
        open: opens it, in a thread.
    """

    source_id: str
    label: str
    kind: str
    open: OpenSource


class Gateway:
    """Lets one page at a time onto the server.

    Args:
        address: host:port of the tracking server.
        sources: on this side.
        folder: an existing one, for archives that wait to be taken away.
        hold_ms: how long the page lets a picture wait for its masks.
        access: to the tracking server.
    """

    def __init__(
        self,
        address: str,
        sources: tuple[SourceEntry, ...],
        folder: Path,
        *,
        hold_ms: int,
        access: Access | None = None,
    ) -> None:
        self.backstage = Backstage(address=address, access=access or Access(), folder=folder)
        self.hold_ms = hold_ms
        self.sources = {entry.source_id: entry for entry in sources}
        self._screen: Screen | None = None

    async def serve(self, websocket: WebSocket) -> None:
        """Serve one page until it leaves."""
        await websocket.accept()
        with contextlib.suppress(WebSocketDisconnect, TimeoutError):
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello, _ = unpack(await websocket.receive_bytes())
            tab = str(hello.get("tab", ""))
            if self._is_taken(tab) and not hello.get("takeover"):
                await websocket.send_bytes(pack({"type": "busy"}))
                await websocket.close()
                return
            while self._screen is not None:
                async with asyncio.timeout(TAKEOVER_TIMEOUT_S):
                    await self._screen.hand_over()
            can_decode = bool(hello.get("h264"))
            screen = self._screen = Screen(self, websocket, tab=tab, can_decode=can_decode)
            try:
                await screen.run()
            except asyncio.CancelledError:
                if not screen.is_replaced:
                    raise
            finally:
                self._screen = None
                screen.is_over.set()

    def _is_taken(self, tab: str) -> bool:
        """Whether another page is here: not one on its way out, nor this one over a line that broke."""
        screen = self._screen
        return screen is not None and not screen.is_leaving and (not tab or screen.tab != tab)


class Screen:
    """One page.

    Args:
        gateway: that let it in.
        websocket: accepted.
        tab: the page's own name for itself, the same on all its connections.
        can_decode: the page decodes H.264; else it gets JPEG.
    """

    def __init__(self, gateway: Gateway, websocket: WebSocket, *, tab: str, can_decode: bool) -> None:
        self.tab = tab
        self.is_leaving = False
        self.is_replaced = False
        self._gateway = gateway
        self._websocket = websocket
        self._can_decode = can_decode
        self._outbox = Outbox()
        self._show: Show | None = None
        self._playing: asyncio.Task[None] | None = None
        self._serving: asyncio.Task[Any] | None = None
        self.is_over = asyncio.Event()

    async def run(self) -> None:
        """Serve until the page leaves.

        Raises:
            WebSocketDisconnect: it left.
        """
        self._serving = asyncio.current_task()
        self._tell(
            type="hello",
            version=version("trocar"),
            colors=COLORS,
            hold_ms=self._gateway.hold_ms,
            sources=[
                {"id": entry.source_id, "label": entry.label, "kind": entry.kind}
                for entry in self._gateway.sources.values()
            ],
        )
        sender = asyncio.create_task(self._send())
        try:
            while True:
                await self._take(await self._websocket.receive_bytes())
        finally:
            self.is_leaving = True
            sender.cancel()
            await self._stop()

    async def hand_over(self) -> None:
        """Make room for another page, and tell this one."""
        if not self.is_leaving:
            self._tell(type="taken")
            await asyncio.sleep(0)
        with contextlib.suppress(RuntimeError):
            await self._websocket.close()
        # A page behind a line that broke unnoticed would never answer the close.
        self.is_replaced = True
        if self._serving is not None:
            self._serving.cancel()
        await self.is_over.wait()

    async def _send(self) -> None:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            while True:
                await self._websocket.send_bytes(await self._outbox.get())

    def _tell(self, **header: object) -> None:
        self._outbox.put(pack(header), "word")

    async def _take(self, envelope: bytes) -> None:
        try:
            header, blob = unpack(envelope)
            match header["type"]:
                case "ping":
                    self._tell(type="pong", t=header["t"], now=_now_ms())
                case "start":
                    await self._stop()
                    self._playing = asyncio.create_task(self._play(header))
                case "stop":
                    await self._stop()
                case _ if self._show is not None:
                    self._show.take(header, blob)
                case _:
                    pass  # meant for a show that has just ended
        except TrocarError as error:
            self._tell(type="warning", reason="page", message=str(error))
        except (KeyError, TypeError, ValueError):
            log.exception("malformed message of the page")
            self._tell(type="warning", reason="page", message="The page and its gateway differ: reload it.")

    async def _play(self, start: dict[str, Any]) -> None:
        try:
            source = await self._open_source(str(start["source"]))
            show = Show(self._gateway.backstage, self._outbox, start, source, can_decode=self._can_decode)
            self._show = show
            await show.run()
        except TrocarError as error:
            self._tell(type="failed", message=str(error))
        except Exception:
            log.exception("the show failed")
            self._tell(type="failed", message="The gateway failed; its log has the reason.")
        finally:
            self._show = None

    async def _open_source(self, source_id: str) -> Source | None:
        if source_id == PAGE_SOURCE:
            return None
        entry = self._gateway.sources.get(source_id)
        if entry is None:
            raise SourceError(f"there is no source {source_id!r}: reload the page")
        loop, told_s = asyncio.get_running_loop(), 0.0

        def tell(done: int, total: int) -> None:
            nonlocal told_s
            if time.monotonic() - told_s > PROGRESS_EVERY_S:
                told_s = time.monotonic()
                loop.call_soon_threadsafe(lambda: self._tell(type="preparing", done=done, total=total))

        opening = asyncio.ensure_future(asyncio.to_thread(entry.open, tell))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            # The page left meanwhile, and the thread cannot be stopped: nobody else would close it.
            opening.add_done_callback(_close_opened)
            raise

    async def _stop(self) -> None:
        if self._playing is not None:
            self._playing.cancel()
            # Not awaited itself: whoever is cancelled here meanwhile must hear of it.
            await asyncio.wait([self._playing])
            self._playing = None


def _close_opened(opening: "asyncio.Future[Source]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _now_ms() -> float:
    return time.monotonic() * 1_000
