import asyncio

import numpy as np
import pytest

from trocar.v1 import tracking_pb2 as pb
from wire.calls import Call, accepted_of, accounted_ids, rejections_of, results_of, until, warnings_of
from wire.clips import (
    DISC_RADIUS_PX,
    HEIGHT_PX,
    WIDTH_PX,
    disc_center,
    draw_frames,
    encode_clip,
    encode_jpeg,
)
from wire.fakes import FakeScheduler


def unpack(mask: pb.Mask) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """Decode run lengths as the contract describes them, with none of our codec."""
    assert mask.encoding == pb.MASK_ENCODING_RLE
    runs, value, shift = [], 0, 0
    for octet in mask.data:
        value |= (octet & 0x7F) << shift
        shift += 7
        if octet < 0x80:
            runs.append(value)
            value = shift = 0
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(mask.height_px, mask.width_px)


@pytest.mark.parametrize(
    ("codec", "encoder"),
    [(pb.VIDEO_CODEC_H264_ANNEX_B, "libx264"), (pb.VIDEO_CODEC_HEVC_ANNEX_B, "libx265")],
)
async def test_prompted_disc_is_followed_through_every_frame(
    call: Call, codec: pb.VideoCodec.ValueType, encoder: str
) -> None:
    packets = encode_clip(draw_frames(12), encoder=encoder)
    await call.open(codec)
    await call.frame(0, packets[0])
    await call.prompt_red(0)
    await call.frames(packets[1:], first_id=1)
    responses = await call.read_rest()
    results = results_of(responses)
    assert [result.frame_id for result in results] == list(range(12))
    assert all(result.is_trusted for result in results)
    assert (results[0].width_px, results[0].height_px) == (WIDTH_PX, HEIGHT_PX)
    for result in results[1:]:
        mask = unpack(result.masklets[0].mask)
        rows, columns = np.nonzero(mask)
        x, y = disc_center(result.frame_id)
        assert abs(columns.mean() - x) < 3
        assert abs(rows.mean() - y) < 3
        assert mask.sum() == pytest.approx(np.pi * DISC_RADIUS_PX**2, rel=0.2)


async def test_prompt_is_answered_with_the_mask_on_its_frame(call: Call) -> None:
    await call.open()
    await call.frame(0, encode_clip(draw_frames(1))[0])
    await call.prompt(
        pb.Prompt(object_id=7, frame_id=0, prompt_id=99, box=pb.Box(x_min=20, y_min=50, x_max=40, y_max=70))
    )
    accepted = (await call.read_rest())[-1].prompt_accepted
    assert (accepted.prompt_id, accepted.frame_id, accepted.masklet.object_id) == (99, 0, 7)
    assert accepted.masklet.state == pb.OBJECT_STATE_VISIBLE
    box = accepted.masklet.box
    assert box.x_min < 30 < box.x_max
    assert unpack(accepted.masklet.mask)[60, 30]


@pytest.mark.parametrize("codec", [pb.VIDEO_CODEC_JPEG, pb.VIDEO_CODEC_RGB24, pb.VIDEO_CODEC_NV12])
async def test_intra_and_raw_frames_are_tracked(call: Call, codec: pb.VideoCodec.ValueType) -> None:
    frames = draw_frames(3)
    if codec == pb.VIDEO_CODEC_JPEG:
        payloads = [encode_jpeg(frame) for frame in frames]
    elif codec == pb.VIDEO_CODEC_RGB24:
        payloads = [frame.tobytes() for frame in frames]
    else:
        payloads = [encode_nv12(frame) for frame in frames]
    size = pb.VideoFormat(width_px=WIDTH_PX, height_px=HEIGHT_PX)
    settings = pb.OpenStream(video=size) if codec != pb.VIDEO_CODEC_JPEG else None
    await call.open(codec, settings=settings)
    await call.frame(0, payloads[0])
    await call.prompt_red(0)
    await call.frame(1, payloads[1])
    await call.frame(5, payloads[2])
    results = results_of(await call.read_rest())
    assert [result.frame_id for result in results] == [0, 1, 5]
    assert all(result.is_trusted for result in results), "a gap between frames that stand alone is only a gap"
    assert unpack(results[2].masklets[0].mask)[disc_center(2)[1], disc_center(2)[0]]


