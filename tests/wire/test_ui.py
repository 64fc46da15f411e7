"""The gateway between page and server, spoken to as the page speaks to it; no browser."""

import asyncio
import http.client
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
import weakref
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

import trocar.lifeline
from trocar.client_core import Frame, PromptAccepted, Result, StreamOptions, TrackedObject
from trocar.config import Access, split_address
from trocar.decode import Codec
from trocar.envelope import Outbox, pack, unpack
from trocar.errors import ConfigError, ContractError, ResultError, SourceError
from trocar.gateway import SourceEntry
from trocar.lifeline import LONGEST_RUN, Lifeline
from trocar.link import LinkState, TrackerLink
from trocar.local import LocalServer
from trocar.masklet_codec import encode_mask
from trocar.operation import CACHE_FILE, OperationSource, open_operation
from trocar.sources import Source, open_source
from trocar.takeaway import RecordedFrame, Recording
from trocar.ui import UiConfig, UiServer, list_sources
from trocar.v1 import tracking_pb2 as pb
from trocar.v1 import tracking_pb2_grpc as pb_grpc
from trocar.writer import count_column_runs
from trocar_engines.masklets import ObjectState, Prompt
from wire.clips import HEIGHT_PX, WIDTH_PX, disc_center, draw_frames, encode_clip, encode_jpeg
from wire.fakes import FakeScheduler, resize_linear
from wire.rtsp import Camera

TIMEOUT_S = 10.0
ON_DISC = [*disc_center(0), 1]


def start_fake(resources: ExitStack) -> FakeScheduler:
    scheduler = FakeScheduler()
    resources.callback(scheduler.close)
    return scheduler


def entry(source_id: str, open_it: Callable[[], Source]) -> SourceEntry:
    return SourceEntry(source_id=source_id, label=source_id, kind="file", open=lambda _: open_it())


def break_down() -> Source:
    raise SourceError("the disk is gone")


@pytest.fixture
def ui(scheduler: FakeScheduler, tmp_path: Path) -> Iterator[UiServer]:
    packets = tuple(encode_clip(draw_frames(40)))
    entries = (
        entry("operation", lambda: OperationSource(packets, WIDTH_PX, HEIGHT_PX)),
        entry("broken", break_down),
    )
    with LocalServer(scheduler, resize_linear) as server:
        ui = UiServer(UiConfig(address="127.0.0.1:0", cache=tmp_path), server.address, tmp_path, entries)
        yield from run(ui)


def run(ui: UiServer) -> Iterator[UiServer]:
    ready = threading.Event()
    thread = threading.Thread(target=ui.run, args=(ready.set,))
    thread.start()
    assert ready.wait(TIMEOUT_S)
    try:
        yield ui
    finally:
        ui.stop()
        thread.join()


class PageSide:
    """What the page's modules do, in Python."""

    def __init__(self, ui: UiServer, **hello: object) -> None:
        self._connecting = connect(f"{ui.url.replace('http', 'ws')}/gateway", max_size=None)
        self._hello = {"type": "hello", "h264": True, **hello}

    def __enter__(self) -> "PageSide":
        self.socket = self._connecting.__enter__()
        self.send(self._hello)
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, header: dict[str, object], blob: bytes = b"") -> None:
        self.socket.send(pack(header, blob))

    def read(self) -> tuple[dict[str, Any], bytes]:
        envelope = self.socket.recv(TIMEOUT_S)
        assert isinstance(envelope, bytes)
        return unpack(envelope)

    def read_until(self, kind: str, **fields: object) -> tuple[dict[str, Any], bytes]:
        deadline_s = time.monotonic() + 2 * TIMEOUT_S
        while time.monotonic() < deadline_s:
            header, blob = self.read()
            if header["type"] == kind and fields.items() <= header.items():
                return header, blob
        raise AssertionError(f"no {kind} {fields}")

    def start_own(self, codec: str = "h264") -> dict[str, Any]:
        self.send({"type": "start", "source": "page", "codec": codec})
        ready = self.read_until("ready")[0]
        self.read_until("link", up=True)
        return ready

    def send_frames(self, payloads: list[bytes], *, first: int = 0) -> None:
        for index, payload in enumerate(payloads, first):
            header = {"type": "frame", "id": index, "pts": 33 * index, "key": index == first}
            self.send(header, payload)
            self.read_until("result", id=index)


