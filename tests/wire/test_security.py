"""Who gets in, to what, and what those who do not get in learn."""

import asyncio
import json
import logging
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc import aio

from trocar.client import connect_async
from trocar.client_core import Opened, StreamOptions
from trocar.config import Access, ServerConfig, TlsFiles, split_address
from trocar.decode import Codec
from trocar.errors import ConfigError, ConnectionFailedError
from trocar.lifeline import Lifeline
from trocar.link import LinkState, TrackerLink
from trocar.security import hash_token, read_token
from trocar.server import TrackingServer
from trocar.v1 import tracking_pb2 as pb
from trocar.v1 import tracking_pb2_grpc as pb_grpc
from trocar_bench.assault import DATA, PREFACE, SETTINGS, Peer, begin_call, frame
from wire.calls import Call, rejections_of, results_of, until
from wire.certificates import Authority, Pair
from wire.clips import draw_frames, encode_clip
from wire.fakes import FakeScheduler, resize_linear

LIVE = StreamOptions(codec=Codec.H264)
INITIAL_WINDOW_SIZE = 4
"""The HTTP/2 setting (RFC 9113, section 6.5.2)."""
TOKEN = "correct-horse-battery"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def server_pair(authority: Authority) -> Pair:
    return authority.issue("server", hosts=("localhost", "127.0.0.1"))


Serve = Callable[[ServerConfig], AbstractAsyncContextManager[TrackingServer]]


@pytest.fixture
def serve(scheduler: FakeScheduler) -> Serve:
    @asynccontextmanager
    async def serve(config: ServerConfig) -> AsyncIterator[TrackingServer]:
        server = TrackingServer(config, scheduler, resize_linear)
        await server.start()
        await server.warm_up()
        try:
            yield server
        finally:
            await server.stop()

    return serve


def config_of(
    server_pair: Pair, client_ca: Path | None, *, clients: Path | None = None, max_idle_s: float = 300
) -> ServerConfig:
    tls = TlsFiles(certificate=server_pair.certificate, key=server_pair.key, client_ca=client_ca)
    return ServerConfig(
        address="127.0.0.1:0", tls=tls, clients=clients, max_idle_s=max_idle_s, shutdown_grace_s=0
    )


def access_of(authority: Authority, pair: Pair | None, *, token: str = "") -> Access:
    return Access(
        ca=authority.path,
        certificate=pair.certificate if pair else None,
        key=pair.key if pair else None,
        token=token,
    )


def write_clients(path: Path, clients: dict[str, object]) -> Path:
    path.write_text(json.dumps({"clients": clients}))
    return path


async def open_once(address: str, access: Access, *, model: str = "") -> Opened:
    options = StreamOptions(codec=Codec.H264, model=model)
    async with (
        await connect_async(address, access=access, timeout_s=2) as client,
        client.open_stream(options) as stream,
    ):
        async for event in stream:
            assert isinstance(event, Opened)
            return event
    raise AssertionError("the stream ended before it was opened")


async def test_client_with_a_certificate_gets_in(
    serve: Serve, authority: Authority, server_pair: Pair
) -> None:
    async with serve(config_of(server_pair, authority.path)) as server:
        access = access_of(authority, authority.issue("or-3.example"))
        assert (await open_once(server.address, access)).model == "fake-nano"


