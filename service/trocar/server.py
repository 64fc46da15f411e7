"""The gRPC server: calls to sessions, errors to status codes, health, reflection, shutdown."""

import asyncio
import itertools
import logging
import signal
from collections.abc import AsyncIterator
from importlib.metadata import version

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from trocar import messages
from trocar.config import ServerConfig, split_address
from trocar.errors import ConfigError, ContractError, ServerNotReadyError
from trocar.messages import StreamSettings
from trocar.session import Session
from trocar.tracking import Resize, Scheduler, TrackedStream
from trocar.v1 import tracking_pb2 as pb
from trocar.v1 import tracking_pb2_grpc as pb_grpc
from trocar_engines.errors import (
    CapacityError,
    CheckpointError,
    EngineMismatchError,
    InvalidPromptError,
    StreamLimitError,
    TrocarError,
    UnknownModelError,
    UnknownObjectError,
)

log = logging.getLogger(__name__)

STATUS_CODES: dict[type[TrocarError], grpc.StatusCode] = {
    ContractError: grpc.StatusCode.INVALID_ARGUMENT,
    InvalidPromptError: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownObjectError: grpc.StatusCode.NOT_FOUND,
    CapacityError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    StreamLimitError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnknownModelError: grpc.StatusCode.FAILED_PRECONDITION,
    CheckpointError: grpc.StatusCode.FAILED_PRECONDITION,
    EngineMismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    ServerNotReadyError: grpc.StatusCode.UNAVAILABLE,
}
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["TrackingService"].full_name
HEALTH_CHECK_INTERVAL_S = 1.0
OPEN_TIMEOUT_S = 10.0
"""A call that says nothing for so long holds a stream that somebody else could use."""


class TrackingServicer(pb_grpc.TrackingServiceServicer):
    """One instance serves all calls of one server.

    Args:
        config: what the server admits.
        scheduler: the tracker.
        resize: from source pixels to the tracker's input.
    """

    def __init__(self, config: ServerConfig, scheduler: Scheduler, resize: Resize) -> None:
        self._config = config
        self._scheduler = scheduler
        self._resize = resize
        self._stream_ids = itertools.count(1)
        self._open_streams = 0
        self.is_serving = False

    async def Track(  # type: ignore[override]  # noqa: N802
        self,
        request_iterator: AsyncIterator[pb.TrackRequest],
        context: aio.ServicerContext[pb.TrackRequest, pb.TrackResponse],
    ) -> None:
        """Serve one video stream."""
        stream_id = next(self._stream_ids)
        try:
            await self._track(stream_id, request_iterator, context)
        except TrocarError as error:
            log.info("stream %d ended: %s", stream_id, error)
            await context.abort(_find_status(error), str(error))
        except Exception:
            log.exception("stream %d failed", stream_id)
            await context.abort(
                grpc.StatusCode.INTERNAL, "internal error; the server's log has the traceback"
            )

    async def GetServerInfo(  # noqa: N802
        self,
        request: pb.GetServerInfoRequest,  # noqa: ARG002
        context: aio.ServicerContext[pb.GetServerInfoRequest, pb.GetServerInfoResponse],  # noqa: ARG002
    ) -> pb.GetServerInfoResponse:
        """Tell models, limits and load."""
        scheduler = self._scheduler
        # In a thread: the card of a model that nobody has used yet may have to be read from its weights.
        cards = await asyncio.to_thread(
            lambda: [scheduler.model_card(name) for name in scheduler.model_names]
        )
        return pb.GetServerInfoResponse(
            version=version("trocar"),
            models=[messages.write_model_card(card) for card in cards],
            default_model=scheduler.default_model,
            default_memory_policy=messages.POLICY_NUMBERS.get(
                scheduler.default_memory, pb.MEMORY_POLICY_UNSPECIFIED
            ),
            limits=messages.write_limits(self._config),
            open_streams=self._open_streams,
            is_serving=self.is_serving and scheduler.is_healthy,
        )

    async def _track(
        self,
        stream_id: int,
        requests: AsyncIterator[pb.TrackRequest],
        context: aio.ServicerContext[pb.TrackRequest, pb.TrackResponse],
    ) -> None:
        if not self.is_serving:
            raise ServerNotReadyError("the server is warming up or shutting down: try again in some seconds")
        if self._open_streams >= self._config.max_streams:
            raise StreamLimitError(
                f"{self._open_streams} streams are open, as many as this server admits: close one, or start "
                "the server with a higher --max-streams"
            )
        self._open_streams += 1
        try:
            asked = await _read_open_stream(requests)
            await self._serve(stream_id, asked, requests, context)
        finally:
            self._open_streams -= 1

    async def _serve(
        self,
        stream_id: int,
        asked: pb.OpenStream,
        requests: AsyncIterator[pb.TrackRequest],
        context: aio.ServicerContext[pb.TrackRequest, pb.TrackResponse],
    ) -> None:
        settings = messages.read_open_stream(
            asked,
            config=self._config,
            default_model=self._scheduler.default_model,
            default_memory=self._scheduler.default_memory,
        )
        stream = await self._open_stream(settings)
        try:
            card = self._scheduler.model_card(settings.model)
            await context.write(messages.write_opened(stream_id, asked, settings, self._config, card))
            log.info("stream %d opened by %s: %s", stream_id, context.peer(), settings)
            session = Session(
                settings=settings,
                config=self._config,
                stream=stream,
                resize=self._resize,
                stream_id=stream_id,
            )
            await session.run(requests, context.write)
        finally:
            stream.close()
            log.info("stream %d closed", stream_id)

    async def _open_stream(self, settings: StreamSettings) -> TrackedStream:
        """Open the tracker's end in a thread: a model that nobody has used yet takes seconds to load."""
        opening = asyncio.ensure_future(
            asyncio.to_thread(
                self._scheduler.open_stream,
                model=settings.model,
                memory=settings.memory,
                is_live=settings.is_live,
                max_objects=settings.max_objects,
            )
        )
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            # The client left meanwhile, and the thread cannot be stopped: nobody else would close it.
            opening.add_done_callback(_close_opened)
            raise


