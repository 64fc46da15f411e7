"""The gRPC server: calls to sessions, errors to status codes, admission, health, reflection, shutdown."""

import asyncio
import itertools
import logging
import signal
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from importlib.metadata import version

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from trocar import messages
from trocar.calls import CALL_BURST, CallGuard, CallTurns
from trocar.config import ServerConfig, split_address
from trocar.errors import (
    ConfigError,
    ContractError,
    DecoderHungError,
    ForbiddenError,
    LimitError,
    NotAdmittedError,
    ServerNotReadyError,
    UnreadError,
)
from trocar.journal import FIELDS, AuditLog
from trocar.messages import StreamSettings
from trocar.monitor import Monitor
from trocar.record import StreamRecord
from trocar.security import Certificates, ClientRights, Gate
from trocar.session import SESSION_THREADS, Session, next_request, send_in_time
from trocar.stream_threads import StreamThreads
from trocar.telemetry import Metrics, TraceFrame, open_tracer
from trocar.tracking import Resize, Scheduler, TrackedStream
from trocar.v1 import tracking_pb2 as pb
from trocar.v1 import tracking_pb2_grpc as pb_grpc
from trocar_engines.errors import (
    CapacityError,
    CheckpointError,
    DeviceFaultError,
    EngineMismatchError,
    InvalidPromptError,
    RuntimeUnavailableError,
    StreamLimitError,
    TrocarError,
    UnknownModelError,
    UnknownObjectError,
)
from trocar_engines.gpu_meter import GpuMeter

log = logging.getLogger(__name__)

STATUS_CODES: dict[type[TrocarError], grpc.StatusCode] = {
    ContractError: grpc.StatusCode.INVALID_ARGUMENT,
    InvalidPromptError: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownObjectError: grpc.StatusCode.NOT_FOUND,
    CapacityError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    LimitError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ForbiddenError: grpc.StatusCode.PERMISSION_DENIED,
    StreamLimitError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnknownModelError: grpc.StatusCode.FAILED_PRECONDITION,
    CheckpointError: grpc.StatusCode.FAILED_PRECONDITION,
    EngineMismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    RuntimeUnavailableError: grpc.StatusCode.FAILED_PRECONDITION,
    DeviceFaultError: grpc.StatusCode.UNAVAILABLE,
    ServerNotReadyError: grpc.StatusCode.UNAVAILABLE,
    DecoderHungError: grpc.StatusCode.INTERNAL,
}
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["TrackingService"].full_name
HEALTH_CHECK_INTERVAL_S = 1.0
OPEN_TIMEOUT_S = 10.0
"""For the first message of a call."""
MOST_HUNG_DECODERS = 4
"""Each keeps a thread and its memory; a server with more of them is better started anew."""
CUT_OFF_S = 5.0
"""Time to answer what was received when the grace is over; then calls are ended by force."""
CALLS_PER_CONNECTION = 64
"""HTTP/2 streams of one connection; calls beyond wait at the client."""
HANDSHAKE_TIMEOUT_S = 10
UNREAD_BYTES = 1 << 20
"""Of a call on its way to us: 8 Gbit/s over a line that answers after 1 ms."""
LAST_WORK_S = 1.0
"""For threads that are at a picture when calls are ended by force."""
LISTENER_CHECK_S = 0.05
LISTEN_AGAIN_S = 5.0
"""A server that cannot is better started anew."""
MOST_STATUS_BYTES = 2_000
"""A status travels in headers, 8 KiB at most, and a byte that is not ASCII as three."""
NOT_ADMITTED = "not admitted"
"""All that a peer learns; the reason is in the log."""


