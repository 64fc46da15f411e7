"""What every call goes through before its method: its turn, and a message that is one."""

import asyncio
import inspect
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
"""At once, on top of a second's: a client that comes back calls for all its streams."""
LONGEST_TURN_S = 10.0
"""For which a call waits, before it is refused."""
MOST_CONNECTIONS = 4_096
"""Whose calls are counted: the ones that called last."""
NO_MESSAGE = "bytes that are no message of this method: see trocar.v1"
Handler = Any
"""grpc.RpcMethodHandler, whose attributes no stub knows; None for an unknown method."""
Context = aio.ServicerContext[Any, Any]


class CallTurns:
    """Lets each connection call so many times a second, and makes it wait beyond that.

    A connection, not a client: whoever shares a name or an address with somebody who calls without end still
    gets in. Belongs to one event loop.

    Args:
        per_s: in the long run.
    """

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
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
        rate = self._rates.setdefault(peer, Rate(self._per_s, CALL_BURST))
        self._rates.move_to_end(peer)
        if len(self._rates) > MOST_CONNECTIONS:
            self._rates.popitem(last=False)
        turn_s = rate.borrow_s()
        is_refused = turn_s > LONGEST_TURN_S
        if is_refused:
            rate.give_back()
        if turn_s > 0:
            await self._stay(min(turn_s, LONGEST_TURN_S))
        if is_refused:
            text = (
                f"more than {self._per_s:g} calls a second on one connection: open a stream once, and keep it"
            )
            raise LimitError("max_calls_per_s", text)

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
    """

    def __init__(self, turns: CallTurns) -> None:
        self._turns = turns

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Read the message inside the call, where a fault can be answered."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return grpc.stream_stream_rpc_method_handler(self._refuse_unknown)
        if handler.request_deserializer is None:
            return handler
        write = handler.response_serializer
        if inspect.isasyncgenfunction(handler.stream_stream):
            reply: Callable[[Any, Context], Any] = self._guard_stream(handler)
            return grpc.stream_stream_rpc_method_handler(reply, handler.request_deserializer, write)
        if handler.unary_unary is not None:
            reply = self._guard(handler, handler.unary_unary)
            return grpc.unary_unary_rpc_method_handler(reply, None, write)
        if inspect.iscoroutinefunction(handler.unary_stream):
            reply = self._guard(handler, handler.unary_stream)
            return grpc.unary_stream_rpc_method_handler(reply, None, write)
        return handler

    def _guard(
        self, handler: Handler, method: Callable[[Any, Context], Awaitable[Any]]
    ) -> Callable[[bytes, Context], Any]:
        async def answer(data: bytes, context: Context) -> Any:
            await self._wait(context)
            try:
                request = handler.request_deserializer(data)
            except DecodeError:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, NO_MESSAGE)
            return await method(request, context)

        return answer

    def _guard_stream(self, handler: Handler) -> Callable[[AsyncIterator[Any], Context], Any]:
        async def answer(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
            await self._wait(context)
            try:
                async for response in handler.stream_stream(requests, context):
                    yield response
            except DecodeError:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, NO_MESSAGE)

        return answer

    async def _refuse_unknown(self, requests: AsyncIterator[bytes], context: Context) -> None:  # noqa: ARG002
        await self._wait(context)
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no such method: see trocar.v1")

    async def _wait(self, context: Context) -> None:
        try:
            await self._turns.wait(context.peer())
        except LimitError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