def test_frames_of_the_page_come_back_as_results_with_masks(ui: UiServer) -> None:
    packets = encode_clip(draw_frames(3))
    with PageSide(ui) as page:
        assert page.read_until("hello")[0]["hold_ms"] == 150
        assert page.start_own()["first_frame"] == 0
        page.send_frames(packets[:2])
        page.send({"type": "prompt", "seq": 7, "object": 1, "frame": 1, "points": [ON_DISC]})
        accepted, mask = page.read_until("accepted")
        assert (accepted["seq"], accepted["frame"], accepted["object"]["state"]) == (7, 1, "visible")
        assert len(mask) == accepted["object"]["mask"]["bytes"] > 0
        page.send({"type": "frame", "id": 2, "pts": 66, "key": False}, packets[2])
        result, masks = page.read_until("result", id=2)
        assert [one["id"] for one in result["objects"]] == [1]
        assert len(masks) == result["objects"][0]["mask"]["bytes"]
        page.send({"type": "remove", "object": 1})
        page.send({"type": "frame", "id": 3, "pts": 99, "key": True}, encode_clip(draw_frames(1))[0])
        assert page.read_until("result", id=3)[0]["objects"] == []


def test_mask_may_be_prompted_as_it_came(ui: UiServer) -> None:
    with PageSide(ui) as page:
        page.start_own("jpeg")
        page.send_frames([encode_jpeg(frame) for frame in draw_frames(2)])
        page.send({"type": "prompt", "seq": 1, "object": 1, "frame": 1, "points": [ON_DISC]})
        accepted, mask = page.read_until("accepted")
        coded = {key: accepted["object"]["mask"][key] for key in ("width", "height", "encoding")}
        header = {"type": "prompt", "seq": 2, "object": 1, "frame": 1, "mask": coded, "mode": "replace"}
        page.send(header, mask)
        assert page.read_until("accepted", seq=2)[1] == mask


def test_source_on_this_side_reaches_page_and_server(ui: UiServer) -> None:
    with PageSide(ui) as page:
        page.send({"type": "start", "source": "operation"})
        assert page.read_until("ready")[0]["codec"] == "h264"
        frame, payload = page.read_until("frame")
        assert frame["key"]
        assert payload.startswith(b"\x00\x00")
        assert page.read_until("result")[0]["width"] == WIDTH_PX


def test_camera_on_this_side_reaches_page_and_server(scheduler: FakeScheduler, tmp_path: Path) -> None:
    packets = encode_clip(draw_frames(40), keyframe_interval=10)
    with Camera(packets, rate=30) as camera, LocalServer(scheduler, resize_linear) as server:
        entries = (entry("camera", lambda: open_source(camera.url)),)
        config = UiConfig(address="127.0.0.1:0", cache=tmp_path)
        for ui in run(UiServer(config, server.address, tmp_path, entries)):
            with PageSide(ui) as page:
                page.send({"type": "start", "source": "camera"})
                assert page.read_until("frame")[1].startswith(b"\x00\x00")
                page.read_until("result")
                page.read_until("ended")


def test_page_is_asked_for_a_keyframe_after_a_gap(ui: UiServer) -> None:
    packets = encode_clip(draw_frames(4))
    with PageSide(ui) as page:
        page.start_own()
        page.send_frames(packets[:2])
        page.send({"type": "frame", "id": 3, "pts": 99, "key": False}, packets[3])
        page.read_until("keyframe")
        assert not page.read_until("result", id=3)[0]["trusted"]


def test_page_without_video_coder_gets_jpeg(ui: UiServer) -> None:
    with PageSide(ui, h264=False) as page:
        page.send({"type": "start", "source": "operation"})
        assert page.read_until("ready")[0]["codec"] == "jpeg"
        assert page.read_until("frame")[1].startswith(b"\xff\xd8")


def test_refused_prompt_tells_why(ui: UiServer) -> None:
    with PageSide(ui) as page:
        page.start_own("jpeg")
        page.send_frames([encode_jpeg(draw_frames(1)[0])])
        page.send({"type": "prompt", "seq": 3, "object": 1, "frame": 0, "points": [[9_000, 1, 1]]})
        rejected = page.read_until("rejected")[0]
        assert (rejected["seq"], rejected["object"], rejected["reason"]) == (3, 1, "invalid_prompt")


