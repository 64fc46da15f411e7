"""The Python client, with a blocking and an asynchronous face over one core.

    with connect("127.0.0.1:50051") as client, client.open_stream(options) as stream:
        for event in stream.track(requests):
            ...

`requests` yields `Frame`, `Prompt`, `Pin` and `Removal` values; events are those of `client_core`. A stream
outlives its server: when that fails or shuts down, whoever iterates over the events takes the stream up
again, there or at the next address, and a `Resumed` event tells what was missed.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import grpc
from grpc import aio

from trocar.client_core import (
    Event,
    KeyframeWanted,
    Notice,
    Reconnect,
    Request,
    StreamCore,
    StreamOptions,
)
from trocar.client_core import Frame as Frame
from trocar.config import Access
from trocar.errors import ConfigError, ConnectionFailedError
from trocar.messages import SHUTTING_DOWN
from trocar.security import BEARER
from trocar.v1 import tracking_pb2 as pb
from trocar.v1 import tracking_pb2_grpc as pb_grpc

KeyframeHook = Callable[[int], None]
"""Called with a frame_id when the server wants a keyframe: make the encoder send one."""
Metadata = tuple[tuple[str, str], ...]

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # The server admits pings every 5 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # A server that comes back is found within a moment; otherwise after a second at first, then two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
CONNECT_TIMEOUT_S = 5.0
HEAD_START_S = 0.2
"""For servers that stand before the one that answers first."""
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0
"""Between two rounds through all addresses."""
LOOKS_PER_SILENCE = 4


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Link:
    """A server that may be called."""

    address: str
    channel: grpc.Channel
    stub: pb_grpc.TrackingServiceStub


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _AsyncLink:
    """A server that may be called from an event loop."""

    address: str
    channel: aio.Channel
    stub: "pb_grpc.TrackingServiceAsyncStub"


def connect(
    address: str | Sequence[str],
    *,
    timeout_s: float = CONNECT_TIMEOUT_S,
    access: Access | None = None,
    reconnect: Reconnect | None = None,
) -> "Client":
    """Connect to a server.

    Args:
        address: host:port, or several in the order of preference.
        timeout_s: for one of them to answer.
        access: TLS and token; None connects in plain text, to this machine only.
        reconnect: how streams outlive their server; None takes the defaults.

    Raises:
        ConfigError: no address, or one that needs TLS.
        ConnectionFailedError: nobody answers.
    """
    access = access or Access()
    credentials = _read_credentials(access)
    links = []
    for one in _list_addresses(address, access):
        channel = (
            grpc.insecure_channel(one, options=CHANNEL_OPTIONS)
            if credentials is None
            else grpc.secure_channel(one, credentials, options=CHANNEL_OPTIONS)
        )
        links.append(_Link(address=one, channel=channel, stub=pb_grpc.TrackingServiceStub(channel)))
    ready: queue.SimpleQueue[int] = queue.SimpleQueue()
    waiting = [grpc.channel_ready_future(link.channel) for link in links]
    for index, future in enumerate(waiting):
        future.add_done_callback(partial(_note_ready, ready, index))
    try:
        first = ready.get(timeout=timeout_s)
        with suppress(queue.Empty):
            while first:
                first = min(first, ready.get(timeout=HEAD_START_S))
    except queue.Empty:
        for link in links:
            link.channel.close()
        raise _describe_silence([link.address for link in links], timeout_s, access) from None
    finally:
        for future in waiting:
            future.cancel()
    return Client(links, first, _write_metadata(access), reconnect or Reconnect())


async def connect_async(
    address: str | Sequence[str],
    *,
    timeout_s: float = CONNECT_TIMEOUT_S,
    access: Access | None = None,
    reconnect: Reconnect | None = None,
) -> "AsyncClient":
    """Connect to a server from an event loop; see `connect`."""
    access = access or Access()
    credentials = _read_credentials(access)
    links = []
    for one in _list_addresses(address, access):
        channel = (
            aio.insecure_channel(one, options=CHANNEL_OPTIONS)
            if credentials is None
            else aio.secure_channel(one, credentials, options=CHANNEL_OPTIONS)
        )
        stub: pb_grpc.TrackingServiceAsyncStub = pb_grpc.TrackingServiceStub(channel)
        links.append(_AsyncLink(address=one, channel=channel, stub=stub))
    waiting = [asyncio.ensure_future(link.channel.channel_ready()) for link in links]
    done, _ = await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    if not done:
        for future in waiting:
            future.cancel()
        for link in links:
            await link.channel.close(None)
        raise _describe_silence([link.address for link in links], timeout_s, access)
    first = min(index for index, future in enumerate(waiting) if future in done)
    if first:
        await asyncio.wait(waiting[:first], timeout=HEAD_START_S)
        first = min(index for index, future in enumerate(waiting) if future.done())
    for future in waiting:
        future.cancel()
    return AsyncClient(links, first, _write_metadata(access), reconnect or Reconnect())


class Client:
    """A connection to one or several servers; opens any number of streams. From `connect`."""

    def __init__(self, links: Sequence[_Link], first: int, metadata: Metadata, reconnect: Reconnect) -> None:
        self._links = links
        self._first = first
        self._metadata = metadata
        self._reconnect = reconnect

    def server_info(self) -> pb.GetServerInfoResponse:
        """Ask the first server that answered for models, limits and load.

        Raises:
            ConnectionFailedError: it refuses, or does not answer within `Reconnect.silence_s`.
        """
        try:
            stub = self._links[self._first].stub
            return stub.GetServerInfo(
                pb.GetServerInfoRequest(), metadata=self._metadata, timeout=self._reconnect.silence_s
            )
        except grpc.RpcError as error:
            raise _describe_failure(error) from error

    def open_stream(
        self, options: StreamOptions, *, on_keyframe_wanted: KeyframeHook | None = None
    ) -> "Stream":
        """Open a stream."""
        return Stream(options, self._links, self._first, self._metadata, self._reconnect, on_keyframe_wanted)

    def close(self) -> None:
        """Hang up."""
        for link in self._links:
            link.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stream:
    """One video stream, blocking. One thread may send while another iterates over the events."""

    def __init__(
        self,
        options: StreamOptions,
        links: Sequence[_Link],
        first: int,
        metadata: Metadata,
        reconnect: Reconnect,
        on_keyframe_wanted: KeyframeHook | None,
    ) -> None:
        self._core = StreamCore(options)
        self._links = links
        self._link = first
        self._metadata = metadata
        self._reconnect = reconnect
        self._on_keyframe_wanted = on_keyframe_wanted
        self._changed = threading.Condition()
        self._is_over = False
        self._calls = 0
        self._call = self._dial()
        self._watchdog = threading.Thread(target=self._watch, name="trocar-watchdog", daemon=True)
        self._watchdog.start()

    @property
    def unanswered_frames(self) -> int:
        """Frames sent and not accounted for yet."""
        return self._core.unanswered_frames

    @property
    def address(self) -> str:
        """host:port of the server that has the stream."""
        return self._links[self._link].address

    def send(self, request: Request) -> bool:
        """Send a frame, prompt or removal.

        When every frame is to be tracked, a frame waits until the server has answered enough others: iterate
        over the events in another thread, or use `track`. On a live stream nothing waits. Between two servers
        what is sent waits for the next one.

        Returns:
            False when the frame was not sent: the stream is over, or live and the server hopelessly late.
        """
        with self._changed:
            if isinstance(request, Frame):
                if not self._core.options.is_live:
                    self._changed.wait_for(lambda: self._core.has_room or self._is_over)
                if self._is_over or not self._core.has_room:
                    self._core.note_unsent()
                    return False
            self._core.write(request)
            self._changed.notify_all()
        return not self._is_over

    def reset(self) -> None:
        """Forget all objects."""
        with self._changed:
            self._core.write_reset()
            self._changed.notify_all()

    def finish(self) -> None:
        """Say that nothing more will be sent; what was sent is still answered."""
        with self._changed:
            self._core.finish()
            self._changed.notify_all()

    def track(self, requests: Iterable[Request]) -> Generator[Event]:
        """Send all requests from a thread of its own and yield the events until the last is answered.

        Raises:
            ConnectionFailedError: the call failed, and no server took the stream up again.
            Exception: whatever `requests` raised.
        """
        failures: list[BaseException] = []
        sender = threading.Thread(target=self._send_all, args=(requests, failures), daemon=True)
        sender.start()
        try:
            yield from self
        except ConnectionFailedError:
            # Cancelling is how the sender stops us: its reason is the one to tell.
            if not failures:
                raise
        finally:
            self.close()
            sender.join()
        if failures:
            raise failures[0]

    def __iter__(self) -> Iterator[Event]:
        try:
            while True:
                try:
                    yield from self._read_call()
                    fault = None
                except grpc.RpcError as error:
                    fault = error
                if self._is_over or self._core.is_done:
                    break
                if fault is None and not self._core.is_leaving:
                    return
                self._take_up(fault)
            if fault is not None and not self._core.is_done:
                raise _describe_failure(fault) from fault
        finally:
            self._end()

    def close(self) -> None:
        """End the call at once."""
        self._end()
        self._call.cancel()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_call(self) -> Iterator[Event]:
        """Events of the present call."""
        while (response := self._receive()) is not None:
            event = self._core.read(response)
            with self._changed:
                self._changed.notify_all()
            if event is not None:
                yield from self._tell(event)
            yield from self._core.take_own_events()

    def _tell(self, event: Event) -> Iterator[Event]:
        if isinstance(event, KeyframeWanted) and self._on_keyframe_wanted is not None:
            self._on_keyframe_wanted(event.frame_id)
        if isinstance(event, Notice) and event.reason == SHUTTING_DOWN and len(self._links) > 1:
            self._core.leave()
            with self._changed:
                self._changed.notify_all()
        yield event

    def _receive(self) -> pb.TrackResponse | None:
        self._core.begin_listening()
        try:
            return next(iter(self._call))
        except StopIteration:
            return None
        finally:
            self._core.end_listening()

    def _take_up(self, fault: grpc.RpcError | None) -> None:
        """Call the next server after a fault; its answer, or its own fault, is read like any other.

        Raises:
            ConnectionFailedError: it is no use, or time is up.
        """
        self._core.note_fault()
        if fault is not None:
            code = _read_code(fault)
            is_late = self._core.outage_s() >= self._reconnect.timeout_s
            if is_late or not self._core.may_resume(code):
                raise _describe_failure(fault) from fault
        self._link = (self._link + 1) % len(self._links)
        pause_s = _find_pause(self._core.attempts, len(self._links))
        with self._changed:
            self._changed.wait_for(lambda: self._is_over, pause_s)
            if self._is_over:
                return
            self._core.rewind(self.address)
            self._call = self._dial()
            self._changed.notify_all()

    def _dial(self) -> "grpc.CallIterator[pb.TrackResponse]":
        self._calls += 1
        return self._links[self._link].stub.Track(self._give_out(self._calls), metadata=self._metadata)

    def _give_out(self, number: int) -> Iterator[pb.TrackRequest]:
        """Messages of one call; runs in gRPC's own thread."""
        yield self._core.write_open()
        while (message := self._next_message(number)) is not None:
            yield message

    def _next_message(self, number: int) -> pb.TrackRequest | None:
        with self._changed:
            while number == self._calls and not self._is_over:
                message = self._core.take()
                if message is not None:
                    return message if isinstance(message, pb.TrackRequest) else None
                self._changed.wait()
        return None

    def _watch(self) -> None:
        """Give up a server that owes an answer and says nothing; runs in a thread of its own."""
        silence_s = self._reconnect.silence_s
        with self._changed:
            while not self._is_over:
                self._changed.wait_for(lambda: self._is_over, silence_s / LOOKS_PER_SILENCE)
                if self._core.is_server_silent(silence_s):
                    self._call.cancel()  # type: ignore[no-untyped-call]

    def _send_all(self, requests: Iterable[Request], failures: list[BaseException]) -> None:
        try:
            for request in requests:
                if not self.send(request) and self._is_over:
                    return
            self.finish()
        except Exception as failure:
            failures.append(failure)
            self.close()

    def _end(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


class AsyncClient:
    """A connection to one or several servers; opens any number of streams. From `connect_async`."""

    def __init__(
        self, links: Sequence[_AsyncLink], first: int, metadata: Metadata, reconnect: Reconnect
    ) -> None:
        self._links = links
        self._first = first
        self._metadata = metadata
        self._reconnect = reconnect

    async def server_info(self) -> pb.GetServerInfoResponse:
        """Ask the first server that answered for models, limits and load; see `Client.server_info`."""
        try:
            stub = self._links[self._first].stub
            return await stub.GetServerInfo(
                pb.GetServerInfoRequest(), metadata=self._metadata, timeout=self._reconnect.silence_s
            )
        except aio.AioRpcError as error:
            raise _describe_failure(error) from error

    def open_stream(
        self, options: StreamOptions, *, on_keyframe_wanted: KeyframeHook | None = None
    ) -> "AsyncStream":
        """Open a stream."""
        return AsyncStream(
            options, self._links, self._first, self._metadata, self._reconnect, on_keyframe_wanted
        )

    async def close(self) -> None:
        """Hang up."""
        for link in self._links:
            await link.channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncStream:
    """One video stream, asynchronous. One task may send while another iterates over the events."""

    def __init__(
        self,
        options: StreamOptions,
        links: Sequence[_AsyncLink],
        first: int,
        metadata: Metadata,
        reconnect: Reconnect,
        on_keyframe_wanted: KeyframeHook | None,
    ) -> None:
        self._core = StreamCore(options)
        self._links = links
        self._link = first
        self._metadata = metadata
        self._reconnect = reconnect
        self._on_keyframe_wanted = on_keyframe_wanted
        self._changed = asyncio.Condition()
        self._is_over = False
        self._dial()
        self._watchdog = asyncio.ensure_future(self._watch())

    @property
    def unanswered_frames(self) -> int:
        """Frames sent and not accounted for yet."""
        return self._core.unanswered_frames

    @property
    def address(self) -> str:
        """host:port of the server that has the stream."""
        return self._links[self._link].address

    async def send(self, request: Request) -> bool:
        """Send a frame, prompt or removal; see `Stream.send`."""
        async with self._changed:
            if isinstance(request, Frame):
                if not self._core.options.is_live:
                    await self._changed.wait_for(lambda: self._core.has_room or self._is_over)
                if self._is_over or not self._core.has_room:
                    self._core.note_unsent()
                    return False
            self._core.write(request)
            self._changed.notify_all()
        return not self._is_over

    async def reset(self) -> None:
        """Forget all objects."""
        self._core.write_reset()
        await self._notify()

    async def finish(self) -> None:
        """Say that nothing more will be sent; what was sent is still answered."""
        self._core.finish()
        await self._notify()

    async def track(self, requests: AsyncIterator[Request]) -> AsyncIterator[Event]:
        """Send all requests from a task of its own and yield the events until the last is answered."""
        sender = asyncio.create_task(self._send_all(requests))
        try:
            async for event in self:
                yield event
        except ConnectionFailedError:
            # Cancelling is how the sender stops us: its reason is the one to tell.
            if not (sender.done() and sender.exception()):
                raise
        finally:
            self.close()
            await self._farewell
        await sender

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            while True:
                fault = None
                try:
                    async for event in self._read_call():
                        yield event
                except aio.AioRpcError as error:
                    fault = error
                except asyncio.CancelledError:
                    task = asyncio.current_task()
                    if task is not None and task.cancelling():
                        raise
                    # It was the call that was cancelled: by `close`, or by the watchdog.
                    fault = _make_cancelled()
                if self._is_over or self._core.is_done:
                    break
                if fault is None and not self._core.is_leaving:
                    return
                await self._take_up(fault)
            if fault is not None and not self._core.is_done:
                raise _describe_failure(fault) from fault
        finally:
            self._is_over = True
            self._pump.cancel()
            self._watchdog.cancel()
            await self._notify()

    def close(self) -> None:
        """End the call at once; whoever waits to send learns of it."""
        self._is_over = True
        self._pump.cancel()
        self._watchdog.cancel()
        self._call.cancel()
        self._farewell = asyncio.ensure_future(self._notify())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        await self._farewell

    async def _read_call(self) -> AsyncIterator[Event]:
        """Events of the present call."""
        while (response := await self._receive()) is not None:
            event = self._core.read(response)
            if isinstance(event, KeyframeWanted) and self._on_keyframe_wanted is not None:
                self._on_keyframe_wanted(event.frame_id)
            if isinstance(event, Notice) and event.reason == SHUTTING_DOWN and len(self._links) > 1:
                self._core.leave()
            await self._notify()
            if event is not None:
                yield event
            for own_event in self._core.take_own_events():
                yield own_event

    async def _receive(self) -> pb.TrackResponse | None:
        self._core.begin_listening()
        try:
            response = await self._call.read()
        finally:
            self._core.end_listening()
        # At the end of a call that went well, and of one that did not, `read` returns the same.
        if isinstance(response, pb.TrackResponse):
            return response
        code = await self._call.code()
        if code is grpc.StatusCode.OK:
            return None
        raise _make_failure(code, await self._call.details() or "")

    async def _take_up(self, fault: aio.AioRpcError | None) -> None:
        """Call the next server after a fault; see `Stream._take_up`."""
        self._core.note_fault()
        if fault is not None:
            is_late = self._core.outage_s() >= self._reconnect.timeout_s
            if is_late or not self._core.may_resume(fault.code()):
                raise _describe_failure(fault) from fault
        self._link = (self._link + 1) % len(self._links)
        await asyncio.sleep(_find_pause(self._core.attempts, len(self._links)))
        if self._is_over:
            return
        self._pump.cancel()
        self._core.rewind(self.address)
        self._dial()

    def _dial(self) -> None:
        self._call = self._links[self._link].stub.Track(metadata=self._metadata)  # type: ignore[call-arg]
        self._pump = asyncio.ensure_future(self._give_out(self._call))

    async def _give_out(self, call: "aio.StreamStreamCall[pb.TrackRequest, pb.TrackResponse]") -> None:
        """Write the messages of one call; whoever iterates over the events learns when it fails."""
        try:
            await call.write(self._core.write_open())
            while (message := await self._next_message()) is not None:
                await call.write(message)
            await call.done_writing()
        except (aio.AioRpcError, asyncio.InvalidStateError):
            return

    async def _next_message(self) -> pb.TrackRequest | None:
        async with self._changed:
            while (message := self._core.take()) is None:
                await self._changed.wait()
            return message if isinstance(message, pb.TrackRequest) else None

    async def _watch(self) -> None:
        """Give up a server that owes an answer and says nothing; see `Stream._watch`."""
        silence_s = self._reconnect.silence_s
        while not self._is_over:
            await asyncio.sleep(silence_s / LOOKS_PER_SILENCE)
            if self._core.is_server_silent(silence_s):
                self._call.cancel()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _send_all(self, requests: AsyncIterator[Request]) -> None:
        try:
            async for request in requests:
                if not await self.send(request) and self._is_over:
                    return
            await self.finish()
        except Exception:
            self.close()
            raise


def _list_addresses(address: str | Sequence[str], access: Access) -> Sequence[str]:
    addresses = [address] if isinstance(address, str) else list(address)
    if not addresses:
        raise ConfigError("no address to connect to: give at least one host:port")
    for one in addresses:
        access.check(one)
    return addresses


def _note_ready(ready: "queue.SimpleQueue[int]", index: int, done: "grpc.Future[None]") -> None:
    if not done.cancelled():
        ready.put(index)


def _read_credentials(access: Access) -> grpc.ChannelCredentials | None:
    if access.ca is None:
        return None
    files = (access.ca, access.key, access.certificate)
    try:
        pems = [None if file is None else file.read_bytes() for file in files]
    except OSError as error:
        raise ConfigError(f"TLS file {error.filename}: {error.strerror}") from error
    return grpc.ssl_channel_credentials(*pems)


def _write_metadata(access: Access) -> Metadata:
    return (("authorization", BEARER + access.token),) if access.token else ()


def _find_pause(attempts: int, links: int) -> float:
    """Seconds before another attempt: none within a round through all servers, then more and more."""
    rounds = attempts // links
    if attempts % links or not rounds:
        return 0.0
    return float(min(FIRST_PAUSE_S * 2 ** (rounds - 1), LONGEST_PAUSE_S))


def _describe_silence(addresses: Sequence[str], timeout_s: float, access: Access) -> ConnectionFailedError:
    hint = "" if access.ca is None else "; if it runs, its log says whether it refuses the certificate"
    return ConnectionFailedError(
        f"no server answers at {' or '.join(addresses)} within {timeout_s:g} s: start one with "
        f"`trocar serve`, or check the address{hint}"
    )


def _read_code(error: grpc.RpcError) -> grpc.StatusCode:
    # Every error of a finished call is also a grpc.Call, which knows the code.
    assert isinstance(error, grpc.Call | aio.AioRpcError)
    return error.code()


def _describe_failure(error: grpc.RpcError) -> ConnectionFailedError:
    assert isinstance(error, grpc.Call | aio.AioRpcError)
    return ConnectionFailedError(f"{error.code().name}: {error.details()}")


def _make_failure(code: grpc.StatusCode, details: str) -> aio.AioRpcError:
    return aio.AioRpcError(code, aio.Metadata(), aio.Metadata(), details, None)


def _make_cancelled() -> aio.AioRpcError:
    return _make_failure(grpc.StatusCode.CANCELLED, "the stream was closed")
