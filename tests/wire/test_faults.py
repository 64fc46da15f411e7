"""Servers that die, fall silent or go home in the middle of a stream."""

import asyncio
import gc
import itertools
import shutil
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from trocar.client import LONGEST_PAUSE_S, Stream, _find_pause, connect, connect_async
from trocar.client_core import (
    RECOVERABLE,
    Event,
    Frame,
    Notice,
    PromptAccepted,
    Reconnect,
    Removal,
    Request,
    Result,
    Resumed,
    StreamOptions,
)
from trocar.config import ServerConfig, split_address
from trocar.decode import Codec
from trocar.errors import ConnectionFailedError
from trocar.inbox import WAITING_EVERY_PACKETS
from trocar.local import LocalServer
from trocar.server import MOST_HUNG_DECODERS, TrackingServer
from trocar.session import QUEUE_CAPACITY, SESSION_THREADS
from trocar.v1 import tracking_pb2 as pb
from trocar_bench.assault import PREFACE, SETTINGS, begin_call, frame
from trocar_engines.masklets import Prompt, UInt8Array
from wire.calls import Call, accounted_ids, results_of, until, warnings_of
from wire.clips import disc_center, draw_frames, encode_clip, encode_jpeg
from wire.fakes import FakeScheduler, FakeStream, resize_linear
from wire.proxy import Proxy

EVERY = StreamOptions(codec=Codec.H264, is_live=False)
LIVE = StreamOptions(codec=Codec.H264)
FRAMES = 40
FAULT_AT = 17
QUICK = Reconnect(timeout_s=5, silence_s=0.5)


class Pair:
    """Two servers, the first behind a proxy that fails on demand."""

    def __init__(self, resources: ExitStack) -> None:
        schedulers = [FakeScheduler(), FakeScheduler()]
        for scheduler in schedulers:
            resources.callback(scheduler.close)
        servers = [resources.enter_context(LocalServer(scheduler, resize_linear)) for scheduler in schedulers]
        self.proxy = resources.enter_context(Proxy(servers[0].address))
        self.addresses = [self.proxy.address, servers[1].address]


@pytest.fixture
def pair() -> Iterator[Pair]:
    with ExitStack() as resources:
        yield Pair(resources)


def list_requests(count: int, *, on_frame: Callable[[int], None] = lambda _: None) -> Iterator[Request]:
    for index, packet in enumerate(encode_clip(draw_frames(count), keyframe_interval=10)):
        on_frame(index)
        yield Frame(payload=packet, pts=index)
        if index == 0:
            yield Prompt(object_id=1, frame_id=0, points=(disc_center(0),), labels=(1,))


def results_among(events: Sequence[Event]) -> list[Result]:
    return [event for event in events if isinstance(event, Result)]


def check_disc(results: Sequence[Result]) -> None:
    for result in results:
        (tracked,) = result.objects
        x, y = disc_center(result.frame_id)
        assert tracked.object_id == 1
        assert tracked.mask[y, x], f"frame {result.frame_id}"


def run(pair: Pair, options: StreamOptions, fail: Callable[[], None], *, pace_s: float = 0.0) -> list[Event]:
    """Track a clip and let the first server fail once the result of `FAULT_AT` is here."""

    def pace(_: int) -> None:
        time.sleep(pace_s)

    events: list[Event] = []
    with (
        connect(pair.addresses, reconnect=QUICK) as client,
        client.open_stream(options) as stream,
    ):
        for event in stream.track(list_requests(FRAMES, on_frame=pace)):
            events.append(event)
            if isinstance(event, Result) and event.frame_id == FAULT_AT:
                fail()
        assert stream.unanswered_frames == 0
        assert stream.address == pair.addresses[1]
    return events