class WatchedSource(OperationSource):
    def __init__(self) -> None:
        super().__init__(tuple(encode_clip(draw_frames(2))), WIDTH_PX, HEIGHT_PX)
        self.is_closed = threading.Event()

    def close(self) -> None:
        self.is_closed.set()


@pytest.mark.parametrize("word", ["preparing", "ready"])
def test_source_is_closed_when_the_page_stops_before_it_plays(tmp_path: Path, word: str) -> None:
    source, may_open = WatchedSource(), threading.Event()

    def open_slowly(report: Callable[[int, int], None]) -> Source:
        report(0, 1)
        assert may_open.wait(TIMEOUT_S)
        return source

    slow = SourceEntry(source_id="slow", label="slow", kind="camera", open=open_slowly)
    with ExitStack() as resources:
        # It answers nothing: for some seconds nobody knows whether there is a server.
        silent = resources.enter_context(socket.create_server(("127.0.0.1", 0)))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        ui = UiServer(UiConfig(address="127.0.0.1:0", cache=tmp_path), address, tmp_path, (slow,))
        resources.enter_context(contextmanager(run)(ui))
        page = resources.enter_context(PageSide(ui))
        if word == "ready":
            may_open.set()
        page.send({"type": "start", "source": "slow"})
        page.read_until(word)
        page.send({"type": "stop"})
        page.send({"type": "ping", "t": 0})
        page.read_until("pong")
        may_open.set()
        assert source.is_closed.wait(TIMEOUT_S)


def test_broken_source_is_told_and_another_may_be_chosen(ui: UiServer) -> None:
    with PageSide(ui) as page:
        page.send({"type": "start", "source": "broken"})
        assert page.read_until("failed")[0]["message"] == "the disk is gone"
        page.send({"type": "start", "source": "/etc/passwd"})
        assert "no source" in page.read_until("failed")[0]["message"]
        page.send({"type": "start", "source": "operation"})
        page.read_until("frame")


@pytest.mark.parametrize(
    ("header", "blob"),
    [
        ({"type": "nonsense"}, b""),
        ({"type": "prompt", "seq": 1}, b""),
        ({"type": "prompt", "seq": 1, "object": "x", "frame": 0}, b""),
        ({"type": "prompt", "seq": 1, "object": 1, "frame": 0, "mode": "guess"}, b""),
        (
            {
                "type": "prompt",
                "seq": 1,
                "object": 1,
                "frame": 0,
                "mask": {"width": 9, "height": 9, "encoding": "rle"},
            },
            b"\x01",
        ),
        ({"type": "frame", "id": None, "pts": 0, "key": True}, b"x"),
        ({}, b""),
    ],
)
def test_malformed_words_are_refused_and_the_show_goes_on(
    ui: UiServer, header: dict[str, object], blob: bytes
) -> None:
    with PageSide(ui) as page:
        page.start_own("jpeg")
        page.send(header, blob)
        assert page.read_until("warning")[0]["reason"] == "page"
        page.send_frames([encode_jpeg(draw_frames(1)[0])])


def test_bytes_that_are_no_envelope_are_refused(ui: UiServer) -> None:
    with PageSide(ui) as page:
        page.read_until("hello")
        for envelope in (b"", b"\xff\xff\xff\xff{}", b"\x02\x00\x00\x00[]", b"\x02\x00\x00\x00{"):
            page.socket.send(envelope)
            assert page.read_until("warning")[0]["reason"] == "page"
    with pytest.raises(ContractError):
        unpack(b"\x00")


def test_second_page_is_turned_away_until_it_takes_over(ui: UiServer) -> None:
    with PageSide(ui) as first:
        first.start_own()
        with PageSide(ui) as second:
            second.read_until("busy")
        with PageSide(ui, takeover=True) as third:
            third.read_until("hello")
            first.read_until("taken")
            with pytest.raises(ConnectionClosed):
                first.read()
            third.start_own()


