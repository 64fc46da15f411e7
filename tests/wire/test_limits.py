import asyncio
import gc
import logging
import resource
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from trocar.calls import CALL_BURST, CallTurns
from trocar.config import ServerConfig, split_address
from trocar.decode import PacketDecoder
from trocar.errors import ConfigError
from trocar.server import TrackingServer
from trocar.session import SESSION_THREADS, Session
from trocar.v1 import tracking_pb2 as pb
from trocar.v1 import tracking_pb2_grpc as pb_grpc
from trocar_bench.assault import PREFACE, RESETS_AT_ONCE, SETTINGS, Peer, frame, write_resets
from trocar_engines.errors import CheckpointError
from trocar_engines.masklets import UInt8Array
from wire.calls import RED_POINT, Call, accounted_ids, count_keyframe_requests, results_of, until, warnings_of
from wire.clips import draw_frames, encode_clip, encode_jpeg
from wire.fakes import FakeCard, FakeScheduler, resize_linear

MOST_CALLS = max(CALL_BURST, 2 * ServerConfig().max_streams)
"""Of one connection at once, where hardly any come in the long run."""


async def test_ninth_stream_is_refused_and_a_freed_place_is_given_away(
    channel: aio.Channel, scheduler: FakeScheduler
) -> None:
    calls = [Call(channel) for _ in range(8)]
    for call in calls:
        await call.open()
    ninth = Call(channel)
    code, details = await ninth.read_failure()
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "8 streams" in details
    calls[0].cancel()
    await until(lambda: len(scheduler.streams) == 7)
    await Call(channel).open()
    for call in calls:
        call.cancel()


