"""What every call goes through before its method: its turn, and a message that is one."""

import asyncio
import inspect
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from trocar.errors import LimitError
from trocar.security import Rate

CALL_BURST = 15
"""At once, on top of a second's; twice as many as there are streams, where that is more: a client that comes
back calls for all of them."""
LONGEST_TURN_S = 10.0
"""For which a call waits, before it is refused."""
MOST_CONNECTIONS = 4_096
"""Whose calls are counted: the ones that called last."""
NO_MESSAGE = "bytes that are no message of this method: see trocar.v1"
Handler = Any
"""grpc.RpcMethodHandler, whose attributes no stub knows; None for an unknown method."""
Context = aio.ServicerContext[Any, Any]

log = logging.getLogger(__name__)


class CallTurns:
    """Lets each connection call so many times a second, and makes it wait beyond that.

    A connection, not a client: whoever shares a name or an address with somebody who calls without end still
    gets in. Belongs to one event loop.

    Args:
        per_s: in the long run.
        burst: at once, on top of a second's.
        longest_s: for which a call waits.
    """

    def __init__(self, per_s: float, burst: int = CALL_BURST, longest_s: float = LONGEST_TURN_S) -> None:
        self._per_s, self._burst, self._longest_s = per_s, burst, longest_s
        self._rates: OrderedDict[str, Rate] = OrderedDict()
        self._closed = asyncio.Event()

    async def wait(self, peer: str) -> None:
        """Wait for a call's turn.

        A call that is cancelled meanwhile stays until then: for so long gRPC counts it among those of its
        connection, and refuses what comes beyond without asking us. One that went at once would make room for
        the next, as fast as a peer can begin and cancel calls (CVE-2023-44487).

        Args:
            peer: address and port of its connection.

        Raises:
            LimitError: its turn is too far away.
        """
        rate = self._rates.setdefault(peer, Rate(self._per_s, self._burst))
        self._rates.move_to_end(peer)
        if len(self._rates) > MOST_CONNECTIONS:
            self._rates.popitem(last=False)
        turn_s = rate.borrow_s()
        is_refused = turn_s > self._longest_s
        if is_refused:
            rate.give_back()
        if turn_s > 0:
            await self._stay(min(turn_s, self._longest_s))
        if is_refused:
            raise LimitError("max_calls_per_s", f"more than {self._per_s:g} calls a second on one connection")

    def give_back(self, peer: str) -> None:
        """Undo the counting of a call: the server was not ready for it, and its client has to call again."""
        if peer in self._rates:
            self._rates[peer].give_back()

    def close(self) -> None:
        """Let nobody wait any longer."""
        self._closed.set()

    async def _stay(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        try:
            await self._sleep(seconds)
        except asyncio.CancelledError:
            await self._sleep(max(end_s - time.monotonic(), 0.0))
            raise

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._closed.wait()
        except TimeoutError:
            return


class CallGuard(aio.ServerInterceptor):  # type: ignore[type-arg]
    """Lets calls wait for their turn, and refuses bytes that are no message as the client's fault.

    gRPC itself says UNKNOWN to these and logs a traceback. For health, reflection, questions and methods that
    nobody knows; Track does both itself.

    Args:
        turns: of all calls.
        on_refused: called for each call whose turn was too far away.
    """

    def __init__(self, turns: CallTurns, on_refused: Callable[[LimitError], None]) -> None:
        self._turns = turns
        self._on_refused = on_refused

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Read the message inside the call, where a fault can be answered.

        Every method becomes one of two streams, which looks the same on the wire: gRPC hands others over only
        once it has their message, and a call that is cancelled before would never wait.
        """
        handler = await continuation(handler_call_details)
        if handler is None:
            return grpc.stream_stream_rpc_method_handler(self._refuse_unknown)
        if handler.request_deserializer is None:
            return handler
        if inspect.isasyncgenfunction(handler.stream_stream):
            reply, read = self._guard_stream(handler), handler.request_deserializer
        elif handler.unary_unary is not None or inspect.iscoroutinefunction(handler.unary_stream):
            reply, read = self._guard(handler), None
        else:
            return handler
        return grpc.stream_stream_rpc_method_handler(reply, read, handler.response_serializer)

    def _guard(self, handler: Handler) -> Callable[[AsyncIterator[bytes], Context], AsyncIterator[Any]]:
        async def answer(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
            await self._wait(context)
            try:
                request = handler.request_deserializer(await anext(requests))
            except (DecodeError, StopAsyncIteration):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, NO_MESSAGE)
            if handler.unary_unary is not None:
                yield await handler.unary_unary(request, context)
            else:
                await handler.unary_stream(request, context)

        return answer

    def _guard_stream(self, handler: Handler) -> Callable[[AsyncIterator[Any], Context], AsyncIterator[Any]]:
        async def answer(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
            await self._wait(context)
            try:
                async for response in handler.stream_stream(requests, context):
                    yield response
            except DecodeError:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, NO_MESSAGE)

        return answer

    async def _refuse_unknown(self, _: AsyncIterator[bytes], context: Context) -> None:
        await self._wait(context)
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no such method: see trocar.v1")

    async def _wait(self, context: Context) -> None:
        try:
            await self._turns.wait(context.peer())
        except LimitError as error:
            log.info("call refused: %s", error)
            self._on_refused(error)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