class TrackingServer:
    """A listening server.

    Args:
        config: how it listens and what it admits.
        scheduler: the tracker; the caller closes it.
        resize: from source pixels to the tracker's input.
    """

    def __init__(self, config: ServerConfig, scheduler: Scheduler, resize: Resize) -> None:
        self._config = config
        self._scheduler = scheduler
        self._servicer = TrackingServicer(config, scheduler, resize)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server: aio.Server | None = None
        self._stopping = asyncio.Event()
        self.address = ""

    async def start(self) -> None:
        """Listen on `address`, without serving streams yet.

        Raises:
            ConfigError: the address is taken or not ours.
        """
        server = aio.server(options=_list_options(self._config))
        pb_grpc.add_TrackingServiceServicer_to_server(self._servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        await self._report_health(is_serving=False)
        host, _ = split_address(self._config.address)
        try:
            port = server.add_insecure_port(self._config.address)
        except RuntimeError as error:
            message = f"cannot listen on {self._config.address}: taken, or not an address of this machine"
            raise ConfigError(message) from error
        await server.start()
        self._server = server
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def warm_up(self) -> None:
        """Run the models once, then serve streams."""
        await asyncio.to_thread(self._scheduler.warm_up)
        self._servicer.is_serving = True
        await self._report_health(is_serving=True)

    async def stop(self) -> None:
        """Take no more streams, give the open ones their time, then end them."""
        self._stopping.set()
        self._servicer.is_serving = False
        await self._report_health(is_serving=False)
        if self._server is not None:
            await self._server.stop(self._config.shutdown_grace_s)

    def stop_on_signals(self) -> None:
        """Let SIGTERM and SIGINT end `run_until_stopped`; call it before telling anyone of the server."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)

    async def run_until_stopped(self) -> bool:
        """Serve until a signal comes or the device fails.

        Returns:
            False when the device failed.
        """
        while not self._stopping.is_set() and self._scheduler.is_healthy:
            try:
                await asyncio.wait_for(self._stopping.wait(), HEALTH_CHECK_INTERVAL_S)
            except TimeoutError:
                continue
        is_healthy = self._scheduler.is_healthy
        await self.stop()
        return is_healthy

    async def _report_health(self, *, is_serving: bool) -> None:
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if is_serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for service in ("", SERVICE_NAME):
            await self._health.set(service, status)


async def _read_open_stream(requests: AsyncIterator[pb.TrackRequest]) -> pb.OpenStream:
    try:
        first = await asyncio.wait_for(anext(requests, None), OPEN_TIMEOUT_S)
    except TimeoutError:
        raise ContractError(f"no message in {OPEN_TIMEOUT_S:g} s: expected open_stream") from None
    kind = "the end of the call" if first is None else first.WhichOneof("request") or "an empty request"
    if first is None or kind != "open_stream":
        raise ContractError(f"the first message is {kind}: expected open_stream")
    return first.open_stream


def _close_opened(opening: "asyncio.Future[TrackedStream]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _find_status(error: TrocarError) -> grpc.StatusCode:
    for kind in type(error).__mro__:
        if kind in STATUS_CODES:
            return STATUS_CODES[kind]
    return grpc.StatusCode.INTERNAL


def _list_options(config: ServerConfig) -> list[tuple[str, int]]:
    # Without the ping timeout a stalled client is never noticed; with the default ping rules a client that
    # keeps alive on an idle stream is thrown out for "too many pings".
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", int(config.keepalive_time_s * 1_000)),
        ("grpc.keepalive_timeout_ms", int(config.keepalive_timeout_s * 1_000)),
        ("grpc.http2.ping_timeout_ms", int(config.keepalive_timeout_s * 1_000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 0),
        # Otherwise a second server on the same port would silently take half of the calls.
        ("grpc.so_reuseport", 0),
    ]
