"""A source on the gateway's side, played to a page and a tracking server."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable

import cv2

from trocar.client_core import Frame
from trocar.decode import Codec, Packet, PacketDecoder, VideoFormat
from trocar.sources import LARGEST_PICTURE_PX, Source, SourceFrame
from trocar_engines.masklets import UInt8Array

JPEG_QUALITY = 85


class SourcePump:
    """Reads a source in a thread, at its own speed, and hands its frames to the event loop.

    Args:
        source: closed when the pump ends, or is stopped before it ran.
        page_codec: what the page decodes.
        take: called on the loop with a frame, what the page gets of it, and when it was due, ms.
    """

    def __init__(
        self, source: Source, page_codec: Codec, take: Callable[[Frame, bytes, float], None]
    ) -> None:
        self._source = source
        self._page_codec = page_codec
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._is_started = False
        self._stopping = threading.Event()
        self._decoder: PacketDecoder | None = None

    async def run(self) -> None:
        """Run until the source ends.

        Raises:
            SourceError: it became unreadable.
        """
        self._is_started = True
        ended: asyncio.Future[None] = self._loop.create_future()
        threading.Thread(target=self._work, args=(ended,), name="trocar-source", daemon=True).start()
        await ended

    def stop(self) -> None:
        """Read no more; the thread closes the source on its way out, or another one where none runs."""
        self._stopping.set()
        if not self._is_started:
            # A camera may take its time over a farewell.
            threading.Thread(target=self._source.close, name="trocar-source", daemon=True).start()

    def _work(self, ended: "asyncio.Future[None]") -> None:
        failure: Exception | None = None
        try:
            self._read()
        except Exception as error:  # told to whoever waits
            failure = error
        finally:
            self._source.close()
        # Nobody waits for an end that was asked for, and the loop may be gone.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(_settle, ended, failure)

    def _read(self) -> None:
        started_s: float | None = None
        first_pts = 0
        for source_frame in self._source.read():
            now_s = time.monotonic()
            due_s = now_s
            if not self._source.is_live:
                if started_s is None:
                    started_s, first_pts = now_s, source_frame.frame.pts or 0
                ticks = (source_frame.frame.pts or 0) - first_pts
                due_s = started_s + float(ticks * self._source.time_base)
            if self._stopping.wait(max(0.0, due_s - now_s)):
                return
            payload = self._make_payload(source_frame)
            if payload is not None:
                self._loop.call_soon_threadsafe(self._take, source_frame.frame, payload, due_s * 1_000)

    def _make_payload(self, source_frame: SourceFrame) -> bytes | None:
        """What the page gets: the packet itself, or its picture as JPEG; None where there is no picture."""
        if self._page_codec is self._source.codec:
            return source_frame.frame.payload
        rgb = source_frame.rgb if source_frame.rgb is not None else self._decode(source_frame.frame)
        if rgb is None:
            return None
        bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
        return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()

    def _decode(self, frame: Frame) -> UInt8Array | None:
        if self._decoder is None:
            video = VideoFormat(codec=self._source.codec, max_pixels=LARGEST_PICTURE_PX)
            self._decoder = PacketDecoder(video)
        picture = self._decoder.decode(Packet(frame_id=0, payload=frame.payload)).picture
        return None if picture is None else picture.rgb


def _settle(ended: "asyncio.Future[None]", failure: Exception | None) -> None:
    if ended.done():
        return
    if failure is None:
        ended.set_result(None)
    else:
        ended.set_exception(failure)