def test_recorded_stream_loses_no_frame_and_answers_none_twice(pair: Pair) -> None:
    events = run(pair, EVERY, pair.proxy.kill)
    results = results_among(events)
    assert [result.frame_id for result in results] == list(range(FRAMES))
    check_disc(results[1:])
    (resumed,) = [event for event in events if isinstance(event, Resumed)]
    assert (resumed.lost_frame_ids, resumed.lost_object_ids, resumed.unsent_frames) == ((), (), 0)
    assert resumed.address == pair.addresses[1]
    assert not any(isinstance(event, Notice) for event in events)
    assert sum(isinstance(event, PromptAccepted) for event in events) == 1
    assert all(result.is_trusted for result in results)


def test_live_stream_goes_on_with_the_same_object_and_no_result_twice(pair: Pair) -> None:
    events = run(pair, LIVE, pair.proxy.kill, pace_s=0.01)
    results = results_among(events)
    ids = [result.frame_id for result in results]
    assert ids == sorted(set(ids))
    assert ids[-1] == FRAMES - 1
    (resumed,) = [event for event in events if isinstance(event, Resumed)]
    assert resumed.lost_object_ids == ()
    accounted = [*ids, *resumed.lost_frame_ids]
    accounted += [one for result in results for one in result.dropped_frame_ids]
    assert sorted(accounted) == list(range(FRAMES)), "every frame is accounted for exactly once"
    check_disc([result for result in results if result.frame_id > FAULT_AT])
    assert results[-1].dropped_frames_total == sum(len(result.dropped_frame_ids) for result in results)


def test_server_that_falls_silent_is_given_up(pair: Pair) -> None:
    events = run(pair, EVERY, pair.proxy.freeze)
    assert [result.frame_id for result in results_among(events)] == list(range(FRAMES))


def test_question_to_a_server_that_fell_silent_is_given_up(pair: Pair) -> None:
    with connect(pair.proxy.address, reconnect=QUICK) as client:
        pair.proxy.freeze()
        with pytest.raises(ConnectionFailedError, match="DEADLINE_EXCEEDED"):
            client.server_info()


async def test_asynchronous_question_to_a_server_that_fell_silent_is_given_up() -> None:
    with ExitStack() as resources:
        pair = await asyncio.to_thread(Pair, resources)
        async with await connect_async(pair.proxy.address, reconnect=QUICK) as client:
            pair.proxy.freeze()
            with pytest.raises(ConnectionFailedError, match="DEADLINE_EXCEEDED"):
                await client.server_info()
        await asyncio.to_thread(resources.close)


def test_jpeg_stream_is_taken_up_too(pair: Pair) -> None:
    def requests() -> Iterator[Request]:
        for index, pixels in enumerate(draw_frames(FRAMES)):
            yield Frame(payload=encode_jpeg(pixels))
            if index == 0:
                yield Prompt(object_id=1, frame_id=0, points=(disc_center(0),), labels=(1,))

    ids = []
    options = StreamOptions(codec=Codec.JPEG, is_live=False, is_low_resolution=True)
    with connect(pair.addresses, reconnect=QUICK) as client, client.open_stream(options) as stream:
        for event in stream.track(requests()):
            if isinstance(event, Result):
                ids.append(event.frame_id)
                assert event.frame_id == 0 or event.objects[0].box is not None
                if event.frame_id == FAULT_AT:
                    pair.proxy.kill()
    assert ids == list(range(FRAMES))


async def test_asynchronous_face_is_taken_up_too() -> None:
    with ExitStack() as resources:
        pair = await asyncio.to_thread(Pair, resources)

        async def requests() -> AsyncIterator[Request]:
            for request in list_requests(FRAMES):
                yield request

        results, resumptions = [], 0
        async with (
            await connect_async(pair.addresses, reconnect=QUICK) as client,
            client.open_stream(EVERY) as stream,
        ):
            async for event in stream.track(requests()):
                resumptions += isinstance(event, Resumed)
                if isinstance(event, Result):
                    results.append(event)
                    if event.frame_id == FAULT_AT:
                        pair.proxy.kill()
        await asyncio.to_thread(resources.close)
    assert [result.frame_id for result in results] == list(range(FRAMES))
    assert resumptions == 1
    check_disc(results[1:])