def test_page_whose_line_broke_unnoticed_is_let_in_again(ui: UiServer) -> None:
    with PageSide(ui, tab="a") as first:
        first.start_own()
        with PageSide(ui, tab="a") as again:
            again.start_own()
            with PageSide(ui, tab="b") as other:
                other.read_until("busy")


def test_page_that_answers_nothing_any_more_can_be_replaced(ui: UiServer) -> None:
    address = split_address(ui.url.removeprefix("http://"))
    with socket.create_connection(address, TIMEOUT_S) as dead:
        handshake = (
            "GET /gateway HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        dead.sendall(handshake.encode())
        assert b"101" in dead.recv(1_024)
        hello = pack({"type": "hello"})
        # A binary frame, masked with zeros.
        dead.sendall(bytes([0x82, 0x80 | len(hello), 0, 0, 0, 0]) + hello)
        assert dead.recv(1)
        with PageSide(ui, takeover=True) as page:
            page.start_own()


def test_page_that_comes_back_finds_its_objects_again(ui: UiServer) -> None:
    packets = encode_clip(draw_frames(6), keyframe_interval=30)
    with PageSide(ui) as page:
        page.start_own()
        page.send_frames(packets[:4])
        page.send({"type": "prompt", "seq": 1, "object": 5, "frame": 3, "points": [ON_DISC]})
        page.read_until("accepted")
        page.send({"type": "frame", "id": 4, "pts": 132, "key": False}, packets[4])
        assert page.read_until("result", id=4)[0]["objects"][0]["id"] == 5
    with PageSide(ui) as page:
        page.send({"type": "start", "source": "page", "codec": "h264", "resume": True})
        ready = page.read_until("ready")[0]
        assert (ready["first_frame"], ready["objects"]) == (5, [5])
        page.read_until("accepted", seq=-1)
        page.send({"type": "frame", "id": 5, "pts": 165, "key": True}, encode_clip(draw_frames(1))[0])
        assert [one["id"] for one in page.read_until("result", id=5)[0]["objects"]] == [5]
    with PageSide(ui) as page:
        page.send({"type": "start", "source": "page", "codec": "h264"})
        assert page.read_until("ready")[0]["objects"] == [], "a fresh start begins with nothing"


def test_object_outlives_a_server_that_dies_right_after_accepting_it(tmp_path: Path) -> None:
    packets = encode_clip(draw_frames(4), keyframe_interval=30)
    with ExitStack() as resources, ExitStack() as first_server:
        server = first_server.enter_context(LocalServer(start_fake(resources), resize_linear))
        ui = UiServer(UiConfig(address="127.0.0.1:0", cache=tmp_path), server.address, tmp_path, ())
        resources.enter_context(contextmanager(run)(ui))
        page = resources.enter_context(PageSide(ui))
        page.start_own()
        page.send_frames(packets[:3])
        page.send({"type": "prompt", "seq": 1, "object": 5, "frame": 2, "points": [ON_DISC]})
        page.read_until("accepted")
        first_server.close()
        page.read_until("link", up=False)
        resources.enter_context(LocalServer(start_fake(resources), resize_linear, server.address))
        page.read_until("link", up=True)
        page.send({"type": "frame", "id": 3, "pts": 99, "key": True}, encode_clip(draw_frames(1))[0])
        assert [one["id"] for one in page.read_until("result", id=3)[0]["objects"]] == [5]


def test_prompt_that_a_dying_server_leaves_unanswered_is_refused(
    scheduler: FakeScheduler, tmp_path: Path
) -> None:
    with ExitStack() as resources, ExitStack() as first_server:
        server = first_server.enter_context(LocalServer(scheduler, resize_linear))
        ui = UiServer(UiConfig(address="127.0.0.1:0", cache=tmp_path), server.address, tmp_path, ())
        resources.enter_context(contextmanager(run)(ui))
        page = resources.enter_context(PageSide(ui))
        page.start_own("jpeg")
        page.send_frames([encode_jpeg(draw_frames(1)[0])])
        resources.callback(scheduler.gate.set)
        scheduler.gate.clear()
        page.send({"type": "prompt", "seq": 1, "object": 5, "frame": 0, "points": [ON_DISC]})
        page.send({"type": "ping", "t": 0})
        page.read_until("pong")
        first_server.close()
        assert page.read_until("rejected")[0]["reason"] == "not_connected"


class HungServicer(pb_grpc.TrackingServiceServicer):
    """Takes calls and answers none."""

    def __init__(self) -> None:
        self.calls = 0
        self.may_end = threading.Event()

    def Track(self, request_iterator: Any, context: Any) -> Iterator[pb.TrackResponse]:  # noqa: N802
        self.may_end.wait(TIMEOUT_S)
        return iter(())

    def GetServerInfo(self, request: Any, context: Any) -> pb.GetServerInfoResponse:  # noqa: N802
        self.calls += 1
        self.may_end.wait(TIMEOUT_S)
        return pb.GetServerInfoResponse()


def serve_stub(servicer: pb_grpc.TrackingServiceServicer) -> tuple[grpc.Server, str]:
    server = grpc.server(ThreadPoolExecutor(8))
    pb_grpc.add_TrackingServiceServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    return server, address


def link_to(address: str, states: asyncio.Queue[LinkState], silence_s: float) -> TrackerLink:
    return TrackerLink(
        address,
        Access(),
        StreamOptions(codec=Codec.JPEG),
        Lifeline(),
        on_event=lambda _: None,
        on_state=states.put_nowait,
        on_keyframe_wanted=lambda: None,
        silence_s=silence_s,
    )


async def test_server_that_never_answers_is_given_up_and_tried_again() -> None:
    servicer, states = HungServicer(), asyncio.Queue[LinkState]()
    server, address = serve_stub(servicer)
    running = asyncio.create_task(link_to(address, states, silence_s=0.2).run())
    for _ in range(2):
        state = await asyncio.wait_for(states.get(), TIMEOUT_S)
        assert "has stopped answering" in state.message
    assert servicer.calls >= 2
    running.cancel()
    servicer.may_end.set()
    await asyncio.to_thread(server.stop(None).wait)


class StrangeServicer(pb_grpc.TrackingServiceServicer):
    """Answers what this client cannot read."""

    def Track(self, request_iterator: Any, context: Any) -> Iterator[pb.TrackResponse]:  # noqa: N802
        yield pb.TrackResponse(stream_opened=pb.StreamOpened())
        yield pb.TrackResponse()

    def GetServerInfo(self, request: Any, context: Any) -> pb.GetServerInfoResponse:  # noqa: N802
        return pb.GetServerInfoResponse()


class TalkingServicer(pb_grpc.TrackingServiceServicer):
    """Has always something to say."""

    def Track(self, request_iterator: Any, context: Any) -> Iterator[pb.TrackResponse]:  # noqa: N802
        yield pb.TrackResponse(stream_opened=pb.StreamOpened())
        while context.is_active():
            yield pb.TrackResponse(stream_warning=pb.StreamWarning(message="still here"))

    def GetServerInfo(self, request: Any, context: Any) -> pb.GetServerInfoResponse:  # noqa: N802
        return pb.GetServerInfoResponse()


async def test_line_that_is_given_up_ends_although_events_keep_coming() -> None:
    states = asyncio.Queue[LinkState]()
    server, address = serve_stub(TalkingServicer())
    # On some turn of the loop the cancellation comes together with an event.
    for turns in range(20):
        running = asyncio.create_task(link_to(address, states, silence_s=TIMEOUT_S).run())
        async with asyncio.timeout(TIMEOUT_S):
            assert (await states.get()).is_up
        for _ in range(turns):
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait([running], timeout=2)
        assert running.cancelled()
    await asyncio.to_thread(server.stop(None).wait)


async def test_answer_that_cannot_be_read_breaks_the_line_with_its_reason() -> None:
    states = asyncio.Queue[LinkState]()
    server, address = serve_stub(StrangeServicer())
    running = asyncio.create_task(link_to(address, states, silence_s=TIMEOUT_S).run())
    assert (await asyncio.wait_for(states.get(), TIMEOUT_S)).is_up
    state = await asyncio.wait_for(states.get(), TIMEOUT_S / 2)
    assert "the server sent an empty response" in state.message
    running.cancel()
    await asyncio.to_thread(server.stop(None).wait)


def test_recording_is_offered_once(ui: UiServer) -> None:
    with PageSide(ui) as page:
        page.start_own("jpeg")
        page.send({"type": "record", "on": True})
        page.read_until("recording", state="on")
        page.send_frames([encode_jpeg(frame) for frame in draw_frames(3)])
        page.send({"type": "record", "on": False})
        url = page.read_until("recording", state="ready")[0]["url"]
    assert get(ui, url)[0] == 200
    assert get(ui, url)[0] == 404


def get(ui: UiServer, path: str, **headers: str) -> tuple[int, dict[str, str]]:
    host, port = split_address(ui.url.removeprefix("http://"))
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status, {name.lower(): value for name, value in response.getheaders()}


def test_page_and_its_files_come_with_a_strict_policy(ui: UiServer) -> None:
    for path in ("/", "/web/main.js", "/web/style.css"):
        status, headers = get(ui, path)
        assert status == 200
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
    assert get(ui, "/web/../ui.py")[0] == 404
    assert get(ui, "/takeaway/none.zip")[0] == 404


def test_other_sites_are_turned_away(ui: UiServer) -> None:
    assert get(ui, "/", Host="attacker.example")[0] == 403
    address = f"{ui.url.replace('http', 'ws')}/gateway"
    with pytest.raises(InvalidStatus), connect(address, origin=Origin("http://attacker.example")):
        pass
    with connect(address, origin=Origin(ui.url)):
        pass


def test_https_serves_the_certificate_whose_fingerprint_is_told(
    scheduler: FakeScheduler, tmp_path: Path
) -> None:
    config = UiConfig(address="127.0.0.1:0", cache=tmp_path, is_self_signed=True)
    for ui in run(UiServer(config, "127.0.0.1:1", tmp_path, ())):
        host, port = split_address(ui.url.removeprefix("https://"))
        context = ssl.create_default_context(cafile=str(tmp_path / "certificate.pem"))
        connection = http.client.HTTPSConnection(host, port, context=context, timeout=TIMEOUT_S)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        connection.close()
        assert len(ui.fingerprint.split(":")) == 32
    assert (tmp_path / "key.pem").stat().st_mode & 0o077 == 0


# Settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"address": "0.0.0.0:8080"}, "--self-signed"),
        ({"address": "nonsense"}, "host:port"),
        ({"certificate": Path("a.pem")}, "both --cert and --key"),
        ({"certificate": Path("a.pem"), "key": Path("b.pem"), "is_self_signed": True}, "choose one"),
        ({"certificate": Path("a.pem"), "key": Path("b.pem")}, "a.pem is no file"),
    ],
)
def test_senseless_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        UiConfig(**{"address": "127.0.0.1:0", "cache": Path(), **settings})


