"""The gateway's line to a tracking server: kept up, and begun anew when it breaks."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from trocar.client import Client, Stream, connect
from trocar.client_core import Event, Frame, Opened, Reconnect, Request, StreamOptions
from trocar.config import Access
from trocar.errors import ConnectionFailedError
from trocar.lifeline import Lifeline
from trocar.v1 import tracking_pb2 as pb
from trocar_engines.errors import TrocarError

CONNECT_TIMEOUT_S = 2.0
RETRY_S = 0.5
"""Between two attempts: the surgeon waits for it."""
SILENCE_S = 5.0
"""An answer is owed and nothing comes for so long: the server hangs."""
CHECK_S = 1.0
REPLAY_FRAMES = 8
"""Unanswered frames of a replay; more would make a live server skip some of them."""
REPLAY_POLL_S = 0.005


@dataclass(frozen=True, kw_only=True)
class LinkState:
    """How the line is.

    Args:
        is_up: frames go out and results come back.
        message: why not, for people.
        opened: what the stream is like, when up.
        runtime: what runs the model there.
    """

    is_up: bool
    message: str = ""
    opened: Opened | None = None
    runtime: str = ""


class TrackerLink:
    """One stream to a server, for as long as `run` runs. Used from one event loop.

    Args:
        address: host:port, or several with commas between them, in the order of preference.
        access: to the server.
        options: of the stream.
        lifeline: what a new stream begins with.
        on_event: called on the loop with every event.
        on_state: called on the loop when the line comes up or breaks.
        on_keyframe_wanted: called on the loop when the next frame should be a keyframe.
        silence_s: after which a server that owes an answer is given up.
    """

    def __init__(
        self,
        address: str,
        access: Access,
        options: StreamOptions,
        lifeline: Lifeline,
        *,
        on_event: Callable[[Event], None],
        on_state: Callable[[LinkState], None],
        on_keyframe_wanted: Callable[[], None],
        silence_s: float = SILENCE_S,
    ) -> None:
        self._address, self._access = address, access
        self._options = options
        self._lifeline = lifeline
        self._on_event = on_event
        self._on_state = on_state
        self._on_keyframe_wanted = on_keyframe_wanted
        self._silence_s = silence_s
        self._stream: Stream | None = None
        self._awaits_keyframe = True
        self._owes_answer = False

    @property
    def is_up(self) -> bool:
        """Whether requests reach a server."""
        return self._stream is not None

    async def run(self) -> None:
        """Connect, and connect again whenever the line breaks, until cancelled."""
        while True:
            try:
                await self._serve_connection()
            except ConnectionFailedError as failure:
                self._on_state(LinkState(is_up=False, message=str(failure)))
            await asyncio.sleep(RETRY_S)

    def send_frame(self, frame: Frame, *, is_keyframe: bool) -> bool:
        """Send a frame and keep it for a replay; False when no server got it."""
        self._lifeline.note_frame(frame, is_keyframe=is_keyframe)
        if self._stream is None or (self._awaits_keyframe and not is_keyframe):
            return False
        self._awaits_keyframe = False
        self._owes_answer = True
        return self._stream.send(frame)

    def send(self, request: Request) -> bool:
        """Send anything else; False when no server got it."""
        return self._stream is not None and self._stream.send(request)

    async def _serve_connection(self) -> None:
        # The show goes on while the line is down: beginning anew is ours, with what the page wants by then.
        client = await asyncio.to_thread(
            connect,
            self._address.split(","),
            timeout_s=CONNECT_TIMEOUT_S,
            access=self._access,
            reconnect=Reconnect(timeout_s=0),
        )
        try:
            info = await self._ask(client)
            runtimes = {card.name: card.runtime for card in info.models}
            with client.open_stream(self._options) as stream:
                await self._serve_stream(stream, runtimes)
        finally:
            self._stream = None
            client.close()

    async def _ask(self, client: Client) -> pb.GetServerInfoResponse:
        # A call without end would be the end of all attempts; hanging up ends the thread.
        try:
            async with asyncio.timeout(self._silence_s):
                return await asyncio.to_thread(client.server_info)
        except TimeoutError:
            raise self._describe_silence() from None

    def _describe_silence(self) -> ConnectionFailedError:
        return ConnectionFailedError(f"the server at {self._address} has stopped answering")

    async def _serve_stream(self, stream: Stream, runtimes: dict[str, str]) -> None:
        events: asyncio.Queue[Event | ConnectionFailedError] = asyncio.Queue()
        reader = threading.Thread(
            target=_read_events,
            args=(stream, asyncio.get_running_loop(), events),
            name="trocar-link",
            daemon=True,
        )
        reader.start()
        self._owes_answer = True
        opened = await self._next_event(events)
        assert isinstance(opened, Opened)
        await self._replay(stream)
        self._stream, self._awaits_keyframe = stream, True
        self._on_state(LinkState(is_up=True, opened=opened, runtime=runtimes.get(opened.model, "")))
        self._on_keyframe_wanted()
        while True:
            self._on_event(await self._next_event(events))

    async def _next_event(self, events: "asyncio.Queue[Event | ConnectionFailedError]") -> Event:
        heard_s = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHECK_S):
                    event = await events.get()
                if isinstance(event, ConnectionFailedError):
                    raise event
                self._owes_answer = False
                return event
            if self._owes_answer and time.monotonic() - heard_s > self._silence_s:
                raise self._describe_silence()

    async def _replay(self, stream: Stream) -> None:
        for request in self._lifeline.replay():
            began_s = time.monotonic()
            while isinstance(request, Frame) and stream.unanswered_frames >= REPLAY_FRAMES:
                if time.monotonic() - began_s > self._silence_s:
                    raise self._describe_silence()
                await asyncio.sleep(REPLAY_POLL_S)
            if not stream.send(request):
                return


def _read_events(
    stream: Stream,
    loop: asyncio.AbstractEventLoop,
    events: "asyncio.Queue[Event | ConnectionFailedError]",
) -> None:
    """Hand the events to the loop; ends with the reason why there are no more."""
    failure = ConnectionFailedError("the server ended the stream")
    # The loop may be closed by the time a cancelled call ends.
    with contextlib.suppress(RuntimeError):
        try:
            for event in stream:
                loop.call_soon_threadsafe(events.put_nowait, event)
        except TrocarError as error:
            # Also an answer that cannot be read: the line is of no more use, and the reason is to be told.
            failure = ConnectionFailedError(str(error))
        finally:
            loop.call_soon_threadsafe(events.put_nowait, failure)
