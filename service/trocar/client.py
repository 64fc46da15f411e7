"""The Python client, with a blocking and an asynchronous face over one core.

    with connect("127.0.0.1:50051") as client, client.open_stream(options) as stream:
        for event in stream.track(requests):
            ...

`requests` yields `Frame`, `Prompt` and `Removal` values; events are those of `client_core`.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from types import TracebackType
from typing import Self

import grpc
from grpc import aio

from trocar.client_core import Event, KeyframeWanted, Request, StreamCore, StreamOptions
from trocar.client_core import Frame as Frame
from trocar.errors import ConnectionFailedError
from trocar.v1 import tracking_pb2 as pb
from trocar.v1 import tracking_pb2_grpc as pb_grpc

KeyframeHook = Callable[[int], None]
"""Called with a frame_id when the server wants a keyframe: make the encoder send one."""

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # The server admits pings every 5 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
]
CONNECT_TIMEOUT_S = 5.0


def connect(address: str, *, timeout_s: float = CONNECT_TIMEOUT_S) -> "Client":
    """Connect to a server.

    Raises:
        ConnectionFailedError: nobody answers.
    """
    channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    try:
        grpc.channel_ready_future(channel).result(timeout=timeout_s)
    except grpc.FutureTimeoutError:
        channel.close()
        raise _describe_silence(address, timeout_s) from None
    return Client(channel)


async def connect_async(address: str, *, timeout_s: float = CONNECT_TIMEOUT_S) -> "AsyncClient":
    """Connect to a server from an event loop.

    Raises:
        ConnectionFailedError: nobody answers.
    """
    channel = aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    try:
        await asyncio.wait_for(channel.channel_ready(), timeout_s)
    except TimeoutError:
        await channel.close(None)
        raise _describe_silence(address, timeout_s) from None
    return AsyncClient(channel)


class Client:
    """A connection; opens any number of streams. From `connect`."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._stub = pb_grpc.TrackingServiceStub(channel)

    def server_info(self) -> pb.GetServerInfoResponse:
        """Ask for models, limits and load."""
        try:
            return self._stub.GetServerInfo(pb.GetServerInfoRequest())
        except grpc.RpcError as error:
            raise _describe_failure(error) from error

    def open_stream(
        self, options: StreamOptions, *, on_keyframe_wanted: KeyframeHook | None = None
    ) -> "Stream":
        """Open a stream."""
        return Stream(self._stub, options, on_keyframe_wanted)

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stream:
    """One video stream, blocking. One thread may send while another iterates over the events."""

    def __init__(
        self,
        stub: pb_grpc.TrackingServiceStub,
        options: StreamOptions,
        on_keyframe_wanted: KeyframeHook | None,
    ) -> None:
        self._core = StreamCore(options)
        self._on_keyframe_wanted = on_keyframe_wanted
        self._outgoing: queue.SimpleQueue[pb.TrackRequest | None] = queue.SimpleQueue()
        self._answered = threading.Condition()
        self._is_over = False
        self._outgoing.put(self._core.write_open())
        self._call = stub.Track(iter(self._outgoing.get, None))

    @property
    def unanswered_frames(self) -> int:
        """Frames sent and not accounted for yet."""
        return self._core.unanswered_frames

    def send(self, request: Request) -> bool:
        """Send a frame, prompt or removal.

        When every frame is to be tracked, a frame waits until the server has answered enough others: iterate
        over the events in another thread, or use `track`. On a live stream nothing waits.

        Returns:
            False when the frame was not sent: the stream is over, or live and the server hopelessly late.
        """
        if isinstance(request, Frame):
            with self._answered:
                if not self._core.options.is_live:
                    self._answered.wait_for(lambda: self._core.has_room or self._is_over)
                if self._is_over or not self._core.has_room:
                    return False
        self._outgoing.put(self._core.write(request))
        return not self._is_over

    def reset(self) -> None:
        """Forget all objects."""
        self._outgoing.put(self._core.write_reset())

    def finish(self) -> None:
        """Say that nothing more will be sent; what was sent is still answered."""
        self._outgoing.put(None)

    def track(self, requests: Iterable[Request]) -> Generator[Event]:
        """Send all requests from a thread of its own and yield the events until the last is answered.

        Raises:
            ConnectionFailedError: the call failed.
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
            for response in self._call:
                event = self._core.read(response)
                with self._answered:
                    self._answered.notify_all()
                if isinstance(event, KeyframeWanted) and self._on_keyframe_wanted is not None:
                    self._on_keyframe_wanted(event.frame_id)
                yield event
        except grpc.RpcError as error:
            raise _describe_failure(error) from error
        finally:
            self._end()

    def close(self) -> None:
        """End the call at once."""
        self._call.cancel()  # type: ignore[no-untyped-call]
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        with self._answered:
            self._is_over = True
            self._answered.notify_all()
        self._outgoing.put(None)


class AsyncClient:
    """A connection; opens any number of streams. From `connect_async`."""

    def __init__(self, channel: aio.Channel) -> None:
        self._channel = channel
        self._stub = pb_grpc.TrackingServiceStub(channel)

    async def server_info(self) -> pb.GetServerInfoResponse:
        """Ask for models, limits and load."""
        try:
            return await self._stub.GetServerInfo(pb.GetServerInfoRequest())
        except aio.AioRpcError as error:
            raise _describe_failure(error) from error

    def open_stream(
        self, options: StreamOptions, *, on_keyframe_wanted: KeyframeHook | None = None
    ) -> "AsyncStream":
        """Open a stream."""
        return AsyncStream(self._stub, options, on_keyframe_wanted)

    async def close(self) -> None:
        """Hang up."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncStream:
    """One video stream, asynchronous. One task may send while another iterates over the events."""

    def __init__(
        self,
        stub: "pb_grpc.TrackingServiceAsyncStub",
        options: StreamOptions,
        on_keyframe_wanted: KeyframeHook | None,
    ) -> None:
        self._core = StreamCore(options)
        self._on_keyframe_wanted = on_keyframe_wanted
        self._answered = asyncio.Condition()
        self._is_open = False
        self._is_over = False
        self._call = stub.Track()  # type: ignore[call-arg]

    @property
    def unanswered_frames(self) -> int:
        """Frames sent and not accounted for yet."""
        return self._core.unanswered_frames

    async def send(self, request: Request) -> bool:
        """Send a frame, prompt or removal; see `Stream.send`."""
        if isinstance(request, Frame):
            async with self._answered:
                if not self._core.options.is_live:
                    await self._answered.wait_for(lambda: self._core.has_room or self._is_over)
                if self._is_over or not self._core.has_room:
                    return False
        await self._write(self._core.write(request))
        return not self._is_over

    async def reset(self) -> None:
        """Forget all objects."""
        await self._write(self._core.write_reset())

    async def finish(self) -> None:
        """Say that nothing more will be sent; what was sent is still answered."""
        await self._call.done_writing()

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
        await sender

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            async for response in self._call:
                event = self._core.read(response)
                async with self._answered:
                    self._answered.notify_all()
                if isinstance(event, KeyframeWanted) and self._on_keyframe_wanted is not None:
                    self._on_keyframe_wanted(event.frame_id)
                yield event
        except aio.AioRpcError as error:
            raise _describe_failure(error) from error
        except asyncio.CancelledError:
            if not self._is_over:
                raise
            raise ConnectionFailedError("CANCELLED: the stream was closed") from None
        finally:
            self._is_over = True
            async with self._answered:
                self._answered.notify_all()

    def close(self) -> None:
        """End the call at once."""
        self._is_over = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        await self._call.write(self._core.write_open())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def _write(self, request: pb.TrackRequest) -> None:
        try:
            await self._call.write(request)
        except (aio.AioRpcError, asyncio.InvalidStateError):
            # The call is over; whoever iterates over the events learns why.
            self._is_over = True

    async def _send_all(self, requests: AsyncIterator[Request]) -> None:
        try:
            async for request in requests:
                if not await self.send(request) and self._is_over:
                    return
            await self.finish()
        except Exception:
            self.close()
            raise


def _describe_silence(address: str, timeout_s: float) -> ConnectionFailedError:
    return ConnectionFailedError(
        f"no server answers at {address} within {timeout_s:g} s: start one with `trocar serve`, or check "
        "the address"
    )


def _describe_failure(error: grpc.RpcError) -> ConnectionFailedError:
    # Every error of a finished call is also a grpc.Call, which knows the code.
    assert isinstance(error, grpc.Call | aio.AioRpcError)
    return ConnectionFailedError(f"{error.code().name}: {error.details()}")