def test_taken_address_is_a_clear_error(ui: UiServer, tmp_path: Path) -> None:
    config = UiConfig(address=ui.url.removeprefix("http://"), cache=tmp_path)
    with pytest.raises(ConfigError, match="taken"):
        UiServer(config, "127.0.0.1:1", tmp_path, ()).run(lambda: None)


def test_ui_stops_on_sigterm_with_exit_code_0() -> None:
    program = (
        "import sys; from trocar.cli import main\n"
        "sys.exit(main(['ui', '--address', '127.0.0.1:0', '--server', '127.0.0.1:1']))"
    )
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) as serving:
        assert serving.stderr is not None
        for line in serving.stderr:
            if "open http://127.0.0.1:" in line:
                serving.terminate()
        assert serving.wait(10) == 0


def test_sources_are_listed_without_credentials() -> None:
    sources = ("rtsp://anna:secret@camera/stream", "/videos/clip.mp4")
    entries = list_sources(UiConfig(address="127.0.0.1:0", cache=Path(), sources=sources))
    assert [(one.kind, one.label) for one in entries[1:]] == [
        ("camera", "camera/stream"),
        ("file", "clip.mp4"),
    ]


def test_operation_is_read_from_the_cache_and_plays_for_ever(tmp_path: Path) -> None:
    packets = [b"first", b"second", b""]
    data = np.frombuffer(b"".join(packets), np.uint8)
    np.savez(tmp_path / CACHE_FILE, data=data, sizes=[len(packet) for packet in packets])
    source = open_operation(tmp_path, lambda _done, _total: None)
    read = [frame.frame for frame, _ in zip(source.read(), range(5), strict=False)]
    assert [frame.payload for frame in read] == [b"first", b"second", b"", b"first", b"second"]
    assert [frame.pts for frame in read] == [0, 1, 2, 3, 4]
    (tmp_path / CACHE_FILE).write_bytes(b"garbage")
    with pytest.raises(SourceError, match="delete it"):
        open_operation(tmp_path, lambda _done, _total: None)