def encode_nv12(rgb: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> bytes:
    import av

    return av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="nv12").to_ndarray().tobytes()


async def test_result_echoes_times_and_tells_where_the_time_went(call: Call) -> None:
    await call.open()
    frame = pb.VideoFrame(frame_id=3, pts=-9000, capture_time_ns=1234, payload=encode_clip(draw_frames(1))[0])
    await call.write(pb.TrackRequest(video_frame=frame))
    result = results_of(await call.read_rest())[0]
    assert (result.frame_id, result.pts, result.capture_time_ns) == (3, -9000, 1234)
    stages = result.stages
    assert min(stages.decode_ns, stages.preprocess_ns, stages.encode_image_ns, stages.readback_ns) > 0
    inside = stages.decode_ns + stages.preprocess_ns + stages.encode_masklets_ns
    assert inside < result.service_latency_ns < 5e9


async def test_opened_stream_tells_the_settings_in_effect(call: Call) -> None:
    opened = await call.open(settings=pb.OpenStream(max_objects=500))
    assert opened.settings.model == "fake-nano"
    assert opened.settings.memory_policy == pb.MEMORY_POLICY_FIFO
    assert opened.settings.mask_encoding == pb.MASK_ENCODING_RLE
    assert opened.settings.max_objects == opened.limits.max_objects == 16
    assert opened.model.input_size_px == 64


async def test_low_resolution_masks_have_the_networks_grid_and_boxes_in_source_pixels(call: Call) -> None:
    packets = encode_clip(draw_frames(2))
    await call.open(settings=pb.OpenStream(mask_resolution=pb.MASK_RESOLUTION_LOW))
    await call.frame(0, packets[0])
    await call.prompt_red(0)
    await call.frame(1, packets[1])
    masklet = results_of(await call.read_rest())[1].masklets[0]
    assert (masklet.mask.width_px, masklet.mask.height_px) == (64, 64)
    assert masklet.box.x_max == pytest.approx(32 + DISC_RADIUS_PX, abs=4)


async def test_resolved_masks_never_overlap(call: Call) -> None:
    packets = encode_clip(draw_frames(2))
    await call.open(settings=pb.OpenStream(resolve_overlaps=True))
    await call.frame(0, packets[0])
    await call.prompt_red(0, object_id=1)
    await call.prompt_red(0, object_id=2)
    await call.frame(1, packets[1])
    first, second = results_of(await call.read_rest())[1].masklets
    assert unpack(first.mask).any()
    assert not (unpack(first.mask) & unpack(second.mask)).any()


async def test_removed_object_is_gone_from_the_next_frame_on(call: Call) -> None:
    packets = encode_clip(draw_frames(3))
    await call.open()
    await call.frame(0, packets[0])
    await call.prompt_red(0)
    await call.frame(1, packets[1])
    await call.remove(1)
    await call.frame(2, packets[2])
    assert [len(result.masklets) for result in results_of(await call.read_rest())] == [0, 1, 0]


async def test_removing_an_unknown_object_is_a_warning(call: Call) -> None:
    await call.open()
    await call.remove(12)
    (warning,) = warnings_of(await call.read_rest())
    assert warning.reason == pb.WARNING_REASON_UNKNOWN_OBJECT
    assert "12" in warning.message


async def test_reset_forgets_all_objects(call: Call) -> None:
    packets = encode_clip(draw_frames(2))
    await call.open()
    await call.frame(0, packets[0])
    await call.prompt_red(0)
    await call.write(pb.TrackRequest(reset_stream=pb.ResetStream()))
    await call.frame(1, packets[1])
    assert not results_of(await call.read_rest())[1].masklets


async def test_pinned_frame_takes_a_prompt_when_its_neighbours_are_gone(call: Call) -> None:
    packets = encode_clip(draw_frames(40))
    await call.open()
    await call.frame(0, packets[0])
    await call.write(pb.TrackRequest(pin_frame=pb.PinFrame(frame_id=0)))
    for frame_id in range(1, 40):
        await call.frame(frame_id, packets[frame_id])
    await call.prompt_red(0)
    responses = await call.read_rest()
    assert not warnings_of(responses)
    (accepted,) = accepted_of(responses)
    assert accepted.frame_id == 0