async def test_asynchronous_face_gives_up_a_silent_server() -> None:
    with ExitStack() as resources:
        pair = await asyncio.to_thread(Pair, resources)

        async def requests() -> AsyncIterator[Request]:
            for request in list_requests(FRAMES):
                yield request

        ids = []
        async with (
            await connect_async(pair.addresses, reconnect=QUICK) as client,
            client.open_stream(EVERY) as stream,
        ):
            async for event in stream.track(requests()):
                if isinstance(event, Result):
                    ids.append(event.frame_id)
                    if event.frame_id == FAULT_AT:
                        pair.proxy.freeze()
        await asyncio.to_thread(resources.close)
    assert ids == list(range(FRAMES))


def test_removed_object_stays_removed(pair: Pair) -> None:
    def requests() -> Iterator[Request]:
        yield from list_requests(FAULT_AT)
        yield Removal(object_id=1)
        for index, packet in enumerate(encode_clip(draw_frames(20), keyframe_interval=10), FAULT_AT):
            yield Frame(payload=packet, frame_id=index)

    objects = {}
    with connect(pair.addresses, reconnect=QUICK) as client, client.open_stream(EVERY) as stream:
        for event in stream.track(requests()):
            if isinstance(event, Result):
                objects[event.frame_id] = len(event.objects)
                if event.frame_id == FAULT_AT + 3:
                    pair.proxy.kill()
    assert objects[FAULT_AT - 1] == 1
    assert [objects[index] for index in range(FAULT_AT + 1, FAULT_AT + 20)] == [0] * 19


def track_until_frame_3(stream: Stream, fail: Callable[[], None]) -> None:
    for event in stream.track(list_requests(FRAMES)):
        if isinstance(event, Result) and event.frame_id == 3:
            fail()


def test_no_server_left_is_an_error_after_the_time_allowed(pair: Pair) -> None:
    reconnect = Reconnect(timeout_s=0.5)
    began_s = time.monotonic()
    with (
        connect(pair.addresses[0], reconnect=reconnect) as client,
        client.open_stream(EVERY) as stream,
        pytest.raises(ConnectionFailedError, match="UNAVAILABLE"),
    ):
        track_until_frame_3(stream, pair.proxy.kill)
    assert 0.4 < time.monotonic() - began_s < 10


def test_stream_can_be_closed_while_no_server_answers(pair: Pair) -> None:
    with connect(pair.addresses[0]) as client, client.open_stream(EVERY) as stream:

        def fail() -> None:
            pair.proxy.kill()
            threading.Timer(0.5, stream.close).start()

        with pytest.raises(ConnectionFailedError):
            track_until_frame_3(stream, fail)


def test_dead_first_address_is_passed_over(pair: Pair) -> None:
    pair.proxy.kill()
    with connect(pair.addresses) as client, client.open_stream(EVERY) as stream:
        results = results_among(list(stream.track(list_requests(FRAMES))))
    assert len(results) == FRAMES


# two servers behind one address

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
NGINX_CONFIG = Path(__file__).parents[2] / "deploy" / "nginx.conf"
HAS_STREAM = any(
    path.exists()
    for path in (
        Path("/usr/lib/nginx/modules/ngx_stream_module.so"),
        Path("/usr/lib64/nginx/modules/ngx_stream_module.so"),
    )
)