# Lifeline


def make_result(
    frame_id: int, *visible: int, is_trusted: bool = True, hidden: tuple[int, ...] = ()
) -> Result:
    mask = np.zeros((4, 4), np.bool_)
    mask[1, 1] = True
    objects = tuple(
        TrackedObject(
            object_id=object_id,
            state=ObjectState.VISIBLE if object_id in visible else ObjectState.LOST,
            predicted_iou=0.9,
            presence=1.0,
            class_name="unknown",
            class_probability=0.0,
            frames_since_seen=0,
            box=(1, 1, 2, 2) if object_id in visible else None,
            encoded_mask=encode_mask(mask),
        )
        for object_id in (*visible, *hidden)
    )
    return Result(
        frame_id=frame_id,
        pts=None,
        capture_time_ns=0,
        objects=objects,
        is_trusted=is_trusted,
        width_px=4,
        height_px=4,
        stage_ns={},
        service_latency_ns=0,
        queue_depth_frames=0,
        dropped_frame_ids=(),
        dropped_frames_total=0,
    )


def feed(lifeline: Lifeline, ids: range, *, keyframe_every: int) -> None:
    for frame_id in ids:
        is_keyframe = frame_id % keyframe_every == 0
        lifeline.note_frame(Frame(payload=b"%d" % frame_id, frame_id=frame_id), is_keyframe=is_keyframe)


