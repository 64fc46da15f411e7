import contextlib
import math
from collections.abc import Callable

import grpc
import pytest
from grpc import aio

from trocar.server import MOST_STATUS_BYTES
from trocar.v1 import tracking_pb2 as pb
from wire.calls import (
    RED_POINT,
    Call,
    accounted_ids,
    count_keyframe_requests,
    rejections_of,
    results_of,
    warnings_of,
)
from wire.clips import HEIGHT_PX, WIDTH_PX, draw_frames, encode_clip, encode_jpeg
from wire.fakes import BROKEN_MODEL

H264 = pb.VIDEO_CODEC_H264_ANNEX_B

# A broken contract ends the stream, and only that stream


async def assert_refused(call: Call, *words: str) -> None:
    code, details = await call.read_failure()
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    for word in words:
        assert word in details


async def test_first_message_other_than_open_stream_is_refused(call: Call) -> None:
    await call.frame(0, b"x")
    await assert_refused(call, "video_frame", "open_stream")


async def test_call_without_any_message_is_refused(call: Call) -> None:
    await call.finish()
    await assert_refused(call, "open_stream")


async def test_second_open_stream_is_refused(call: Call) -> None:
    await call.open()
    await call.write(pb.TrackRequest(open_stream=pb.OpenStream()))
    await assert_refused(call, "second OpenStream")


async def test_empty_request_is_refused(call: Call) -> None:
    await call.open()
    await call.write(pb.TrackRequest())
    await assert_refused(call, "empty TrackRequest")


@pytest.mark.parametrize("before", [[], [pb.OpenStream(video=pb.VideoFormat(codec=H264))]])
async def test_bytes_that_are_no_message_are_refused(
    channel: aio.Channel, before: list[pb.OpenStream], caplog: pytest.LogCaptureFixture
) -> None:
    call = channel.stream_stream("/trocar.v1.TrackingService/Track")()  # type: ignore[call-arg]
    for message in before:
        await call.write(pb.TrackRequest(open_stream=message).SerializeToString())
    await call.write(b"\xff\xff\xff")
    with contextlib.suppress(aio.AioRpcError):
        while isinstance(await call.read(), bytes):
            pass
    assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "no TrackRequest" in (await call.details() or "")
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    "method", ["/trocar.v1.TrackingService/GetServerInfo", "/grpc.health.v1.Health/Check"]
)
async def test_question_that_is_no_message_is_refused(channel: aio.Channel, method: str) -> None:
    with pytest.raises(aio.AioRpcError) as failure:
        await channel.unary_unary(method, None, None)(b"\xff\xff\xff")
    assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "method",
    ["/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "/grpc.health.v1.Health/Watch"],
)
async def test_question_with_many_answers_that_is_no_message_is_refused(
    channel: aio.Channel, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    call = channel.stream_stream(method)()  # type: ignore[call-arg]
    await call.write(b"\xff\xff\xff")
    await call.done_writing()
    assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (pb.OpenStream(), ["codec", "H264_ANNEX_B"]),
        (pb.OpenStream(video=pb.VideoFormat(codec=pb.VIDEO_CODEC_RGB24)), ["0x0", "width_px"]),
        (
            pb.OpenStream(
                video=pb.VideoFormat(codec=pb.VIDEO_CODEC_NV12, width_px=1 << 20, height_px=1 << 20)
            ),
            ["1048576x1048576", "at most"],
        ),
        (
            pb.OpenStream(video=pb.VideoFormat(codec=H264, time_base=pb.Rational(numerator=1))),
            ["time_base", "1/0"],
        ),
        (pb.OpenStream(video=pb.VideoFormat(codec=H264), delivery=9), ["delivery", "9"]),  # type: ignore[arg-type]
    ],
)
async def test_senseless_open_stream_is_refused(call: Call, message: pb.OpenStream, words: list[str]) -> None:
    await call.write(pb.TrackRequest(open_stream=message))
    await assert_refused(call, *words)