async def test_calls_that_say_nothing_hold_no_place(
    channel: aio.Channel, scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def let_all_pass(turns: CallTurns, peer: str) -> None:
        """Turns are another matter."""

    monkeypatch.setattr(CallTurns, "wait", let_all_pass)
    silent = [pb_grpc.TrackingServiceStub(channel).Track() for _ in range(32)]  # type: ignore[call-arg]
    for one in silent:
        await one.wait_for_connection()
    calls = [Call(channel) for _ in range(8)]
    for call in calls:
        await call.open()
    assert len(scheduler.streams) == 8
    for one in silent:
        one.cancel()
    for call in calls:
        call.cancel()


async def test_connection_that_calls_without_end_waits_and_another_gets_in(
    scheduler: FakeScheduler,
) -> None:
    config = ServerConfig(address="127.0.0.1:0", max_calls_per_s=0.01, shutdown_grace_s=0)
    server = TrackingServer(config, scheduler, resize_linear)
    server._servicer.turns._longest_s = 0.3
    await server.start()
    await server.warm_up()

    async def ask(channel: aio.Channel) -> grpc.StatusCode:
        return await channel.unary_unary(path, None, None)(b"").code()

    for path in (
        "/trocar.v1.TrackingService/GetServerInfo",
        "/grpc.health.v1.Health/Check",
        "/trocar.v1.TrackingService/NoSuchMethod",
    ):
        # A pool of its own, else channels to one address share their connection.
        own_pool = [("grpc.use_local_subchannel_pool", 1)]
        async with (
            aio.insecure_channel(server.address, own_pool) as greedy,
            aio.insecure_channel(server.address, own_pool) as modest,
        ):
            codes = await asyncio.gather(*(ask(greedy) for _ in range(2 * MOST_CALLS)))
            good = await ask(modest)
            assert codes.count(good) == MOST_CALLS, path
            assert codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == MOST_CALLS
            code, details = await Call(greedy).read_failure()
            assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "limit max_calls_per_s" in details
            await Call(modest).open()
    refusals = server._servicer.metrics.refusals.labels("max_calls_per_s")
    assert refusals._value.get() == 3 * (MOST_CALLS + 1)
    await server.stop()


async def test_calls_that_are_cancelled_at_once_are_refused_by_grpc(
    server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = 0

    async def count_and_wait(turns: CallTurns, peer: str) -> None:
        nonlocal waits
        waits += 1
        await wait(turns, peer)

    wait = CallTurns.wait
    monkeypatch.setattr(CallTurns, "wait", count_and_wait)
    host, port = split_address(server.address)
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(PREFACE + frame(SETTINGS))
    answering = asyncio.ensure_future(Peer(reader, writer).answer())
    for round_number in range(20):
        writer.write(write_resets(1 + 2 * RESETS_AT_ONCE * round_number))
        await writer.drain()
        await asyncio.sleep(0.02)
    assert MOST_CALLS < waits < 20 * RESETS_AT_ONCE / 10
    answering.cancel()
    writer.close()


async def test_calls_before_the_server_is_ready_do_not_count(scheduler: FakeScheduler) -> None:
    config = ServerConfig(address="127.0.0.1:0", max_calls_per_s=0.01, shutdown_grace_s=0)
    server = TrackingServer(config, scheduler, resize_linear)
    await server.start()
    async with aio.insecure_channel(server.address) as channel:
        for _ in range(2 * MOST_CALLS):
            assert (await Call(channel).read_failure())[0] == grpc.StatusCode.UNAVAILABLE
        await server.warm_up()
        await Call(channel).open()
    await server.stop()


async def test_live_stream_is_read_no_faster_than_its_rate(scheduler: FakeScheduler) -> None:
    config = ServerConfig(address="127.0.0.1:0", max_requests_per_s=40, shutdown_grace_s=0)
    server = TrackingServer(config, scheduler, resize_linear)
    await server.start()
    await server.warm_up()
    payload = encode_jpeg(draw_frames(1)[0])
    async with aio.insecure_channel(server.address) as channel:
        began_s = time.monotonic()
        live, recorded = Call(channel), Call(channel)
        await recorded.open(pb.VIDEO_CODEC_JPEG)
        await recorded.frames([payload] * 80)
        assert len(results_of(await recorded.read_rest())) == 80
        await live.open(pb.VIDEO_CODEC_JPEG, delivery=pb.DELIVERY_LATEST)
        await live.frames([payload] * 80)
        assert accounted_ids(await live.read_rest()) == list(range(80))
        assert time.monotonic() - began_s > 0.95, "40 at once, and 40 in a second"
    await server.stop()


async def test_vanished_client_frees_its_stream_while_frames_are_being_tracked(
    server: TrackingServer, scheduler: FakeScheduler
) -> None:
    scheduler.gate.clear()
    async with aio.insecure_channel(server.address) as channel:
        call = Call(channel)
        await call.open()
        await call.frames(encode_clip(draw_frames(3)))
        stream = scheduler.streams[0]
        await until(lambda: bool(scheduler.jobs_of(stream)))
    await until(lambda: stream.is_closed)
    assert not scheduler.streams
    scheduler.gate.set()


async def _ask_in_vain(call: Call) -> None:
    """Prompts, pins and removals that the tracker refuses, then a good end."""
    await call.prompt(pb.Prompt(object_id=1, frame_id=0))
    for object_id in range(12):
        await call.prompt_red(0, object_id=object_id)
    await call.write(pb.TrackRequest(pin_frame=pb.PinFrame(frame_id=2**40)))
    await call.remove(77)
    await call.read_rest()


async def _open_twice(call: Call) -> None:
    await call.write(pb.TrackRequest(open_stream=pb.OpenStream()))
    await call.read_failure()


async def _send_b_frames(call: Call) -> None:
    await call.frame(1, encode_clip(draw_frames(6), has_b_frames=True)[0])
    await call.read_failure()


async def _hang_up(call: Call) -> None:
    await call.read()
    call.cancel()


@pytest.mark.parametrize("end", [_ask_in_vain, _open_twice, _send_b_frames, _hang_up])
async def test_ended_stream_frees_its_decoder_without_the_garbage_collector(
    call: Call, end: Callable[[Call], Awaitable[None]]
) -> None:
    gc.collect()
    gc.disable()
    # pytest keeps every log record, and with it the error that ended the stream.
    logging.disable()
    try:
        await call.open()
        await call.frame(0, encode_clip(draw_frames(1))[0])
        await end(call)
        for _ in range(100):
            await asyncio.sleep(0.02)
            left = [one for one in gc.get_objects() if type(one) in (Session, PacketDecoder)]
            if not left:
                break
        assert left == []
    finally:
        gc.enable()
        logging.disable(logging.NOTSET)


async def test_streams_that_come_and_go_take_no_new_threads(scheduler: FakeScheduler) -> None:
    names = set()

    def resize_and_tell(rgb: UInt8Array, size: int) -> UInt8Array:
        names.add(threading.current_thread().name)
        return resize_linear(rgb, size)

    server = TrackingServer(ServerConfig(address="127.0.0.1:0"), scheduler, resize_and_tell)
    await server.start()
    await server.warm_up()
    async with aio.insecure_channel(server.address) as channel:
        for _ in range(5):
            call = Call(channel)
            await call.open()
            await call.frame(0, encode_clip(draw_frames(1))[0])
            assert len(results_of(await call.read_rest())) == 1
    assert len(names) <= SESSION_THREADS
    await server.stop()
    await until(lambda: not names & {one.name for one in threading.enumerate()})


async def test_client_that_never_sends_open_stream_frees_nothing_it_never_had(
    channel: aio.Channel, scheduler: FakeScheduler
) -> None:
    call = Call(channel)
    await call.write(pb.TrackRequest(reset_stream=pb.ResetStream()))
    assert (await call.read_failure())[0] == grpc.StatusCode.INVALID_ARGUMENT
    assert not scheduler.streams


@pytest.mark.parametrize("delivery", [pb.DELIVERY_LATEST, pb.DELIVERY_EVERY])
async def test_client_that_floods_and_never_reads_takes_bounded_memory(
    call: Call, delivery: pb.Delivery.ValueType
) -> None:
    payload = draw_frames(1)[0].tobytes()
    size = pb.VideoFormat(width_px=160, height_px=120)
    await call.open(pb.VIDEO_CODEC_RGB24, delivery=delivery, settings=pb.OpenStream(video=size))

    async def flood() -> None:
        for frame_id in range(1_000_000):
            await call.frame(frame_id, payload)

    flooding = asyncio.create_task(flood())
    await asyncio.sleep(1.0)
    before_kib = measure_resident_kib()
    await asyncio.sleep(1.5)
    grown_kib = measure_resident_kib() - before_kib
    flooding.cancel()
    call.cancel()
    assert grown_kib < 32 * 1024, "57 kB a frame would have grown by hundreds of MB"


def measure_resident_kib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 1024


async def test_live_stream_whose_decoding_falls_behind_skips_to_a_keyframe(
    scheduler: FakeScheduler,
) -> None:
    config = ServerConfig(address="127.0.0.1:0", max_waiting_packets=4, shutdown_grace_s=0.1)
    held = threading.Event()

    def resize_when_released(rgb, size):  # type: ignore[no-untyped-def]
        held.wait(10)
        return resize_linear(rgb, size)

    server = TrackingServer(config, scheduler, resize_when_released)
    await server.start()
    await server.warm_up()
    async with aio.insecure_channel(server.address) as channel:
        call = Call(channel)
        await call.open(delivery=pb.DELIVERY_LATEST)
        await call.frames(encode_clip(draw_frames(24), keyframe_interval=10))
        await asyncio.sleep(0.2)
        held.set()
        responses = await call.read_rest()
    await server.stop()
    skipped = [one for one in warnings_of(responses) if one.reason == pb.WARNING_REASON_PACKETS_SKIPPED]
    assert list(skipped[0].lost_frame_ids) == list(range(1, 20))
    assert accounted_ids(responses) == list(range(24))
    assert all(result.is_trusted for result in results_of(responses))


@pytest.mark.parametrize(("longest_silence_s", "tracked"), [(1e9, {0, 8, 9, 10, 11}), (0.0, set(range(12)))])
async def test_live_stream_that_lags_decodes_without_tracking_until_it_has_caught_up_or_is_silent(
    scheduler: FakeScheduler,
    config: ServerConfig,
    monkeypatch: pytest.MonkeyPatch,
    longest_silence_s: float,
    tracked: set[int],
) -> None:
    monkeypatch.setattr("trocar.session.LONGEST_SILENCE_S", longest_silence_s)
    held = threading.Event()
    resized = 0

    def resize_when_released(rgb, size):  # type: ignore[no-untyped-def]
        nonlocal resized
        resized += 1
        held.wait(10)
        return resize_linear(rgb, size)

    server = TrackingServer(config, scheduler, resize_when_released)
    await server.start()
    await server.warm_up()
    async with aio.insecure_channel(server.address) as channel:
        call = Call(channel)
        await call.open(delivery=pb.DELIVERY_LATEST)
        await call.frames(encode_clip(draw_frames(12), keyframe_interval=12))
        await asyncio.sleep(0.2)
        held.set()
        responses = await call.read_rest()
    await server.stop()
    assert resized == len(tracked)
    assert {result.frame_id for result in results_of(responses)} <= tracked
    assert results_of(responses)[-1].frame_id == 11
    assert accounted_ids(responses) == list(range(12))
    assert all(result.is_trusted for result in results_of(responses)), "they were decoded"


async def test_skipping_goes_on_until_a_keyframe_comes_and_asks_for_one(scheduler: FakeScheduler) -> None:
    config = ServerConfig(address="127.0.0.1:0", max_waiting_packets=4, shutdown_grace_s=0.1)
    held = threading.Event()

    def resize_when_released(rgb, size):  # type: ignore[no-untyped-def]
        held.wait(10)
        return resize_linear(rgb, size)

    server = TrackingServer(config, scheduler, resize_when_released)
    await server.start()
    await server.warm_up()
    packets = encode_clip(draw_frames(24), keyframe_interval=20)
    async with aio.insecure_channel(server.address) as channel:
        call = Call(channel)
        await call.open(delivery=pb.DELIVERY_LATEST)
        await call.frames(packets[:12])
        await asyncio.sleep(0.2)
        held.set()
        first = await call.read_result()
        await call.frames(packets[12:], first_id=12)
        responses = await call.read_rest()
    await server.stop()
    assert first.frame_id == 0
    skipped = [one for one in warnings_of(responses) if one.reason == pb.WARNING_REASON_PACKETS_SKIPPED]
    assert [lost for one in skipped for lost in one.lost_frame_ids] == list(range(1, 20))
    assert count_keyframe_requests(responses) == 1
    assert accounted_ids(responses) == list(range(1, 24))
    assert all(result.is_trusted for result in results_of(responses))


async def test_live_jpeg_stream_that_falls_behind_only_drops(scheduler: FakeScheduler, call: Call) -> None:
    payload = encode_jpeg(draw_frames(1)[0])
    await call.open(pb.VIDEO_CODEC_JPEG, delivery=pb.DELIVERY_LATEST)
    scheduler.gate.clear()
    await call.frames([payload] * 40)
    await until(lambda: bool(scheduler.jobs_of(scheduler.streams[0])))
    scheduler.gate.set()
    responses = await call.read_rest()
    assert accounted_ids(responses) == list(range(40))
    assert not warnings_of(responses)
    assert results_of(responses)[-1].frame_id == 39


async def test_message_beyond_the_limit_ends_the_stream(scheduler: FakeScheduler) -> None:
    config = ServerConfig(address="127.0.0.1:0", max_message_bytes=64 << 10, shutdown_grace_s=0.1)
    server = TrackingServer(config, scheduler, resize_linear)
    await server.start()
    await server.warm_up()
    async with aio.insecure_channel(server.address) as channel:
        call = Call(channel)
        opened = await call.open()
        assert opened.limits.max_message_bytes == 64 << 10
        await call.frame(0, b"x" * (65 << 10))
        assert (await call.read_failure())[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
    await until(lambda: not scheduler.streams)
    await server.stop()


async def test_picture_beyond_the_limit_is_lost_with_a_warning_and_the_stream_goes_on(
    scheduler: FakeScheduler,
) -> None:
    config = ServerConfig(address="127.0.0.1:0", max_picture_pixels=160 * 120, shutdown_grace_s=0.1)
    server = TrackingServer(config, scheduler, resize_linear)
    await server.start()
    await server.warm_up()
    small = draw_frames(1)[0]
    async with aio.insecure_channel(server.address) as channel:
        call = Call(channel)
        await call.open(pb.VIDEO_CODEC_JPEG)
        await call.frames([encode_jpeg(small), encode_jpeg(np.tile(small, (2, 2, 1))), encode_jpeg(small)])
        responses = await call.read_rest()
    await server.stop()
    assert [result.frame_id for result in results_of(responses)] == [0, 2]
    (warning,) = warnings_of(responses)
    assert list(warning.lost_frame_ids) == [1]
    assert "the picture has 320x240, expected at most 19200" in warning.message


async def test_health_serves_only_after_warm_up(scheduler: FakeScheduler, config: ServerConfig) -> None:
    server = TrackingServer(config, scheduler, resize_linear)
    await server.start()
    async with aio.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="trocar.v1.TrackingService")
        cold = await health.Check(request)
        assert cold.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await Call(channel).read_failure())[0] == grpc.StatusCode.UNAVAILABLE
        await server.warm_up()
        assert scheduler.is_warm
        assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
        watching = health.Watch(request)
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        watching.cancel()
    await server.stop()


async def test_server_info_tells_models_limits_and_load(channel: aio.Channel, call: Call) -> None:
    await call.open()
    stub: pb_grpc.TrackingServiceAsyncStub = pb_grpc.TrackingServiceStub(channel)
    info = await stub.GetServerInfo(pb.GetServerInfoRequest())
    assert [model.name for model in info.models] == ["fake-nano"]
    assert info.default_model == "fake-nano"
    assert info.default_memory_policy == pb.MEMORY_POLICY_FIFO
    assert (info.open_streams, info.limits.max_streams, info.is_serving) == (1, 8, True)


class UndescribedScheduler(FakeScheduler):
    def model_card(self, model: str) -> FakeCard:
        raise CheckpointError(f"{model}.json is damaged")


async def test_server_info_tells_which_model_cannot_be_described(config: ServerConfig) -> None:
    scheduler = UndescribedScheduler()
    server = TrackingServer(config, scheduler, resize_linear)
    await server.start()
    try:
        async with aio.insecure_channel(server.address) as channel:
            stub: pb_grpc.TrackingServiceAsyncStub = pb_grpc.TrackingServiceStub(channel)
            with pytest.raises(aio.AioRpcError) as failure:
                await stub.GetServerInfo(pb.GetServerInfoRequest())
        assert failure.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "fake-nano.json is damaged" in (failure.value.details() or "")
    finally:
        await server.stop()
        scheduler.close()


async def test_reflection_names_the_service(channel: aio.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = [service.name async for one in call for service in one.list_services_response.service]
    assert "trocar.v1.TrackingService" in names


async def test_stopping_server_lets_an_open_stream_finish(scheduler: FakeScheduler) -> None:
    server = TrackingServer(ServerConfig(address="127.0.0.1:0"), scheduler, resize_linear)
    await server.start()
    await server.warm_up()
    async with aio.insecure_channel(server.address) as channel:
        call = Call(channel)
        await call.open()
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0.05)
        await call.frames(encode_clip(draw_frames(2)))
        assert len(results_of(await call.read_rest())) == 2
        await asyncio.wait_for(stopping, 3)


async def test_failed_device_ends_the_server(server: TrackingServer, scheduler: FakeScheduler) -> None:
    running = asyncio.create_task(server.run_until_stopped())
    scheduler.is_healthy = False
    assert await asyncio.wait_for(running, 5) is False


@pytest.mark.parametrize(
    "request_",
    [
        pb.TrackRequest(prompt=pb.Prompt(object_id=1, points=[RED_POINT])),
        pb.TrackRequest(pin_frame=pb.PinFrame(frame_id=0)),
        pb.TrackRequest(remove_object=pb.RemoveObject(object_id=1)),
        pb.TrackRequest(reset_stream=pb.ResetStream()),
    ],
    ids=["prompt", "pin", "removal", "reset"],
)
async def test_failed_device_ends_a_stream_whatever_was_asked_of_it(
    call: Call, scheduler: FakeScheduler, request_: pb.TrackRequest
) -> None:
    await call.open()
    await call.frame(0, encode_clip(draw_frames(1))[0])
    assert isinstance(await call.read(), pb.TrackResponse)
    scheduler.is_healthy = False
    await call.write(request_)
    code, _ = await call.read_failure()
    assert code == grpc.StatusCode.UNAVAILABLE, "a refusal would be final, and another server could do it"


STALLED_CLIENT = """
import grpc, signal, os, time
from trocar.v1 import tracking_pb2 as pb, tracking_pb2_grpc as pb_grpc
def requests():
    yield pb.TrackRequest(open_stream=pb.OpenStream(video=pb.VideoFormat(codec=1)))
    time.sleep(60)
channel = grpc.insecure_channel("ADDRESS")
call = pb_grpc.TrackingServiceStub(channel).Track(requests())
next(call)
os.kill(os.getpid(), signal.SIGSTOP)
"""


async def test_client_that_falls_silent_without_hanging_up_is_noticed(scheduler: FakeScheduler) -> None:
    config = ServerConfig(
        address="127.0.0.1:0", keepalive_time_s=1, keepalive_timeout_s=0.5, shutdown_grace_s=0
    )
    server = TrackingServer(config, scheduler, resize_linear)
    await server.start()
    await server.warm_up()
    program = STALLED_CLIENT.replace("ADDRESS", server.address)
    client = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    try:
        await until(lambda: bool(scheduler.streams))
        await until(lambda: not scheduler.streams)
    finally:
        client.kill()
        await client.wait()
        await server.stop()


async def test_taken_port_is_a_clear_error(server: TrackingServer, scheduler: FakeScheduler) -> None:
    second = TrackingServer(ServerConfig(address=server.address), scheduler, resize_linear)
    with pytest.raises(ConfigError, match="cannot listen"):
        await second.start()


async def test_tracker_that_stops_ends_streams_as_unavailable(call: Call, scheduler: FakeScheduler) -> None:
    await call.open()
    scheduler.gate.clear()
    await call.frames(encode_clip(draw_frames(1)))
    await until(lambda: bool(scheduler.jobs_of(scheduler.streams[0])))
    scheduler.close_stream(scheduler.streams[0])
    assert (await call.read_failure())[0] == grpc.StatusCode.UNAVAILABLE