def list_replay(lifeline: Lifeline) -> list[str]:
    return [
        f"frame {one.frame_id}"
        if isinstance(one, Frame)
        else f"prompt {one.object_id}@{one.frame_id}"
        if isinstance(one, Prompt)
        else "other"
        for one in lifeline.replay()
    ]


def test_replay_begins_with_a_keyframe_and_prompts_each_mask_on_its_own_frame() -> None:
    lifeline = Lifeline()
    lifeline.want(1)
    lifeline.want(2)
    feed(lifeline, range(8), keyframe_every=5)
    for frame_id in range(8):
        visible = (1, 2) if frame_id < 3 else (1,)
        lifeline.note_result(make_result(frame_id, *visible, hidden=() if frame_id < 3 else (2,)))
    expected = ["frame 0", "frame 1", "frame 2", "prompt 2@2", "frame 5", "frame 6", "frame 7", "prompt 1@7"]
    assert list_replay(lifeline) == expected


def test_object_that_was_just_accepted_is_replayed_from_its_prompt() -> None:
    lifeline = Lifeline()
    lifeline.want(1)
    feed(lifeline, range(3), keyframe_every=5)
    accepted = PromptAccepted(
        prompt=Prompt(object_id=1, frame_id=1, points=((1, 1),), labels=(1,)),
        frame_id=1,
        tracked=make_result(1, 1).objects[0],
    )
    lifeline.note_accepted(accepted)
    assert list_replay(lifeline) == ["frame 0", "frame 1", "prompt 1@1"]
    lifeline.note_result(make_result(2, 1))
    assert list_replay(lifeline) == ["frame 0", "frame 1", "frame 2", "prompt 1@2"]
    lifeline.forget(1)
    lifeline.note_accepted(accepted)
    assert list_replay(lifeline) == []


def test_untrusted_unwanted_and_removed_objects_are_not_replayed() -> None:
    lifeline = Lifeline()
    for object_id in (1, 2):
        lifeline.want(object_id)
    feed(lifeline, range(3), keyframe_every=5)
    lifeline.note_result(make_result(1, 2, 3))
    lifeline.note_result(make_result(2, 1, is_trusted=False))
    lifeline.forget(2)
    lifeline.note_result(make_result(2, 2))
    assert list_replay(lifeline) == []