class TrackingServicer(pb_grpc.TrackingServiceServicer):
    """One instance serves all calls of one server.

    Args:
        config: what the server admits.
        scheduler: the tracker.
        resize: from source pixels to the tracker's input.
        audit: takes a line for each stream and prompt.
        trace_frame: takes one frame in `config.trace_every`.
        gpu: that the tracker runs on, for the metrics.
        cores: of the host, for decoding and coding.

    Raises:
        ConfigError: the clients file cannot be read.
    """

    def __init__(
        self,
        config: ServerConfig,
        scheduler: Scheduler,
        resize: Resize,
        audit: AuditLog,
        trace_frame: TraceFrame | None = None,
        gpu: GpuMeter | None = None,
        *,
        cores: int,
    ) -> None:
        self._config = config
        self._scheduler = scheduler
        self._resize = resize
        self._audit = audit
        self._trace_frame = trace_frame
        self._gate = Gate(config)
        self._stream_ids = itertools.count(1)
        self._streams_of: Counter[str] = Counter()
        self._open_ids: set[int] = set()
        self._sessions: dict[int, Session] = {}
        self._threads = StreamThreads(
            SESSION_THREADS * config.max_streams + MOST_HUNG_DECODERS,
            cores=cores,
            hung_after_s=config.max_decode_s,
        )
        self.turns = CallTurns(config.max_calls_per_s, max(CALL_BURST, 2 * config.max_streams))
        self.is_serving = False
        self.metrics = Metrics(
            scheduler,
            count_streams=self._streams_of.total,
            is_serving=lambda: self.is_serving,
            gpu=gpu,
        )

    @property
    def open_stream_ids(self) -> frozenset[int]:
        """Streams that have a place, those whose model still loads among them."""
        return frozenset(self._open_ids)

    @property
    def hung_decoders(self) -> int:
        """Threads given up, whether or not their streams are still there."""
        return self._threads.hung

    @property
    def has_working_threads(self) -> bool:
        """Whether a thread computes for a stream, or hangs."""
        return self._threads.working > 0

    async def Track(  # type: ignore[override]  # noqa: N802
        self,
        request_iterator: AsyncIterator[pb.TrackRequest],
        context: aio.ServicerContext[pb.TrackRequest, pb.TrackResponse],
    ) -> None:
        """Serve one video stream."""
        stream_id = next(self._stream_ids)
        try:
            await self.turns.wait(context.peer())
            rights = self._admit(context)
            await self._track(stream_id, rights, request_iterator, context)
        except NotAdmittedError as error:
            code, text = self._refuse(error)
        except TrocarError as error:
            if isinstance(error, ServerNotReadyError):
                self.turns.give_back(context.peer())
            log.info("stream %d ended: %s", stream_id, error, extra={FIELDS: {"stream_id": stream_id}})
            self.count_refusal(error)
            if isinstance(error, UnreadError):
                # A write is stuck, and a status would wait behind it for ever; gRPC cannot reset a call
                # from here. Its place, its rows and its threads are free, its buffers go with the connection.
                raise asyncio.CancelledError from error
            code, text = _find_status(error), _fit_status(error)
        except Exception:
            log.exception("stream %d failed", stream_id, extra={FIELDS: {"stream_id": stream_id}})
            code, text = grpc.StatusCode.INTERNAL, "internal error; the server's log has the traceback"
        else:
            return
        # Not `abort`: its exception and the call refer to each other, and would wait with all that they hold
        # for the garbage collector.
        context.set_code(code)
        context.set_details(text)

    def count_refusal(self, error: TrocarError) -> None:
        """For the metrics."""
        self.metrics.refusals.labels(_name_refusal(error)).inc()

    async def warn_of_shutdown(self) -> None:
        """Tell the clients of all streams that the server goes."""
        grace_s = self._config.shutdown_grace_s
        await asyncio.gather(*(session.warn_of_shutdown(grace_s) for session in self._sessions.values()))

    async def finish(self) -> None:
        """Give open streams their grace, then answer what was received and end them."""
        await self._wait_until_empty(self._config.shutdown_grace_s)
        for session in self._sessions.values():
            session.cut_off()
        await self._wait_until_empty(CUT_OFF_S)

    async def close(self) -> None:
        """Let streams that were ended by force see their threads' work end; then keep no thread."""
        await self._wait_until_empty(LAST_WORK_S)
        self._threads.close()

    async def _wait_until_empty(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while self._streams_of.total():  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        except TimeoutError:
            return

    async def GetServerInfo(  # noqa: N802
        self,
        request: pb.GetServerInfoRequest,  # noqa: ARG002
        context: aio.ServicerContext[pb.GetServerInfoRequest, pb.GetServerInfoResponse],
    ) -> pb.GetServerInfoResponse:
        """Tell models, limits and load."""
        try:
            self._admit(context)
        except NotAdmittedError as error:
            await context.abort(*self._refuse(error))
        scheduler = self._scheduler
        # In a thread: the card of a model that nobody has used yet may have to be read from its weights.
        try:
            cards = await asyncio.to_thread(
                lambda: [scheduler.model_card(name) for name in scheduler.model_names]
            )
        except TrocarError as error:
            log.error("models cannot be described: %s", error)
            await context.abort(_find_status(error), _fit_status(error))
        return pb.GetServerInfoResponse(
            version=version("trocar"),
            models=[messages.write_model_card(card) for card in cards],
            default_model=scheduler.default_model,
            default_memory_policy=messages.POLICY_NUMBERS.get(
                scheduler.default_memory, pb.MEMORY_POLICY_UNSPECIFIED
            ),
            limits=messages.write_limits(self._config),
            open_streams=self._streams_of.total(),
            is_serving=self.is_serving and scheduler.is_healthy,
        )

    def _admit(
        self,
        context: aio.ServicerContext[pb.TrackRequest, pb.TrackResponse]
        | aio.ServicerContext[pb.GetServerInfoRequest, pb.GetServerInfoResponse],
    ) -> ClientRights:
        names = [name.decode(errors="replace") for name in context.peer_identities() or ()]
        return self._gate.admit(names, context.invocation_metadata() or (), context.peer())

    def _refuse(self, error: NotAdmittedError) -> tuple[grpc.StatusCode, str]:
        """Note a peer that is not admitted, and find what it is told."""
        log.warning("not admitted: %s", error)
        self.metrics.refusals.labels("not_admitted").inc()
        code = grpc.StatusCode.PERMISSION_DENIED if error.is_known else grpc.StatusCode.UNAUTHENTICATED
        return code, NOT_ADMITTED

    async def _track(
        self,
        stream_id: int,
        rights: ClientRights,
        requests: AsyncIterator[pb.TrackRequest],
        context: aio.ServicerContext[pb.TrackRequest, pb.TrackResponse],
    ) -> None:
        # Looked at twice: a call for which there is no place learns that at once, and one that says nothing
        # holds no place that somebody else could use.
        self._check_place(rights)
        asked = await _read_open_stream(requests)
        with self._take_place(stream_id, rights):
            record = StreamRecord(
                stream_id=stream_id,
                client=rights.name,
                peer=context.peer(),
                metrics=self.metrics,
                audit=self._audit,
                trace_frame=self._trace_frame,
                trace_every=max(self._config.trace_every, 1),
            )
            outcome = "cancelled"
            try:
                await self._serve(record, rights, asked, requests, context)
                outcome = "ok"
            except DecoderHungError:
                outcome = "decoder_hung"
                raise
            except Exception as error:
                outcome = _find_status(error).name.lower()
                raise
            finally:
                record.close(outcome)

    def _check_place(self, rights: ClientRights) -> None:
        if not self.is_serving:
            raise ServerNotReadyError("the server is warming up or shutting down: try again in some seconds")
        open_streams = self._streams_of.total()
        if open_streams >= self._config.max_streams:
            raise LimitError(
                "max_streams",
                f"{open_streams} streams are open, as many as this server admits: close one, or start the "
                "server with a higher --max-streams",
            )
        own = self._streams_of[rights.name]
        if rights.max_streams is not None and own >= rights.max_streams:
            raise LimitError(
                "max_streams",
                f"client {rights.name} has {own} streams open, as many as the clients file allows: close one",
            )

    @contextmanager
    def _take_place(self, stream_id: int, rights: ClientRights) -> Iterator[None]:
        self._check_place(rights)
        self._streams_of[rights.name] += 1
        self._open_ids.add(stream_id)
        try:
            yield
        finally:
            self._open_ids.remove(stream_id)
            self._streams_of[rights.name] -= 1
            # Names come from certificates: without this a long life would gather them.
            self._streams_of += Counter()

    async def _serve(
        self,
        record: StreamRecord,
        rights: ClientRights,
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
        rights.check_model(settings.model)
        stream = await self._open_stream(settings)
        try:
            card = self._scheduler.model_card(settings.model)
            record.open(settings)
            opened = messages.write_opened(record.stream_id, asked, settings, self._config, card)
            await send_in_time(context.write, opened, self._config.max_unread_s)
            session = Session(
                settings=settings,
                config=self._config,
                stream=stream,
                resize=self._resize,
                record=record,
                threads=self._threads,
            )
            self._sessions[record.stream_id] = session
            await session.run(requests, context.write)
        except BaseException as failure:
            # Some of its frames refer to it, and all to the session, whose decoder and threads would then
            # wait for the garbage collector.
            traceback.clear_frames(failure.__traceback__)
            raise
        finally:
            stream.close()
            self._sessions.pop(record.stream_id, None)

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
        gpu: that the tracker runs on, for the metrics.
        cores: of the host, for decoding and coding.

    Raises:
        ConfigError: TLS files, clients file or audit log cannot be used.
    """

    def __init__(
        self,
        config: ServerConfig,
        scheduler: Scheduler,
        resize: Resize,
        gpu: GpuMeter | None = None,
        *,
        cores: int = 2,
    ) -> None:
        self._config = config
        self._scheduler = scheduler
        self._audit = AuditLog(config.audit_log)
        trace_frame = open_tracer() if config.trace_every else None
        self._servicer = TrackingServicer(
            config, scheduler, resize, self._audit, trace_frame, gpu, cores=cores
        )
        self._certificates = None if config.tls is None else Certificates(config.tls)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server: aio.Server | None = None
        self._monitor: Monitor | None = None
        self._model_health: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None
        self._broken: dict[aio.Server, asyncio.Task[None]] = {}
        self._ids_of_broken: frozenset[int] = frozenset()
        self._is_deaf = False
        self._stopping = asyncio.Event()
        self.address = ""

    @property
    def metrics_address(self) -> str:
        """host:port of metrics and probes; empty when there are none."""
        return "" if self._monitor is None else self._monitor.address

    @property
    def is_healthy(self) -> bool:
        """Whether device, decoders and listener answer."""
        return (
            self._scheduler.is_healthy
            and not self._is_deaf
            and self._scheduler.busy_s < self._config.max_device_s
            and self._servicer.hung_decoders < MOST_HUNG_DECODERS
        )

    @property
    def has_hung_threads(self) -> bool:
        """Whether a thread of a stopped server works on: its process has to end without waiting for it."""
        return self._servicer.has_working_threads or self._scheduler.busy_s >= self._config.max_device_s

    async def start(self) -> None:
        """Listen on `address`, without serving streams yet.

        Raises:
            ConfigError: the address is taken or not ours.
        """
        await self._report_health(is_serving=False)
        try:
            if self._config.metrics_address:
                self._monitor = Monitor(
                    self._config.metrics_address,
                    self._servicer.metrics.registry,
                    is_live=lambda: self.is_healthy,
                    is_ready=lambda: self._servicer.is_serving and self.is_healthy,
                )
            await self._listen(self._config.address)
        except ConfigError:
            await self.stop()
            raise
        self._listening = asyncio.create_task(self._keep_listening())

    async def _listen(self, address: str) -> None:
        """Listen, on a gRPC server of its own.

        Raises:
            ConfigError: the address is taken or not ours.
        """
        guard = CallGuard(self._servicer.turns, self._servicer.count_refusal)
        server = aio.server(options=_list_options(self._config), interceptors=[guard])
        # Registered methods are found sooner, by nothing that matters, and what gRPC keeps for them is freed
        # too early when its loop ends: the process then crashes. The generic handlers serve them as well.
        server.add_registered_method_handlers = lambda *_: None  # type: ignore[attr-defined]
        pb_grpc.add_TrackingServiceServicer_to_server(self._servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        try:
            if self._certificates is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, self._certificates.server_credentials())
        except RuntimeError as error:
            message = f"cannot listen on {address}: taken, or not an address of this machine"
            raise ConfigError(message) from error
        # Before it starts: `stop` has to find it even if it comes meanwhile.
        self._server = server
        await server.start()
        host, _ = split_address(address)
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def _keep_listening(self) -> None:
        """Listen again whenever gRPC has stopped.

        grpcio 1.85 decodes a call's path in the loop that accepts calls: one that is no UTF-8 ends the loop,
        and the listener with it, for everybody. Calls that are open go on; streams keep their gRPC server.
        """
        assert self._server is not None
        while True:
            try:
                # It tells why the loop ended only when asked.
                while await self._server.wait_for_termination(LISTENER_CHECK_S):
                    pass
                return
            except Exception as error:
                log.error("gRPC stopped listening (%s): listening again", type(error).__name__)
                # The gRPC server keeps it, and its frames would keep the gRPC server.
                error.__traceback__ = None
            streams = self._servicer.open_stream_ids
            own, self._ids_of_broken = streams - self._ids_of_broken, streams
            self._broken[self._server] = asyncio.create_task(self._outlive_streams(self._server, own))
            try:
                await self._listen_again()
            except Exception as error:
                log.critical("gRPC cannot listen again: %s: %s", type(error).__name__, error)
                self._is_deaf = True
                return

    async def _outlive_streams(self, broken: aio.Server, streams: frozenset[int]) -> None:
        """Keep a broken gRPC server for its open streams, and no longer."""
        while streams & self._servicer.open_stream_ids:  # noqa: ASYNC110
            await asyncio.sleep(HEALTH_CHECK_INTERVAL_S)
        await _stop_grpc(broken, CUT_OFF_S)
        del self._broken[broken]

    async def _listen_again(self) -> None:
        end_s = time.monotonic() + LISTEN_AGAIN_S
        while True:
            try:
                await self._listen(self.address)
            except ConfigError:
                # gRPC closes the old socket when it gets to it.
                if time.monotonic() > end_s:
                    raise
            else:
                return
            await asyncio.sleep(LISTENER_CHECK_S)

    async def warm_up(self) -> None:
        """Run the models once, then serve streams."""
        await asyncio.to_thread(self._scheduler.warm_up)
        self._servicer.is_serving = True
        await self._report_health(is_serving=True)
        self._model_health = asyncio.create_task(self._watch_models())

    async def stop(self) -> None:
        """Take no more streams, tell the open ones, give them their time, answer what they sent, end them."""
        self._stopping.set()
        self._servicer.is_serving = False
        self._servicer.turns.close()
        async with AsyncExitStack() as closing:
            closing.callback(self._audit.close)
            closing.push_async_callback(self._servicer.close)
            if self._monitor is not None:
                closing.callback(self._monitor.close)
            for task in (self._model_health, self._listening):
                if task is not None:
                    task.cancel()
            await self._report_health(is_serving=False)
            if self._server is not None:
                telling = asyncio.create_task(self._servicer.warn_of_shutdown())
                if self.is_healthy:
                    await self._servicer.finish()
                telling.cancel()
                for server in (*self._broken, self._server):
                    await _stop_grpc(server, 0)
            # Not before: one that is cancelled while it waits for gRPC cancels what others wait for too.
            for task in self._broken.values():
                task.cancel()

    def stop_on_signals(self) -> None:
        """Let SIGTERM and SIGINT end `run_until_stopped`; call it before telling anyone of the server."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)

    async def run_until_stopped(self) -> bool:
        """Serve until a signal comes or the device fails.

        Returns:
            False when the device, the decoders or the listener failed.
        """
        while not self._stopping.is_set() and self.is_healthy:
            with suppress(TimeoutError):
                async with asyncio.timeout(HEALTH_CHECK_INTERVAL_S):
                    await self._stopping.wait()
        is_healthy = self.is_healthy
        if not is_healthy:
            log.critical(
                "unhealthy: device %s, at its step for %.1f s, %d hung decoders, listener %s",
                "answers" if self._scheduler.is_healthy else "failed",
                self._scheduler.busy_s,
                self._servicer.hung_decoders,
                "gone" if self._is_deaf else "answers",
            )
        await self.stop()
        return is_healthy

    async def _report_health(self, *, is_serving: bool) -> None:
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if is_serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for service in ("", SERVICE_NAME, *map(name_model_health, self._scheduler.memory_rows())):
            await self._health.set(service, status)

    async def _watch_models(self) -> None:
        """Look at each loaded model from time to time: a picture goes through it on the device."""
        while True:
            await asyncio.sleep(self._config.health_interval_s)
            for model in self._scheduler.memory_rows():
                status = health_pb2.HealthCheckResponse.SERVING
                try:
                    await asyncio.to_thread(self._scheduler.probe, model, self._config.max_device_s)
                except StreamLimitError:
                    # All places are taken: the streams touch the device often enough.
                    continue
                except Exception as error:
                    log.error("model %s does not answer: %s: %s", model, type(error).__name__, error)
                    status = health_pb2.HealthCheckResponse.NOT_SERVING
                await self._health.set(name_model_health(model), status)


def name_model_health(model: str) -> str:
    """Name under which grpc.health.v1 tells whether a model answers on the device."""
    return f"{SERVICE_NAME}/{model}"


async def _read_open_stream(requests: AsyncIterator[pb.TrackRequest]) -> pb.OpenStream:
    try:
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            first = await next_request(requests)
    except TimeoutError:
        raise ContractError(f"no message in {OPEN_TIMEOUT_S:g} s: expected open_stream") from None
    kind = "the end of the call" if first is None else first.WhichOneof("request") or "an empty request"
    if first is None or kind != "open_stream":
        raise ContractError(f"the first message is {kind}: expected open_stream")
    return first.open_stream


async def _stop_grpc(server: aio.Server, grace_s: float) -> None:
    """Stop a gRPC server, whatever it says to it."""
    try:
        await server.stop(grace_s)
    except Exception as error:
        # The failure of the loop that accepts calls comes out here too, once, before any call is ended.
        log.error("gRPC did not stop (%s): asking again", type(error).__name__)
        with suppress(Exception):
            await server.stop(grace_s)


def _close_opened(opening: "asyncio.Future[TrackedStream]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _name_refusal(error: TrocarError) -> str:
    return error.limit if isinstance(error, LimitError) else _find_status(error).name.lower()


def _fit_status(error: TrocarError) -> str:
    """The error's text as far as a status can carry it: a client's own words come back in some."""
    return str(error).encode()[:MOST_STATUS_BYTES].decode(errors="ignore")


def _find_status(error: Exception) -> grpc.StatusCode:
    for kind in type(error).__mro__:
        if kind in STATUS_CODES:
            return STATUS_CODES[kind]
    return grpc.StatusCode.INTERNAL


def _list_options(config: ServerConfig) -> list[tuple[str, int]]:
    # Without the ping timeout a stalled client is never noticed; with the default ping rules a client that
    # keeps alive on an idle stream is thrown out for "too many pings".
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        # Otherwise gRPC's windows grow with whoever sends faster than he is read: megabytes of packets wait
        # then, and keep its threads busy.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", UNREAD_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", int(config.keepalive_time_s * 1_000)),
        ("grpc.keepalive_timeout_ms", int(config.keepalive_timeout_s * 1_000)),
        ("grpc.http2.ping_timeout_ms", int(config.keepalive_timeout_s * 1_000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 0),
        # Otherwise a second server on the same port would silently take half of the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", max(config.max_streams, CALLS_PER_CONNECTION)),
        # 2 minutes otherwise: time enough to hold thousands of sockets that say nothing.
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_S * 1_000),
        ("grpc.max_connection_idle_ms", int(config.max_idle_s * 1_000)),
    ]
