import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from fractions import Fraction

import av
import pytest

from trocar.client import AsyncStream, Client, connect, connect_async
from trocar.client_core import (
    EVERY_WINDOW_FRAMES,
    Event,
    Frame,
    KeyframeWanted,
    Opened,
    PromptAccepted,
    Request,
    Result,
    StreamOptions,
)
from trocar.decode import Codec
from trocar.errors import ConnectionFailedError
from trocar.local import LocalServer
from trocar.server import TrackingServer
from trocar_engines.masklets import Prompt
from wire.clips import HEIGHT_PX, WIDTH_PX, draw_frame, draw_frames, encode_clip
from wire.fakes import FakeScheduler, resize_linear

EVERY = StreamOptions(codec=Codec.H264, is_live=False)
LIVE = StreamOptions(codec=Codec.H264)


@pytest.fixture
def client(scheduler: FakeScheduler) -> Iterator[Client]:
    with LocalServer(scheduler, resize_linear) as server, connect(server.address) as client:
        yield client


def requests(count: int) -> Iterator[Request]:
    for index, packet in enumerate(encode_clip(draw_frames(count))):
        yield Frame(payload=packet, pts=index)
        if index == 0:
            yield Prompt(object_id=1, frame_id=0, points=((30, 60),), labels=(1,))


def check_events(events: list[Event], count: int) -> None:
    results = [event for event in events if isinstance(event, Result)]
    assert isinstance(events[0], Opened)
    assert sum(isinstance(event, PromptAccepted) for event in events) == 1
    assert [result.frame_id for result in results] == list(range(count))
    assert results[-1].objects[0].mask[60, 30 + 2 * (count - 1)]


def test_blocking_face_tracks_a_clip_longer_than_its_window(client: Client) -> None:
    with client.open_stream(EVERY) as stream:
        check_events(list(stream.track(requests(40))), 40)
        assert stream.unanswered_frames == 0


async def test_asynchronous_face_tracks_a_clip_longer_than_its_window(server: TrackingServer) -> None:
    async def requests_async() -> AsyncIterator[Request]:
        for request in requests(40):
            yield request

    async with await connect_async(server.address) as client, client.open_stream(EVERY) as stream:
        check_events([event async for event in stream.track(requests_async())], 40)


async def test_sender_that_waits_for_room_learns_of_the_end(
    server: TrackingServer, scheduler: FakeScheduler
) -> None:
    scheduler.gate.clear()
    async with await connect_async(server.address) as client:
        stream = client.open_stream(EVERY)

        async def send_on() -> None:
            while await stream.send(Frame(payload=b"x")):
                pass

        sending = asyncio.create_task(send_on())
        while stream.unanswered_frames < EVERY_WINDOW_FRAMES:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        stream.close()
        await asyncio.wait_for(sending, 5)
    scheduler.gate.set()


def test_one_thread_may_send_while_another_reads(client: Client) -> None:
    with client.open_stream(LIVE) as stream:
        events = iter(stream)
        assert isinstance(next(events), Opened)
        for packet in encode_clip(draw_frames(3)):
            assert stream.send(Frame(payload=packet))
        stream.finish()
        assert list(events)


def test_live_sending_never_waits_for_a_stalled_server(client: Client, scheduler: FakeScheduler) -> None:
    scheduler.gate.clear()
    packet = encode_clip(draw_frames(1))[0]
    with client.open_stream(LIVE) as stream:
        sent = [stream.send(Frame(payload=packet)) for _ in range(200)]
        assert sent[0]
        assert not sent[-1], "beyond the window frames stay unsent instead of piling up"
        scheduler.gate.set()


def test_keyframe_hook_is_called_when_the_server_asks(client: Client) -> None:
    packets = encode_clip(draw_frames(3))
    wanted: list[int] = []
    with client.open_stream(EVERY, on_keyframe_wanted=wanted.append) as stream:
        frames = [Frame(payload=packets[0]), Frame(payload=packets[2], frame_id=2)]
        events = list(stream.track(frames))
    assert wanted == [2]
    assert KeyframeWanted(frame_id=2) in events