@pytest.mark.skipif(not (NGINX and HAS_STREAM), reason="nginx with its stream module is not installed")
def test_stream_behind_nginx_outlives_the_server_that_has_it(tmp_path: Path) -> None:
    assert NGINX is not None
    with ExitStack() as resources:
        proxies = []
        for _ in range(2):
            scheduler = FakeScheduler()
            resources.callback(scheduler.close)
            server = resources.enter_context(LocalServer(scheduler, resize_linear))
            proxies.append(resources.enter_context(Proxy(server.address)))
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        config = NGINX_CONFIG.read_text().replace("/run/trocar-nginx.pid", str(tmp_path / "pid"))
        for shipped, here in zip(
            ("127.0.0.1:50050", "127.0.0.1:50051", "127.0.0.1:50052"),
            (address, proxies[0].address, proxies[1].address),
            strict=True,
        ):
            assert shipped in config
            config = config.replace(shipped, here)
        (tmp_path / "nginx.conf").write_text(config)
        nginx = subprocess.Popen([NGINX, "-c", str(tmp_path / "nginx.conf"), "-g", "daemon off;"])
        resources.callback(nginx.wait)
        resources.callback(nginx.terminate)

        ids, resumptions = [], 0
        with connect(address, reconnect=QUICK) as client, client.open_stream(EVERY) as stream:
            for event in stream.track(list_requests(FRAMES)):
                resumptions += isinstance(event, Resumed)
                if isinstance(event, Result):
                    ids.append(event.frame_id)
                    assert event.frame_id == 0 or event.objects[0].object_id == 1
                    if event.frame_id == FAULT_AT:
                        max(proxies, key=lambda proxy: proxy.connections).kill()
        assert ids == list(range(FRAMES))
        assert resumptions == 1


# a server that goes home


async def test_draining_server_tells_its_streams_and_answers_what_it_took(
    scheduler: FakeScheduler,
) -> None:
    server = TrackingServer(
        ServerConfig(address="127.0.0.1:0", shutdown_grace_s=0.3), scheduler, resize_linear
    )
    await server.start()
    await server.warm_up()
    async with aio.insecure_channel(server.address) as channel:
        call = Call(channel)
        await call.open()
        scheduler.gate.clear()
        await call.frames(encode_clip(draw_frames(3)))
        await until(lambda: len(scheduler.jobs_of(scheduler.streams[0])) == 3)
        stopping = asyncio.create_task(server.stop())
        late = Call(channel)
        assert (await late.read_failure())[0].name == "UNAVAILABLE"
        # Beyond the grace: the server takes no more, and still owes what it took.
        await asyncio.sleep(0.6)
        scheduler.gate.set()
        responses = [await call.read() for _ in range(4)]
        assert [result.frame_id for result in results_of(responses)] == [0, 1, 2]
        assert [one.reason for one in warnings_of(responses)] == [pb.WARNING_REASON_SHUTTING_DOWN]
        code, details = await call.read_failure()
        assert (code.name, "reconnect" in details) == ("UNAVAILABLE", True)
        await asyncio.wait_for(stopping, 5)


async def drain_with_frames_in_flight(
    scheduler: FakeScheduler,
    delivery: pb.Delivery.ValueType,
    frames: int,
    is_taken: Callable[[], bool],
) -> list[pb.TrackResponse]:
    """Send frames to a tracker that is held back, drain the server, let go; returns what was answered."""
    config = ServerConfig(address="127.0.0.1:0", shutdown_grace_s=0.1)
    server = TrackingServer(config, scheduler, resize_linear)
    await server.start()
    await server.warm_up()
    async with aio.insecure_channel(server.address) as channel:
        call = Call(channel)
        await call.open(delivery=delivery)
        scheduler.gate.clear()
        await call.frames(encode_clip(draw_frames(frames)))
        await until(lambda: bool(scheduler.streams) and is_taken())
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0.3)
        scheduler.gate.set()
        responses = await call.read_until_failure()
        await asyncio.wait_for(stopping, 5)
    return responses


async def test_draining_server_answers_every_frame_that_it_has_read(scheduler: FakeScheduler) -> None:
    taken = QUEUE_CAPACITY + 1 + WAITING_EVERY_PACKETS + 1
    responses = await drain_with_frames_in_flight(
        scheduler, pb.DELIVERY_EVERY, taken + 5, lambda: len(scheduler.jobs) == QUEUE_CAPACITY
    )
    # In the tracker, before it, in the inbox, and before that: the others never left the transport.
    assert [result.frame_id for result in results_of(responses)] == list(range(taken))


async def test_draining_server_accounts_for_every_frame_of_a_live_stream(scheduler: FakeScheduler) -> None:
    def has_last() -> bool:
        jobs = [job for _, job in scheduler.jobs if job.picture is not None and job.picture.frame_id == 39]
        return bool(jobs)

    responses = await drain_with_frames_in_flight(scheduler, pb.DELIVERY_LATEST, 40, has_last)
    assert accounted_ids(responses) == list(range(40))
    assert results_of(responses)[-1].frame_id == 39