async def test_endless_name_is_refused_in_a_short_message(call: Call) -> None:
    message = pb.OpenStream(model="x" * 70_000, video=pb.VideoFormat(codec=H264))
    await call.write(pb.TrackRequest(open_stream=message))
    code, details = await call.read_failure()
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "xxxx" in details, "the refusal names what it refuses"
    assert len(details.encode()) <= MOST_STATUS_BYTES, "a status beyond 8 KiB never reaches the client"


async def test_unknown_model_is_a_failed_precondition(call: Call) -> None:
    message = pb.OpenStream(model="sam9", video=pb.VideoFormat(codec=H264))
    await call.write(pb.TrackRequest(open_stream=message))
    code, details = await call.read_failure()
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "sam9" in details
    assert "fake-nano" in details


async def test_checkpoint_that_does_not_fit_is_a_failed_precondition_that_lists_the_keys(call: Call) -> None:
    message = pb.OpenStream(model=BROKEN_MODEL, video=pb.VideoFormat(codec=H264))
    await call.write(pb.TrackRequest(open_stream=message))
    code, details = await call.read_failure()
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "missing keys: memory_attention.norm" in details
    assert "unexpected keys: head.bias" in details


@pytest.mark.parametrize("second_id", [4, 3])
async def test_frame_id_that_does_not_increase_is_refused(call: Call, second_id: int) -> None:
    packet = encode_clip(draw_frames(1))[0]
    await call.open()
    await call.frame(4, packet)
    await call.frame(second_id, packet)
    await assert_refused(call, f"frame_id {second_id} after 4", "more than 4")


def jpeg(index: int) -> bytes:
    return encode_jpeg(draw_frames(index + 1)[index])


@pytest.mark.parametrize(
    ("declared", "payloads", "word"),
    [
        (pb.VIDEO_CODEC_H264_ANNEX_B, lambda: [jpeg(0)] * 30, "JPEG"),
        (pb.VIDEO_CODEC_H264_ANNEX_B, lambda: encode_clip(draw_frames(30), encoder="libx265"), "HEVC"),
        (pb.VIDEO_CODEC_HEVC_ANNEX_B, lambda: encode_clip(draw_frames(30)), "H.264"),
        (pb.VIDEO_CODEC_JPEG, lambda: encode_clip(draw_frames(30)), "H.264"),
        (pb.VIDEO_CODEC_H264_ANNEX_B, lambda: [b"\x00\x00\x00\x05hello"] * 30, "length-prefixed"),
    ],
)
async def test_thirty_frames_of_another_codec_are_refused(
    call: Call, declared: pb.VideoCodec.ValueType, payloads: Callable[[], list[bytes]], word: str
) -> None:
    await call.open(declared)
    await call.frames(payloads())
    await assert_refused(call, "30 frames", word)


async def test_stream_with_b_frames_is_refused_with_the_remedy(call: Call) -> None:
    await call.open()
    await call.frame(0, encode_clip(draw_frames(6), has_b_frames=True)[0])
    await assert_refused(call, "B-frames", "bframes=0")


async def test_other_streams_live_on_when_one_is_refused(call: Call, channel: aio.Channel) -> None:
    packets = encode_clip(draw_frames(2))
    await call.open()
    await call.frame(0, packets[0])
    broken = Call(channel)
    await broken.frame(0, b"x")
    await broken.read_failure()
    await call.frame(1, packets[1])
    assert len(results_of(await call.read_rest())) == 2


# Bad packets: the stream goes on, untrusted


def garble(packet: bytes) -> bytes:
    return bytes(255 - octet for octet in packet)