@pytest.mark.parametrize("who", ["nobody", "expired", "of another authority", "in plain text"])
async def test_wrong_certificate_gets_nobody_in_and_the_peer_learns_nothing(
    who: str,
    serve: Serve,
    authority: Authority,
    server_pair: Pair,
    tmp_path: Path,
    scheduler: FakeScheduler,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other", "stranger")
    access = {
        "nobody": access_of(authority, None),
        "expired": access_of(authority, authority.issue("or-3.example", days=-1)),
        "of another authority": access_of(authority, stranger.issue("or-3.example")),
        "in plain text": Access(),
    }[who]
    reasons = {
        "nobody": "PEER_DID_NOT_RETURN_A_CERTIFICATE",
        "expired": "certificate has expired",
        "of another authority": "unable to get local issuer certificate",
        "in plain text": "WRONG_VERSION_NUMBER",
    }
    async with serve(config_of(server_pair, authority.path)) as server:
        with pytest.raises(ConnectionFailedError) as failure:
            await open_once(server.address, access)
    assert not any(word in str(failure.value) for word in ("expired", "issuer", "CERTIFICATE_VERIFY"))
    assert reasons[who] in capfd.readouterr().err, "gRPC's own log on stderr tells the server's owner why"
    assert not scheduler.streams


async def test_server_with_a_wrong_certificate_gets_no_video(
    serve: Serve, authority: Authority, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    impostor = Authority(tmp_path / "other").issue("server", hosts=("127.0.0.1",))
    async with serve(config_of(impostor, authority.path)) as server:
        with pytest.raises(ConnectionFailedError, match="refuses the certificate"):
            await open_once(server.address, access_of(authority, authority.issue("or-3.example")))


async def test_name_that_is_not_listed_is_refused_with_the_reason_in_the_log_alone(
    serve: Serve,
    authority: Authority,
    server_pair: Pair,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clients = write_clients(tmp_path / "clients.json", {"or-3.example": {}})
    async with serve(config_of(server_pair, authority.path, clients=clients)) as server:
        await open_once(server.address, access_of(authority, authority.issue("or-3.example")))
        with pytest.raises(ConnectionFailedError) as failure:
            await open_once(server.address, access_of(authority, authority.issue("or-4.example")))
        assert str(failure.value) == "PERMISSION_DENIED: not admitted"
        assert "or-4.example, which the clients file lacks" in caplog.text
        access = access_of(authority, authority.issue("or-4.example"))
        async with await connect_async(server.address, access=access) as client:
            with pytest.raises(ConnectionFailedError, match="PERMISSION_DENIED: not admitted"):
                await client.server_info()


async def test_common_name_does_not_stand_in_for_alternative_names(
    serve: Serve, authority: Authority, server_pair: Pair, tmp_path: Path
) -> None:
    clients = write_clients(tmp_path / "clients.json", {"or-3.example": {}})
    pair = authority.issue("or-3.example", file="liar", hosts=("elsewhere.example",))
    async with serve(config_of(server_pair, authority.path, clients=clients)) as server:
        with pytest.raises(ConnectionFailedError, match="PERMISSION_DENIED"):
            await open_once(server.address, access_of(authority, pair))


async def test_list_limits_streams_and_models_of_a_name(
    serve: Serve, authority: Authority, server_pair: Pair, tmp_path: Path
) -> None:
    clients = write_clients(
        tmp_path / "clients.json",
        {
            "one.example": {"max_streams": 1},
            "other.example": {"models": ["another"]},
        },
    )
    access = access_of(authority, authority.issue("one.example"))
    async with serve(config_of(server_pair, authority.path, clients=clients)) as server:
        async with (
            await connect_async(server.address, access=access) as client,
            client.open_stream(LIVE) as stream,
        ):
            assert isinstance(await anext(stream.__aiter__()), Opened)
            with pytest.raises(ConnectionFailedError, match="limit max_streams: client one"):
                await open_once(server.address, access)
        with pytest.raises(ConnectionFailedError, match=r"may not open model 'fake-nano'.*another"):
            await open_once(server.address, access_of(authority, authority.issue("other.example")))


async def test_list_is_read_again_when_it_changes_and_kept_when_it_breaks(
    serve: Serve, authority: Authority, server_pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_clients(tmp_path / "clients.json", {"or-3.example": {}})
    access = access_of(authority, authority.issue("or-4.example"))
    async with serve(config_of(server_pair, authority.path, clients=path)) as server:
        with pytest.raises(ConnectionFailedError, match="PERMISSION_DENIED"):
            await open_once(server.address, access)
        write_clients(path, {"or-3.example": {}, "or-4.example": {}})
        await open_once(server.address, access)
        path.write_text('{"clients": {"or-9.example": {"max_steams": 1}}}')
        await open_once(server.address, access)
        assert "keeping the former clients" in caplog.text


async def test_certificates_are_read_again_without_a_restart(
    serve: Serve, authority: Authority, server_pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pair = authority.issue("or-3.example")
    (tmp_path / "new").mkdir()
    successor = Authority(tmp_path / "new")
    access = access_of(authority, pair)
    async with (
        serve(config_of(server_pair, authority.path)) as server,
        await connect_async(server.address, access=access) as client,
    ):
        await client.server_info()
        server_pair.key.write_text("half a key")
        await open_once(server.address, access)
        assert "keeping the former certificate" in caplog.text
        fresh = successor.issue("server", hosts=("127.0.0.1",))
        server_pair.certificate.write_bytes(fresh.certificate.read_bytes())
        server_pair.key.write_bytes(fresh.key.read_bytes())
        authority.path.write_bytes(successor.path.read_bytes())
        await open_once(server.address, access_of(successor, successor.issue("or-3.example")))
        assert (await client.server_info()).is_serving, "connections that are open stay open"


async def test_token_names_its_client_and_a_wrong_one_nobody(
    serve: Serve, authority: Authority, server_pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clients = write_clients(tmp_path / "c.json", {"page": {"token_sha256": hash_token(TOKEN)}})
    caplog.set_level(logging.INFO)
    async with serve(config_of(server_pair, None, clients=clients)) as server:
        await open_once(server.address, access_of(authority, None, token=TOKEN))
        await until(lambda: "stream_closed" in caplog.text)
        opened = next(record for record in caplog.records if record.message == "stream_opened")
        assert opened.__dict__["fields"]["client"] == "page"
        for token in ("", TOKEN[:-1]):
            with pytest.raises(ConnectionFailedError) as failure:
                await open_once(server.address, access_of(authority, None, token=token))
            assert str(failure.value) == "UNAUTHENTICATED: not admitted"
    assert TOKEN not in caplog.text


async def test_gateway_of_the_page_gets_in_by_its_token_and_by_no_other(
    serve: Serve, authority: Authority, server_pair: Pair, tmp_path: Path
) -> None:
    clients = write_clients(tmp_path / "c.json", {"page": {"token_sha256": hash_token(TOKEN)}})
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    async with serve(config_of(server_pair, None, clients=clients)) as server:
        # The first address is nobody's: the gateway goes on with whoever answers.
        addresses = f"127.0.0.1:1,{server.address}"
        right = await find_state(addresses, access_of(authority, None, token=read_token(token_file)))
        assert right.is_up
        assert right.runtime == "fake"
        wrong = await find_state(server.address, access_of(authority, None, token=TOKEN[:-1]))
        assert (wrong.is_up, wrong.message) == (False, "UNAUTHENTICATED: not admitted")


async def find_state(address: str, access: Access) -> LinkState:
    """How the line of a page's gateway first is."""
    states = asyncio.Queue[LinkState]()
    link = TrackerLink(
        address,
        access,
        LIVE,
        Lifeline(),
        on_event=lambda _: None,
        on_state=states.put_nowait,
        on_keyframe_wanted=lambda: None,
    )
    running = asyncio.create_task(link.run())
    try:
        return await asyncio.wait_for(states.get(), 10)
    finally:
        running.cancel()


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        '{"clients": []}',
        '{"clients": {}, "more": 1}',
        '{"clients": {"a": {"streams": 1}}}',
        '{"clients": {"a": {"max_streams": true}}}',
        '{"clients": {"a": {"models": "all"}}}',
        '{"clients": {"a": {"token_sha256": "short"}}}',
    ],
)
def test_clients_file_that_means_nothing_is_refused(
    content: str, tmp_path: Path, scheduler: FakeScheduler
) -> None:
    path = tmp_path / "clients.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"clients\.json"):
        TrackingServer(ServerConfig(clients=path), scheduler, resize_linear)


def test_key_of_another_certificate_is_refused_at_the_start(
    authority: Authority, server_pair: Pair, scheduler: FakeScheduler
) -> None:
    other = authority.issue("other")
    tls = TlsFiles(certificate=server_pair.certificate, key=other.key)
    with pytest.raises(ConfigError, match=r"other\.key"):
        TrackingServer(ServerConfig(tls=tls), scheduler, resize_linear)


async def test_client_sends_nothing_in_plain_text_to_another_machine() -> None:
    with pytest.raises(ConfigError, match="--tls-ca"):
        await connect_async("192.0.2.1:50051", access=Access(token=TOKEN), timeout_s=0.1)


def test_short_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    with pytest.raises(ConfigError, match="at least 16"):
        read_token(tmp_path / "token")


# limits


async def test_silent_stream_is_ended_and_the_limit_named(serve: Serve, scheduler: FakeScheduler) -> None:
    config = ServerConfig(address="127.0.0.1:0", max_idle_s=0.3, shutdown_grace_s=0)
    async with serve(config) as server, aio.insecure_channel(server.address) as channel:
        call = Call(channel)
        await call.open()
        code, details = await call.read_failure()
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "limit max_idle_s" in details
        assert not scheduler.streams


async def test_slow_tracker_is_not_the_clients_silence(serve: Serve, scheduler: FakeScheduler) -> None:
    config = ServerConfig(address="127.0.0.1:0", max_idle_s=0.5, shutdown_grace_s=0)
    async with serve(config) as server, aio.insecure_channel(server.address) as channel:
        call = Call(channel)
        await call.open()
        scheduler.gate.clear()
        sending = asyncio.create_task(call.frames(encode_clip(draw_frames(30))))
        await asyncio.sleep(1)
        scheduler.gate.set()
        await sending
        assert len(results_of(await call.read_rest())) == 30


async def test_client_that_leaves_results_unread_is_ended(
    serve: Serve, scheduler: FakeScheduler, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = ServerConfig(
        address="127.0.0.1:0", max_unread_s=0.5, max_idle_s=60, shutdown_grace_s=0, max_objects=16
    )
    async with serve(config) as server, aio.insecure_channel(server.address) as channel:
        call = Call(channel)
        # Large masks: a few results fill what the transport takes unread.
        size = pb.VideoFormat(width_px=1_600, height_px=1_200)
        settings = pb.OpenStream(video=size, mask_encoding=pb.MASK_ENCODING_PACKED_BITS)
        await call.open(pb.VIDEO_CODEC_RGB24, settings=settings)
        payload = bytes(1_600 * 1_200 * 3)
        await call.frame(0, payload)
        for object_id in range(1, 17):
            await call.prompt(
                pb.Prompt(object_id=object_id, frame_id=0, box=pb.Box(x_min=9, y_min=9, x_max=30, y_max=30))
            )

        async def flood() -> None:
            for frame_id in range(1, 1_000):
                await call.frame(frame_id, payload)

        flooding = asyncio.create_task(flood())
        await until(lambda: not scheduler.streams)
        flooding.cancel()
        call.cancel()
        assert "limit max_unread_s" in caplog.text


async def test_client_that_lets_nothing_through_holds_no_place(
    serve: Serve, scheduler: FakeScheduler, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = ServerConfig(address="127.0.0.1:0", max_unread_s=0.5, shutdown_grace_s=0)
    async with serve(config) as server:
        reader, writer = await asyncio.open_connection(*split_address(server.address))
        opening = pb.OpenStream(video=pb.VideoFormat(codec=pb.VIDEO_CODEC_JPEG))
        message = pb.TrackRequest(open_stream=opening).SerializeToString()
        no_window = struct.pack(">HI", INITIAL_WINDOW_SIZE, 0)
        writer.write(PREFACE + frame(SETTINGS, payload=no_window) + begin_call(1))
        writer.write(frame(DATA, 0, 1, b"\x00" + struct.pack(">I", len(message)) + message))
        answering = asyncio.create_task(Peer(reader, writer).answer())
        await until(lambda: bool(scheduler.streams))
        await until(lambda: not scheduler.streams)
        assert "limit max_unread_s" in caplog.text
        answering.cancel()
        writer.close()


async def test_prompts_beyond_the_rate_are_refused_and_the_stream_goes_on(serve: Serve) -> None:
    config = ServerConfig(address="127.0.0.1:0", max_prompts_per_s=0.5, max_objects=2, shutdown_grace_s=0)
    async with serve(config) as server, aio.insecure_channel(server.address) as channel:
        call = Call(channel)
        opened = await call.open()
        assert opened.limits.max_prompts_per_s == 0.5
        packets = encode_clip(draw_frames(2))
        await call.frame(0, packets[0])
        for _ in range(6):
            await call.prompt_red(0)
        await call.frame(1, packets[1])
        responses = await call.read_rest()
    rejected = rejections_of(responses)
    assert len(rejected) == 4, "two objects may be prompted at once, and half a prompt a second"
    assert {one.reason for one in rejected} == {pb.REJECTION_REASON_RATE}
    assert "limit max_prompts_per_s" in rejected[0].message
    assert len(results_of(responses)[1].masklets) == 1


async def test_hundreds_of_idle_connections_do_not_keep_a_client_out(serve: Serve) -> None:
    config = ServerConfig(address="127.0.0.1:0", shutdown_grace_s=0)
    async with serve(config) as server:
        host, port = server.address.rsplit(":", 1)
        sockets = [socket.create_connection((host, int(port)), 5) for _ in range(500)]
        try:
            async with aio.insecure_channel(server.address) as channel:
                call = Call(channel)
                await call.open()
                await call.frames(encode_clip(draw_frames(3)))
                assert len(results_of(await call.read_rest())) == 3
        finally:
            for one in sockets:
                one.close()


async def test_server_info_tells_the_limits(serve: Serve) -> None:
    config = ServerConfig(address="127.0.0.1:0", max_objects_total=7, max_idle_s=9, shutdown_grace_s=0)
    async with serve(config) as server, aio.insecure_channel(server.address) as channel:
        stub: pb_grpc.TrackingServiceAsyncStub = pb_grpc.TrackingServiceStub(channel)
        limits = (await stub.GetServerInfo(pb.GetServerInfoRequest())).limits
        assert (limits.max_objects_total, limits.max_idle_s) == (7, 9)