async def test_client_with_another_address_leaves_a_draining_server_without_a_loss() -> None:
    schedulers = [FakeScheduler(), FakeScheduler()]
    config = ServerConfig(address="127.0.0.1:0", shutdown_grace_s=5)
    servers = [TrackingServer(config, scheduler, resize_linear) for scheduler in schedulers]
    for server in servers:
        await server.start()
        await server.warm_up()
    stopping: asyncio.Task[None] | None = None

    async def requests() -> AsyncIterator[Request]:
        for request in list_requests(FRAMES):
            await asyncio.sleep(0.005)
            yield request

    events: list[Event] = []
    began_s = time.monotonic()
    async with (
        await connect_async([server.address for server in servers], reconnect=QUICK) as client,
        client.open_stream(EVERY) as stream,
    ):
        async for event in stream.track(requests()):
            events.append(event)
            if isinstance(event, Result) and event.frame_id == FAULT_AT:
                stopping = asyncio.create_task(servers[0].stop())
    assert stopping is not None
    await stopping
    assert time.monotonic() - began_s < 4, "nobody had to wait for the end of the grace"
    await servers[1].stop()
    for scheduler in schedulers:
        scheduler.close()
    assert [result.frame_id for result in results_among(events)] == list(range(FRAMES))
    (resumed,) = [event for event in events if isinstance(event, Resumed)]
    assert resumed.lost_frame_ids == ()
    assert [event.reason for event in events if isinstance(event, Notice)] == ["shutting_down"]


# watchdogs of the server