async def test_pinning_a_frame_that_is_gone_is_a_warning(call: Call) -> None:
    packets = encode_clip(draw_frames(40))
    await call.open()
    await call.frames(packets)
    await call.write(pb.TrackRequest(pin_frame=pb.PinFrame(frame_id=1)))
    (warning,) = warnings_of(await call.read_rest())
    assert warning.reason == pb.WARNING_REASON_UNKNOWN_FRAME
    assert "frame 1" in warning.message


async def test_prompt_that_is_earlier_than_its_frame_waits_for_it(call: Call) -> None:
    packets = encode_clip(draw_frames(4))
    await call.open()
    await call.prompt_red(2)
    await call.frames(packets)
    responses = await call.read_rest()
    (accepted,) = accepted_of(responses)
    assert accepted.frame_id == 2
    assert [len(result.masklets) for result in results_of(responses)] == [0, 0, 0, 1]


async def test_prompts_for_frames_that_never_come_are_refused(call: Call) -> None:
    packets = encode_clip(draw_frames(2))
    await call.open()
    await call.frames(packets)
    for number in range(17):
        await call.prompt_red(100 + number)
    rejections = rejections_of(await call.read_rest())
    assert {rejection.reason for rejection in rejections} == {pb.REJECTION_REASON_UNKNOWN_FRAME}
    assert len(rejections) == 17
    assert "16 prompts wait" in rejections[0].message
    assert "frame 100 never came" in rejections[1].message


async def test_live_stream_drops_waiting_pictures_for_the_newest_and_reports_them(
    call: Call, scheduler: FakeScheduler
) -> None:
    packets = encode_clip(draw_frames(8))
    await call.open(delivery=pb.DELIVERY_LATEST)
    scheduler.gate.clear()
    await call.frames(packets)
    await until(lambda: is_waiting_for(scheduler, 7))
    scheduler.gate.set()
    responses = await call.read_rest()
    results = results_of(responses)
    assert results[-1].frame_id == 7
    assert accounted_ids(responses) == list(range(8))
    assert results[-1].dropped_frames_total == 8 - len(results) > 0
    assert all(result.is_trusted for result in results), "dropped pictures were decoded all the same"


async def test_every_delivery_tracks_all_frames_and_never_queues_more_than_four(
    call: Call, scheduler: FakeScheduler
) -> None:
    packets = encode_clip(draw_frames(30))
    await call.open(delivery=pb.DELIVERY_EVERY)
    stream = scheduler.streams[0]
    scheduler.gate.clear()
    sending = asyncio.create_task(call.frames(packets))
    await until(lambda: stream.most_waiting >= 4)
    await asyncio.sleep(0.1)
    scheduler.gate.set()
    await sending
    responses = await call.read_rest()
    assert stream.tracked_ids == list(range(30))
    assert accounted_ids(responses) == list(range(30))
    assert stream.most_waiting <= 4


async def test_resolution_change_is_followed_by_masks_and_prompts(call: Call) -> None:
    small, large = draw_frames(2), [np.tile(frame, (2, 2, 1)) for frame in draw_frames(2)]
    await call.open()
    await call.frames(encode_clip(small) + encode_clip(large))
    prompt = pb.Prompt(object_id=1, frame_id=3)
    prompt.points.add(x=WIDTH_PX + disc_center(1)[0], y=HEIGHT_PX + 60, label=pb.POINT_LABEL_ON_OBJECT)
    await call.prompt(prompt)
    responses = await call.read_rest()
    assert not rejections_of(responses)
    assert warnings_of(responses)[0].reason == pb.WARNING_REASON_RESOLUTION_CHANGED
    accepted = responses[-1].prompt_accepted.masklet
    assert (accepted.mask.width_px, accepted.mask.height_px) == (2 * WIDTH_PX, 2 * HEIGHT_PX)
    assert [result.width_px for result in results_of(responses)] == [WIDTH_PX] * 2 + [2 * WIDTH_PX] * 2


def is_waiting_for(scheduler: FakeScheduler, frame_id: int) -> bool:
    pictures = [job.picture for job in scheduler.jobs_of(scheduler.streams[0])]
    return any(picture is not None and picture.frame_id == frame_id for picture in pictures)