def test_run_with_a_gap_or_without_end_is_not_replayed() -> None:
    lifeline = Lifeline()
    lifeline.want(1)
    feed(lifeline, range(2), keyframe_every=100)
    feed(lifeline, range(3, 6), keyframe_every=100)
    lifeline.note_result(make_result(4, 1))
    assert list_replay(lifeline) == []
    long = Lifeline()
    long.want(1)
    feed(long, range(LONGEST_RUN + 10), keyframe_every=10_000)
    long.note_result(make_result(LONGEST_RUN + 5, 1))
    assert list_replay(long) == []


class WatchedFrame(Frame):
    """Can be referred to weakly."""


def test_raw_frames_that_wait_for_their_results_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trocar.lifeline, "RECENT_BYTES", 2_500)
    lifeline = Lifeline()
    lifeline.want(1)
    sent = []
    for frame_id in range(5):
        frame = WatchedFrame(payload=bytes(1_000), frame_id=frame_id)
        lifeline.note_frame(frame, is_keyframe=True)
        sent.append(weakref.ref(frame))
        del frame
    assert [kept() is not None for kept in sent] == [False, False, False, True, True]
    lifeline.note_result(make_result(4, 1))
    assert list_replay(lifeline) == ["frame 4", "prompt 1@4"]


# Outbox


async def test_page_that_does_not_read_gets_words_and_then_the_next_keyframe() -> None:
    outbox = Outbox()
    for number in range(100):
        outbox.put(b"frame %d" % number, "frame", is_keyframe=number % 40 == 0)
        outbox.put(b"result %d" % number, "result")
    outbox.put(b"word", "word")
    outbox.put(b"key", "frame", is_keyframe=True)
    waiting: list[bytes] = []
    while not waiting or waiting[-1] != b"key":
        waiting.append(await outbox.get())
    frames = [one for one in waiting if one.startswith(b"frame")]
    assert frames == [b"frame %d" % number for number in range(80, 100)]
    assert b"word" in waiting
    assert sum(one.startswith(b"result") for one in waiting) <= 60
    assert outbox.dropped_frames == 80


# Take-away


def test_recording_begins_with_a_keyframe_and_counts_what_was_dropped(tmp_path: Path) -> None:
    packets = encode_clip(draw_frames(6), keyframe_interval=3)
    recording = Recording(codec=Codec.H264, label="clip", model="m", memory="fifo", time_base=Fraction(1, 30))
    for index, packet in enumerate(packets[1:], 1):
        frame = RecordedFrame(frame_id=index, pts=index, payload=packet)
        recording.add_frame(frame, is_keyframe=index == 3)
        recording.add_result(make_result(index))
    assert recording.frames == 3
    archive = recording.write(tmp_path, {}, lambda _done, _total: None)
    assert archive.suffix == ".zip"
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(("most_unanswered", "kept"), [(2, 4), (1, 6)])
def test_recording_ends_with_the_last_answered_frame_unless_there_was_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_unanswered: int, kept: int
) -> None:
    monkeypatch.setattr("trocar.takeaway.MOST_UNANSWERED_FRAMES", most_unanswered)
    recording = Recording(codec=Codec.H264, label="clip", model="m", memory="fifo", time_base=Fraction(1, 30))
    for index, packet in enumerate(encode_clip(draw_frames(6))):
        recording.add_frame(RecordedFrame(frame_id=index, pts=index, payload=packet), is_keyframe=index == 0)
        if index < 4:
            recording.add_result(make_result(index))
    archive = recording.write(tmp_path, {}, lambda _done, _total: None)
    with zipfile.ZipFile(archive) as files:
        masks = [name for name in files.namelist() if name.endswith(".png")]
    assert len(masks) == recording.frames == kept


def test_empty_recording_says_so(tmp_path: Path) -> None:
    recording = Recording(codec=Codec.JPEG, label="", model="", memory="", time_base=Fraction(1, 30))
    with pytest.raises(ResultError, match="nothing was recorded"):
        recording.write(tmp_path, {}, lambda _done, _total: None)


def test_coco_runs_go_column_by_column() -> None:
    mask = np.zeros((3, 2), np.bool_)
    mask[1:, 0] = True
    assert count_column_runs(mask) == [1, 2, 3]
    assert count_column_runs(~mask) == [0, 1, 2, 3]
    assert count_column_runs(np.ones((2, 2), np.bool_)) == [0, 4]
    assert json.dumps(count_column_runs(mask)) == "[1, 2, 3]"