def truncate(packet: bytes) -> bytes:
    return packet[: len(packet) // 3]


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("damage", [garble, truncate, lambda _: b""])
async def test_damaged_packet_asks_for_a_keyframe_and_is_untrusted_until_it_comes(
    call: Call, codec: str, damage: Callable[[bytes], bytes]
) -> None:
    packets = encode_clip(draw_frames(20), encoder=codec, keyframe_interval=10)
    packets[4] = damage(packets[4])
    await call.open(pb.VIDEO_CODEC_H264_ANNEX_B if codec == "libx264" else pb.VIDEO_CODEC_HEVC_ANNEX_B)
    await call.frames(packets)
    responses = await call.read_rest()
    assert count_keyframe_requests(responses) == 1
    assert warnings_of(responses)[0].reason == pb.WARNING_REASON_UNDECODABLE
    assert "frame 4" in warnings_of(responses)[0].message
    trusted = {result.frame_id: result.is_trusted for result in results_of(responses)}
    assert all(trusted[frame_id] for frame_id in (*range(4), *range(10, 20)))
    assert not any(trusted.get(frame_id, False) for frame_id in range(4, 10))
    assert accounted_ids(responses) == list(range(20))


async def test_missing_packet_asks_for_a_keyframe_and_is_untrusted_until_it_comes(call: Call) -> None:
    packets = encode_clip(draw_frames(20), keyframe_interval=10)
    await call.open()
    await call.frames(packets[:3])
    await call.frames(packets[5:], first_id=5)
    responses = await call.read_rest()
    assert count_keyframe_requests(responses) == 1
    assert warnings_of(responses)[0].reason == pb.WARNING_REASON_FRAME_GAP
    assert "frames 3 to 4" in warnings_of(responses)[0].message
    trusted = {result.frame_id: result.is_trusted for result in results_of(responses)}
    assert [frame_id for frame_id, is_trusted in trusted.items() if not is_trusted] == list(range(5, 10))


async def test_stream_joined_between_keyframes_waits_for_one_and_asks(call: Call) -> None:
    packets = encode_clip(draw_frames(80), keyframe_interval=40)
    await call.open()
    await call.frames(packets[1:], first_id=1)
    responses = await call.read_rest()
    assert [result.frame_id for result in results_of(responses)] == list(range(40, 80))
    assert count_keyframe_requests(responses) == 2, "at the start, and again 30 frames later"
    assert accounted_ids(responses) == list(range(1, 80))


async def test_truncated_jpeg_distrusts_that_frame_alone(call: Call) -> None:
    await call.open(pb.VIDEO_CODEC_JPEG)
    await call.frames([jpeg(0), jpeg(1)[:-4], jpeg(2)])
    responses = await call.read_rest()
    assert [result.frame_id for result in results_of(responses) if result.is_trusted] == [0, 2]
    assert accounted_ids(responses) == [0, 1, 2]
    assert count_keyframe_requests(responses) == 0


async def test_raw_frame_of_another_size_is_lost_and_the_stream_goes_on(call: Call) -> None:
    size = pb.VideoFormat(width_px=WIDTH_PX, height_px=HEIGHT_PX)
    whole = draw_frames(1)[0].tobytes()
    await call.open(pb.VIDEO_CODEC_RGB24, settings=pb.OpenStream(video=size))
    await call.frames([whole, whole[:-1], whole])
    responses = await call.read_rest()
    assert [result.frame_id for result in results_of(responses)] == [0, 2]
    assert "160x120" in warnings_of(responses)[0].message
    assert list(warnings_of(responses)[0].lost_frame_ids) == [1]


# Bad prompts: refused with the reason, tracking undisturbed


def point(x: float, y: float, label: int = 1) -> pb.Prompt:
    return pb.Prompt(object_id=2, points=[pb.Point(x=x, y=y, label=label)])  # type: ignore[arg-type]


def box(*corners: float) -> pb.Prompt:
    x_min, y_min, x_max, y_max = corners
    return pb.Prompt(object_id=2, box=pb.Box(x_min=x_min, y_min=y_min, x_max=x_max, y_max=y_max))


def mask(width_px: int, height_px: int, data: bytes, encoding: int = 1) -> pb.Prompt:
    coded = pb.Mask(width_px=width_px, height_px=height_px, encoding=encoding, data=data)  # type: ignore[arg-type]
    return pb.Prompt(object_id=2, mask=coded)


INVALID, UNKNOWN = pb.REJECTION_REASON_INVALID_PROMPT, pb.REJECTION_REASON_UNKNOWN_FRAME


@pytest.mark.parametrize(
    ("prompt", "reason", "words"),
    [
        (point(WIDTH_PX, 10), INVALID, ["(160, 10)", "outside the 160x120"]),
        (point(-1, 10), INVALID, ["outside"]),
        (point(math.nan, 10), INVALID, ["nan"]),
        (point(math.inf, 10), INVALID, ["inf"]),
        (point(10, 10, label=0), INVALID, ["label 0"]),
        (point(10, 10, label=7), INVALID, ["label 7"]),
        (box(90, 10, 40, 80), INVALID, ["box (90, 10, 40, 80): x_max must exceed x_min"]),
        (box(10, 10, 40, 10), INVALID, ["y_max must exceed y_min"]),
        (box(10, 10, 400, 80), INVALID, ["leaves the 160x120"]),
        (box(10, math.nan, 40, 80), INVALID, ["finite"]),
        (mask(80, 60, b""), INVALID, ["80x60", "160x120"]),
        (mask(WIDTH_PX, HEIGHT_PX, b"\x05\x05"), INVALID, ["add up to 10", "19200"]),
        (mask(WIDTH_PX, HEIGHT_PX, b"\xff\xff"), INVALID, ["varint"]),
        (mask(WIDTH_PX, HEIGHT_PX, b"\x80\x96\x01"), INVALID, ["no object pixels"]),
        (mask(WIDTH_PX, HEIGHT_PX, b"\x00", encoding=2), INVALID, ["1 bytes", "2400"]),
        (mask(WIDTH_PX, HEIGHT_PX, b"", encoding=0), INVALID, ["encoding 0"]),
        (pb.Prompt(object_id=2), INVALID, ["empty"]),
        (pb.Prompt(object_id=2, points=[RED_POINT], mask=pb.Mask()), INVALID, ["mask together"]),
        (pb.Prompt(object_id=2, points=[RED_POINT] * 300), INVALID, ["300 points"]),
        (pb.Prompt(object_id=2, points=[RED_POINT], mode=9), INVALID, ["mode 9"]),  # type: ignore[arg-type]
        (pb.Prompt(object_id=0, points=[RED_POINT]), INVALID, ["object_id 0"]),
        (pb.Prompt(object_id=65_536, points=[RED_POINT]), INVALID, ["65536", "65535"]),
        (pb.Prompt(object_id=2, frame_id=77, points=[RED_POINT]), UNKNOWN, ["frame 77", "never came"]),
    ],
)
async def test_bad_prompt_is_rejected_with_its_reason_and_disturbs_nothing(
    call: Call, prompt: pb.Prompt, reason: pb.RejectionReason.ValueType, words: list[str]
) -> None:
    packets = encode_clip(draw_frames(2))
    prompt.prompt_id = 41
    await call.open()
    await call.frame(0, packets[0])
    await call.prompt_red(0)
    await call.prompt(prompt)
    await call.frame(1, packets[1])
    responses = await call.read_rest()
    (rejection,) = rejections_of(responses)
    assert (rejection.prompt_id, rejection.object_id, rejection.reason) == (41, prompt.object_id, reason)
    for word in words:
        assert word in rejection.message
    assert [masklet.object_id for masklet in results_of(responses)[1].masklets] == [1]


async def test_prompt_without_any_frame_is_rejected(call: Call) -> None:
    await call.open()
    await call.prompt_red(0)
    (rejection,) = rejections_of(await call.read_rest())
    assert rejection.reason == UNKNOWN
    assert "frame 0 never came" in rejection.message


async def test_prompt_on_a_lost_frame_before_the_first_picture_is_rejected_with_it(call: Call) -> None:
    packets = encode_clip(draw_frames(2), keyframe_interval=1)
    await call.open()
    await call.frame(0, garble(packets[0]))
    await call.prompt_red(0)
    await call.frame(1, packets[1])
    responses = await call.read_rest()
    (rejection,) = rejections_of(responses)
    assert rejection.reason == UNKNOWN
    assert [len(result.masklets) for result in results_of(responses)] == [0]


async def test_object_beyond_the_limit_is_rejected_for_capacity(call: Call) -> None:
    await call.open(settings=pb.OpenStream(max_objects=1))
    await call.frame(0, encode_clip(draw_frames(1))[0])
    await call.prompt_red(0, object_id=1)
    await call.prompt_red(0, object_id=2)
    (rejection,) = rejections_of(await call.read_rest())
    assert rejection.reason == pb.REJECTION_REASON_CAPACITY