@pytest.mark.parametrize("work", ["trocar.session.read_prompt", "trocar.session.masks_from_logits"])
async def test_prompt_or_masks_that_hang_end_their_stream_by_name(
    scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    hangs = threading.Event()
    monkeypatch.setattr(work, lambda *_, **__: hangs.wait(20))
    config = ServerConfig(address="127.0.0.1:0", max_decode_s=0.3, shutdown_grace_s=0)
    server = TrackingServer(config, scheduler, resize_linear)
    await server.start()
    await server.warm_up()
    async with aio.insecure_channel(server.address) as channel:
        victim = Call(channel)
        await victim.open()
        await victim.frames(encode_clip(draw_frames(1)))
        await victim.prompt_red(0)
        code, details = await victim.read_failure()
    assert (code.name, "limit max_decode_s" in details) == ("INTERNAL", True)
    hangs.set()
    await until(lambda: not server.has_hung_threads)
    await server.stop()


async def test_decoder_that_hangs_costs_its_stream_only(scheduler: FakeScheduler) -> None:
    hangs = threading.Event()

    def resize_or_hang(rgb, size):  # type: ignore[no-untyped-def]
        if rgb.shape[0] > 200:
            hangs.wait(20)
        return resize_linear(rgb, size)

    config = ServerConfig(address="127.0.0.1:0", max_decode_s=0.3, shutdown_grace_s=0)
    server = TrackingServer(config, scheduler, resize_or_hang)
    await server.start()
    await server.warm_up()
    large = draw_frames(1)[0].repeat(2, axis=0).repeat(2, axis=1)
    async with aio.insecure_channel(server.address) as channel:
        victims = [Call(channel) for _ in range(4)]
        for number, victim in enumerate(victims):
            await victim.open()
            await victim.frames(encode_clip([large]))
            code, details = await victim.read_failure()
            assert (code.name, "limit max_decode_s" in details) == ("INTERNAL", True)
            assert server.is_healthy == (number < 3), "a few hung threads are borne, not any number"
        healthy = Call(channel)
        await healthy.open()
        await healthy.frames(encode_clip(draw_frames(3)))
        assert len(results_of(await healthy.read_rest())) == 3
    assert server.has_hung_threads
    hangs.set()
    await server.stop()


class HangingResize:
    """Holds up pictures that are higher than the clips', until it is let go."""

    def __init__(self) -> None:
        self.entered = 0
        self.is_let_go = threading.Event()

    def __call__(self, rgb: UInt8Array, size: int) -> UInt8Array:
        if rgb.shape[0] > 200:
            self.entered += 1
            self.is_let_go.wait(20)
        return resize_linear(rgb, size)


@pytest.fixture
def resize() -> Iterator[HangingResize]:
    resize = HangingResize()
    yield resize
    resize.is_let_go.set()


def encode_hanging_packet() -> bytes:
    return encode_clip([draw_frames(1)[0].repeat(2, axis=0).repeat(2, axis=1)])[0]


async def hang_up_in_the_decoder(channel: aio.Channel, resize: HangingResize, packet: bytes) -> None:
    """Leave a decoder that hangs; where there is no place, leave at once."""
    call, entered = Call(channel), resize.entered
    with suppress(aio.AioRpcError, asyncio.InvalidStateError, AssertionError):
        await call.open()
        await call.frame(0, packet)
        await until(lambda: resize.entered > entered)
    call.cancel()


@pytest.mark.parametrize("hangs", [2, 2 * SESSION_THREADS + MOST_HUNG_DECODERS])
async def test_clients_that_leave_hung_decoders_starve_nobody_unnoticed(
    scheduler: FakeScheduler, resize: HangingResize, hangs: int
) -> None:
    config = ServerConfig(address="127.0.0.1:0", max_streams=2, max_decode_s=0.3, shutdown_grace_s=0)
    server = TrackingServer(config, scheduler, resize)
    await server.start()
    await server.warm_up()
    packet, honest = encode_hanging_packet(), encode_clip(draw_frames(1))[0]
    async with AsyncExitStack() as resources:
        channel = await resources.enter_async_context(aio.insecure_channel(server.address))
        while resize.entered < hangs and server.is_healthy:
            await hang_up_in_the_decoder(channel, resize, packet)
        assert resize.entered <= MOST_HUNG_DECODERS + config.max_streams
        if server.is_healthy:
            await until(lambda: not server._servicer.open_stream_ids)
            call = Call(channel)
            await call.open()
            await call.frame(0, honest)
            assert len(results_of(await call.read_rest())) == 1
            await server.stop()
        else:
            assert await asyncio.wait_for(server.run_until_stopped(), 5) is False
    assert server.has_hung_threads
    resize.is_let_go.set()
    await until(lambda: not server.has_hung_threads)


@pytest.mark.parametrize("hangs_up", [True, False])
async def test_server_that_stops_during_a_hung_decode_does_not_wait_for_it(
    scheduler: FakeScheduler, resize: HangingResize, monkeypatch: pytest.MonkeyPatch, hangs_up: bool
) -> None:
    monkeypatch.setattr("trocar.server.CUT_OFF_S", 0.1)
    monkeypatch.setattr("trocar.server.LAST_WORK_S", 0.1)
    config = ServerConfig(address="127.0.0.1:0", shutdown_grace_s=0)
    server = TrackingServer(config, scheduler, resize)
    await server.start()
    await server.warm_up()
    async with aio.insecure_channel(server.address) as channel:
        call = Call(channel)
        await call.open()
        await call.frame(0, encode_hanging_packet())
        await until(lambda: resize.entered == 1)
        if hangs_up:
            call.cancel()
        await asyncio.wait_for(server.stop(), 3)
    assert server.has_hung_threads
    resize.is_let_go.set()
    await until(lambda: not server.has_hung_threads and not server._servicer.open_stream_ids)


async def test_device_that_hangs_ends_the_server(server: TrackingServer, scheduler: FakeScheduler) -> None:
    running = asyncio.create_task(server.run_until_stopped())
    scheduler.busy_s = 1e6
    assert await asyncio.wait_for(running, 5) is False
    assert server.has_hung_threads


def test_pauses_between_attempts_grow_and_end() -> None:
    pauses = [_find_pause(attempts, 2) for attempts in range(20)]
    assert pauses[:2] == [0, 0]
    assert all(pause == 0 for pause in pauses[1::2])
    grown = pauses[2::2]
    assert all(before <= after for before, after in itertools.pairwise(grown))
    assert grown[-1] == LONGEST_PAUSE_S


# bytes that break gRPC itself


def ask_for_a_path_that_is_no_text(address: str) -> None:
    """Say it in HTTP/2, as no gRPC client would, and wait until the server has heard it."""
    call = begin_call(1, path=b"/trocar.v1.\xff/Track")
    with socket.create_connection(split_address(address), 5) as one:
        one.sendall(PREFACE + frame(SETTINGS) + call)
        while b"CANCELLED" not in one.recv(65_536):
            pass


async def open_stream_when_heard(address: str, resources: AsyncExitStack) -> Call:
    async with asyncio.timeout(10):
        while True:
            channel = aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
            await resources.enter_async_context(channel)
            call = Call(channel)
            try:
                await call.open()
            except aio.AioRpcError as error:
                if error.code() not in RECOVERABLE:
                    raise
                await asyncio.sleep(0.02)
            else:
                return call


async def test_path_that_is_no_text_ends_neither_listener_nor_open_streams(
    server: TrackingServer, call: Call
) -> None:
    packets = encode_clip(draw_frames(3))
    await call.open()
    for number, packet in enumerate(packets):
        await asyncio.to_thread(ask_for_a_path_that_is_no_text, server.address)
        await call.frame(number, packet)
        assert (await call.read_result()).frame_id == number
        async with AsyncExitStack() as resources:
            newcomer = await open_stream_when_heard(server.address, resources)
            await newcomer.frame(0, packets[0])
            assert len(results_of(await newcomer.read_rest())) == 1
    assert server.is_healthy
    assert results_of(await call.read_rest()) == []


async def test_listener_that_broke_stays_for_its_streams_and_no_longer(
    server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trocar.server.CUT_OFF_S", 0.1)
    monkeypatch.setattr("trocar.server.HEALTH_CHECK_INTERVAL_S", 0.1)

    async with AsyncExitStack() as resources:
        calls = []
        for _ in range(3):
            calls.append(await open_stream_when_heard(server.address, resources))
            await asyncio.to_thread(ask_for_a_path_that_is_no_text, server.address)
        await asyncio.sleep(0.5)
        broken = [weakref.ref(one) for one in server._broken]
        assert len(broken) == 3
        for call in calls:
            assert await call.read_rest() == []
        await until(lambda: not server._broken)
        gc.collect()
        assert [one() for one in broken] == [None] * 3


async def test_open_stream_keeps_one_broken_listener_and_no_more(
    server: TrackingServer, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trocar.server.CUT_OFF_S", 0.1)
    monkeypatch.setattr("trocar.server.HEALTH_CHECK_INTERVAL_S", 0.1)
    await call.open()
    for _ in range(4):
        before = server._server
        await asyncio.to_thread(ask_for_a_path_that_is_no_text, server.address)
        await until(lambda before=before: server._server is not before)  # type: ignore[misc]
    await until(lambda: len(server._broken) <= 1)
    await call.frame(0, encode_clip(draw_frames(1))[0])
    assert len(results_of(await call.read_rest())) == 1
    await until(lambda: not server._broken)


class SlowlyLoadingScheduler(FakeScheduler):
    def __init__(self) -> None:
        super().__init__()
        self.is_asked, self.is_loaded = threading.Event(), threading.Event()

    def open_stream(self, *, model: str, memory: str | None, is_live: bool, max_objects: int) -> FakeStream:
        self.is_asked.set()
        self.is_loaded.wait(10)
        return super().open_stream(model=model, memory=memory, is_live=is_live, max_objects=max_objects)


async def test_call_whose_model_still_loads_is_not_cut_with_its_broken_listener(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trocar.server.CUT_OFF_S", 0.1)
    monkeypatch.setattr("trocar.server.HEALTH_CHECK_INTERVAL_S", 0.1)
    scheduler = SlowlyLoadingScheduler()
    server = TrackingServer(config, scheduler, resize_linear)
    await server.start()
    await server.warm_up()
    try:
        async with aio.insecure_channel(server.address) as channel:
            call = Call(channel)
            opening = asyncio.create_task(call.open())
            await until(scheduler.is_asked.is_set)
            await asyncio.to_thread(ask_for_a_path_that_is_no_text, server.address)
            await asyncio.sleep(0.5)
            scheduler.is_loaded.set()
            await opening
            await call.frame(0, encode_clip(draw_frames(1))[0])
            assert len(results_of(await call.read_rest())) == 1
    finally:
        scheduler.is_loaded.set()
        await server.stop()
        scheduler.close()


def is_closed(server: TrackingServer) -> bool:
    assert server._audit._file is not None
    try:
        socket.create_connection(split_address(server.metrics_address), 5).close()
    except OSError:
        return server._audit._file.closed
    return False


@pytest.fixture
async def audited_server(scheduler: FakeScheduler, tmp_path: Path) -> TrackingServer:
    config = ServerConfig(
        address="127.0.0.1:0",
        metrics_address="127.0.0.1:0",
        audit_log=tmp_path / "audit.jsonl",
        shutdown_grace_s=0,
    )
    server = TrackingServer(config, scheduler, resize_linear)
    await server.start()
    await server.warm_up()
    return server


async def test_server_that_stops_as_its_listener_breaks_closes_everything(
    audited_server: TrackingServer,
) -> None:
    with socket.create_connection(split_address(audited_server.address), 5) as one:
        one.sendall(PREFACE + frame(SETTINGS) + begin_call(1, path=b"/\xff"))
        # gRPC's threads hear of it, the loop only while the server stops.
        time.sleep(0.2)  # noqa: ASYNC251
        await audited_server.stop()
    assert is_closed(audited_server)


async def test_server_that_stops_while_it_stops_a_broken_listener_closes_everything(
    audited_server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert audited_server._server is not None
    kind, ended = type(audited_server._server), asyncio.get_running_loop().create_future()
    stop = kind.stop

    async def stop_when_ended(one: aio.Server, grace: float | None) -> None:
        # As in gRPC: all who stop a server wait for one future.
        await ended
        await stop(one, grace)

    monkeypatch.setattr(kind, "stop", stop_when_ended)
    await asyncio.to_thread(ask_for_a_path_that_is_no_text, audited_server.address)
    await until(lambda: bool(audited_server._broken))
    stopping = asyncio.create_task(audited_server.stop())
    await asyncio.sleep(0.2)
    assert not ended.cancelled()
    ended.set_result(None)
    await stopping
    assert is_closed(audited_server)


async def test_listener_that_starts_while_the_server_stops_is_stopped_too(
    audited_server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert audited_server._server is not None
    kind, started = type(audited_server._server), list[Any]()
    start = kind.start

    async def start_slowly(one: aio.Server) -> None:
        await start(one)
        started.append(one)
        await asyncio.sleep(5)

    monkeypatch.setattr(kind, "start", start_slowly)
    await asyncio.to_thread(ask_for_a_path_that_is_no_text, audited_server.address)
    await until(lambda: bool(started))
    await audited_server.stop()
    assert not started[0]._server.is_running()


async def test_failure_of_any_kind_to_listen_again_ends_the_server(
    server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(address: str) -> None:
        raise OSError(24, "too many open files")

    monkeypatch.setattr(server, "_listen", fail)
    running = asyncio.create_task(server.run_until_stopped())
    await asyncio.to_thread(ask_for_a_path_that_is_no_text, server.address)
    assert await asyncio.wait_for(running, 10) is False


async def test_server_that_cannot_listen_again_ends(
    server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trocar.server.LISTEN_AGAIN_S", 0.2)
    running = asyncio.create_task(server.run_until_stopped())
    address, server.address = server.address, "192.0.2.1:1"
    await asyncio.to_thread(ask_for_a_path_that_is_no_text, address)
    assert await asyncio.wait_for(running, 10) is False