def test_failure_of_the_input_reaches_the_reader(client: Client) -> None:
    def broken() -> Iterator[Request]:
        yield from requests(2)
        raise OSError("the disk is gone")

    with client.open_stream(EVERY) as stream, pytest.raises(OSError, match="disk"):
        list(stream.track(broken()))


def test_refusal_tells_code_and_reason(client: Client) -> None:
    options = StreamOptions(codec=Codec.H264, model="sam9")
    with (
        client.open_stream(options) as stream,
        pytest.raises(ConnectionFailedError, match=r"FAILED_PRECONDITION: model 'sam9'"),
    ):
        list(stream.track(requests(30)))


def test_leaving_a_stream_midway_ends_its_sender_and_its_call(
    client: Client, scheduler: FakeScheduler
) -> None:
    with client.open_stream(EVERY) as stream:
        events = stream.track(requests(500))
        assert isinstance(next(events), Opened)
        events.close()
    deadline = threading.Event()
    for _ in range(200):
        if not scheduler.streams:
            break
        deadline.wait(0.01)
    assert not scheduler.streams


async def test_asynchronous_refusal_tells_code_and_reason(server: TrackingServer) -> None:
    async def nothing() -> AsyncIterator[Request]:
        yield Frame(payload=b"")
        await asyncio.sleep(5)

    options = StreamOptions(codec=Codec.H264, model="sam9")
    async with await connect_async(server.address) as client, client.open_stream(options) as stream:
        assert isinstance(stream, AsyncStream)
        with pytest.raises(ConnectionFailedError, match="FAILED_PRECONDITION"):
            async for _ in stream.track(nothing()):
                pass


def test_server_info_names_the_models(client: Client) -> None:
    assert client.server_info().models[0].name == "fake-nano"


def test_absent_server_is_a_clear_error() -> None:
    with pytest.raises(ConnectionFailedError, match="trocar serve"):
        connect("127.0.0.1:1", timeout_s=0.2)


async def test_absent_server_is_a_clear_error_for_the_asynchronous_face() -> None:
    with pytest.raises(ConnectionFailedError, match="trocar serve"):
        await connect_async("127.0.0.1:1", timeout_s=0.2)


class LiveEncoder:
    """A camera's encoder: no keyframe after the first unless it is asked for one."""

    def __init__(self) -> None:
        context = av.CodecContext.create("libx264", "w")
        assert isinstance(context, av.VideoCodecContext)
        context.width, context.height, context.pix_fmt = WIDTH_PX, HEIGHT_PX, "yuv420p"
        context.time_base = Fraction(1, 30)
        context.gop_size = 10_000
        context.options = {"preset": "ultrafast", "tune": "zerolatency"}
        self._context, self._frames = context, 0
        self.wants_keyframe = threading.Event()

    def encode(self) -> bytes:
        picture = av.VideoFrame.from_ndarray(draw_frame(self._frames), format="rgb24")
        picture.pts, self._frames = self._frames, self._frames + 1
        if self.wants_keyframe.is_set():
            picture.pict_type = av.video.frame.PictureType.I
            self.wants_keyframe.clear()
        (packet,) = self._context.encode(picture)
        return bytes(packet)


def test_encoder_that_answers_a_keyframe_request_is_trusted_again(client: Client) -> None:
    encoder = LiveEncoder()
    trusted: list[bool] = []
    with client.open_stream(EVERY, on_keyframe_wanted=lambda _: encoder.wants_keyframe.set()) as stream:
        events = iter(stream)
        for frame_id in range(12):
            payload = encoder.encode()
            if frame_id == 5:
                continue  # lost on the way
            stream.send(Frame(payload=payload, frame_id=frame_id))
            trusted.append(next(event for event in events if isinstance(event, Result)).is_trusted)
    assert trusted == [*[True] * 5, False, *[True] * 5], "frame 6 tells of the gap, frame 7 is the keyframe"
