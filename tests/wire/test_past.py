"""Prompts in the past, pins and gaps on the wire, with the real scheduler and tracker over a tiny network."""

from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest
from grpc import aio

from stepping import ROWS, SteppedTracker, stepped_scheduler
from trocar.config import ServerConfig
from trocar.masklet_codec import encode_mask
from trocar.messages import write_mask
from trocar.server import TrackingServer
from trocar.v1 import tracking_pb2 as pb
from trocar_engines.preprocess import resize_to_model
from trocar_engines.scheduler import Scheduler
from wire.calls import (
    RED_POINT,
    Call,
    accepted_of,
    accounted_ids,
    count_keyframe_requests,
    rejections_of,
    results_of,
    until,
    warnings_of,
)
from wire.clips import HEIGHT_PX, WIDTH_PX, draw_frames, encode_clip

KEPT_FRAMES = 12
PACKETS = encode_clip(draw_frames(60))


@pytest.fixture
def real() -> Iterator[tuple[Scheduler, SteppedTracker]]:
    scheduler, tracker = stepped_scheduler(kept_frames=KEPT_FRAMES)
    yield scheduler, tracker
    tracker.release()
    scheduler.close()


@pytest.fixture
def tracker(real: tuple[Scheduler, SteppedTracker]) -> SteppedTracker:
    return real[1]


@pytest.fixture
async def call(real: tuple[Scheduler, SteppedTracker]) -> AsyncIterator[Call]:
    config = ServerConfig(address="127.0.0.1:0", shutdown_grace_s=0.1)
    server = TrackingServer(config, real[0], resize_to_model)
    await server.start()
    await server.warm_up()
    async with aio.insecure_channel(server.address) as channel:
        call = Call(channel)
        yield call
        call.cancel()
    real[1].release()
    await server.stop()


async def send(call: Call, frames: range) -> None:
    for frame_id in frames:
        await call.frame(frame_id, PACKETS[frame_id])


async def send_and_read(call: Call, frames: range) -> list[pb.FrameResult]:
    """One frame at a time, so that none is dropped on a live stream either."""
    results = []
    for frame_id in frames:
        await call.frame(frame_id, PACKETS[frame_id])
        results.append(await call.read_result())
    return results


def object_ids(result: pb.FrameResult) -> list[int]:
    return [masklet.object_id for masklet in result.masklets]


async def until_caught_up(real: tuple[Scheduler, SteppedTracker]) -> None:
    await until(lambda: not any(stream.state.is_behind for stream in real[0]._streams))


# Prompts on frames that are gone


async def test_late_prompt_puts_the_object_on_the_next_frame_and_takes_back_no_result(call: Call) -> None:
    await call.open()
    await send(call, range(10))
    await call.prompt_red(3)
    await call.frame(10, PACKETS[10])
    responses = await call.read_rest()
    (accepted,) = accepted_of(responses)
    assert accepted.frame_id == 3
    assert [result.frame_id for result in results_of(responses)] == list(range(11))
    assert [object_ids(result) for result in results_of(responses)] == [*[[]] * 10, [1]]


async def test_prompt_on_a_frame_older_than_what_is_kept_is_rejected_and_disturbs_nothing(call: Call) -> None:
    await call.open()
    await send(call, range(20))
    await call.prompt_red(19, object_id=2)
    await call.prompt_red(3)
    await call.frame(20, PACKETS[20])
    responses = await call.read_rest()
    (rejection,) = rejections_of(responses)
    assert rejection.reason == pb.REJECTION_REASON_UNKNOWN_FRAME
    assert "frame 3 is no longer kept: frames 8 to 19 are" in rejection.message
    assert object_ids(results_of(responses)[-1]) == [2]


async def hold_and_drop(call: Call, tracker: SteppedTracker, first: int) -> list[int]:
    """Keep the device busy with an object that catches up while five frames come: all but the last drop."""
    tracker.is_held = True
    await call.prompt_red(first - 6, object_id=9)
    await until(lambda: tracker.log[-1] == "catch_up")
    await send(call, range(first, first + 5))
    return list(range(first, first + 4))


async def until_queued(real: tuple[Scheduler, SteppedTracker], frame_id: int) -> None:
    def is_queued() -> bool:
        pictures = [getattr(task, "picture", None) for task in real[0]._streams[0].tasks]
        return any(picture is not None and picture.frame_id == frame_id for picture in pictures)

    await until(is_queued)


async def test_prompt_on_a_dropped_frame_takes_the_nearest_one_and_names_it(
    call: Call, real: tuple[Scheduler, SteppedTracker]
) -> None:
    await call.open(delivery=pb.DELIVERY_LATEST)
    await send_and_read(call, range(10))
    dropped = await hold_and_drop(call, real[1], 10)
    await until_queued(real, 14)
    real[1].release()
    await call.prompt_red(dropped[0])
    await call.prompt_red(dropped[-1], object_id=2)
    responses = await call.read_rest()
    assert {one.masklet.object_id: one.frame_id for one in accepted_of(responses)} == {9: 4, 1: 9, 2: 14}
    (last,) = results_of(responses)
    assert list(last.dropped_frame_ids) == dropped


async def test_dropped_frame_that_is_pinned_takes_prompts_when_its_neighbours_are_gone(
    call: Call, real: tuple[Scheduler, SteppedTracker]
) -> None:
    await call.open(delivery=pb.DELIVERY_LATEST)
    await send_and_read(call, range(10))
    dropped = await hold_and_drop(call, real[1], 10)
    await until_queued(real, 14)
    real[1].release()
    await call.write(pb.TrackRequest(pin_frame=pb.PinFrame(frame_id=dropped[0])))
    assert (await call.read_result()).frame_id == 14
    await send_and_read(call, range(15, 40))
    await call.prompt_red(dropped[0])
    await call.prompt_red(dropped[1], object_id=2)
    responses = await call.read_rest()
    (accepted,) = accepted_of(responses)
    assert (accepted.masklet.object_id, accepted.frame_id) == (1, 9)
    (rejection,) = rejections_of(responses)
    assert (rejection.object_id, rejection.reason) == (2, pb.REJECTION_REASON_UNKNOWN_FRAME)


async def test_pinned_frame_of_a_live_stream_starts_an_object_that_reaches_the_present(
    call: Call, real: tuple[Scheduler, SteppedTracker]
) -> None:
    await call.open(delivery=pb.DELIVERY_LATEST)
    await send_and_read(call, range(3))
    await call.write(pb.TrackRequest(pin_frame=pb.PinFrame(frame_id=1)))
    await send_and_read(call, range(3, 40))
    await call.prompt_red(1)
    assert (await call.read()).prompt_accepted.frame_id == 1
    await until_caught_up(real)
    (result,) = await send_and_read(call, range(40, 41))
    assert object_ids(result) == [1]


async def test_prompt_before_the_objects_first_frame_begins_it_there(call: Call) -> None:
    await call.open()
    await send(call, range(8))
    await call.prompt_red(6)
    await call.prompt_red(2)
    await call.frame(8, PACKETS[8])
    responses = await call.read_rest()
    assert [accepted.frame_id for accepted in accepted_of(responses)] == [6, 2]
    assert object_ids(results_of(responses)[-1]) == [1]


async def test_replacing_in_the_past_keeps_one_object_under_its_number(
    call: Call, tracker: SteppedTracker
) -> None:
    await call.open()
    await send(call, range(1))
    await call.prompt_red(0)
    await send(call, range(1, 10))
    await call.prompt(
        pb.Prompt(object_id=1, frame_id=5, points=[RED_POINT], mode=pb.PROMPT_MODE_REPLACE, prompt_id=7)
    )
    await call.frame(10, PACKETS[10])
    responses = await call.read_rest()
    assert [(one.prompt_id, one.frame_id) for one in accepted_of(responses)] == [(0, 0), (7, 5)]
    assert [object_ids(result) for result in results_of(responses)][-1] == [1]
    await until(lambda: tracker.pool.rows_in_use == 0)


async def test_late_prompt_from_before_a_resolution_change_is_in_the_pixels_of_its_frame(call: Call) -> None:
    large = [np.tile(frame, (2, 2, 1)) for frame in draw_frames(2)]
    await call.open()
    await call.frames(encode_clip(draw_frames(2)) + encode_clip(large))
    inside_large_only = pb.Point(x=WIDTH_PX + 10, y=60, label=pb.POINT_LABEL_ON_OBJECT)
    await call.prompt(pb.Prompt(object_id=2, frame_id=1, points=[inside_large_only]))
    await call.prompt_red(1)
    responses = await call.read_rest()
    (rejection,) = rejections_of(responses)
    assert "outside the 160x120 picture" in rejection.message
    (accepted,) = accepted_of(responses)
    assert (accepted.masklet.mask.width_px, accepted.masklet.mask.height_px) == (WIDTH_PX, HEIGHT_PX)


async def test_mask_that_vanishes_at_the_models_input_size_is_rejected(call: Call) -> None:
    await call.open()
    await send(call, range(1))
    speck = encode_mask(np.arange(WIDTH_PX * HEIGHT_PX).reshape(HEIGHT_PX, WIDTH_PX) == 5_000)
    await call.prompt(pb.Prompt(object_id=1, mask=write_mask(speck)))
    (rejection,) = rejections_of(await call.read_rest())
    assert rejection.reason == pb.REJECTION_REASON_INVALID_PROMPT
    assert "vanishes at the model's input size, 64x64" in rejection.message


async def test_points_that_add_up_beyond_reason_are_rejected_and_the_object_stays(call: Call) -> None:
    await call.open()
    await send(call, range(1))
    await call.prompt(pb.Prompt(object_id=1, points=[RED_POINT] * 200))
    await call.prompt(pb.Prompt(object_id=1, points=[RED_POINT] * 57))
    await call.prompt(pb.Prompt(object_id=1, points=[RED_POINT] * 56))
    await call.frame(1, PACKETS[1])
    responses = await call.read_rest()
    (rejection,) = rejections_of(responses)
    assert "200 points on frame 0 and 57 more" in rejection.message
    assert len(accepted_of(responses)) == 2
    assert object_ids(results_of(responses)[-1]) == [1]


async def test_object_without_a_memory_row_is_rejected_and_the_others_are_tracked_on(call: Call) -> None:
    await call.open()
    await send(call, range(1))
    for object_id in range(1, ROWS + 2):
        await call.prompt_red(0, object_id=object_id)
    await call.remove(1)
    await call.prompt_red(0, object_id=77)
    await call.frame(1, PACKETS[1])
    responses = await call.read_rest()
    (rejection,) = rejections_of(responses)
    assert (rejection.object_id, rejection.reason) == (ROWS + 1, pb.REJECTION_REASON_CAPACITY)
    assert object_ids(results_of(responses)[-1]) == [*range(2, ROWS + 1), 77]


# While an object is on its way to the present


async def start_catching_up(call: Call, tracker: SteppedTracker, *objects: int) -> None:
    """Prompt objects in the past of a live stream; the first step of their way is held back."""
    await call.open(delivery=pb.DELIVERY_LATEST)
    await send_and_read(call, range(10))
    tracker.is_held = True
    for object_id in objects:
        await call.prompt_red(2, object_id=object_id)
    await until(lambda: "catch_up" in tracker.log)


async def test_other_objects_are_on_every_frame_while_one_catches_up(
    call: Call, real: tuple[Scheduler, SteppedTracker]
) -> None:
    await call.open(delivery=pb.DELIVERY_LATEST)
    await send_and_read(call, range(1))
    await call.prompt_red(0, object_id=2)
    await send_and_read(call, range(1, 10))
    await call.prompt_red(1)
    results = await send_and_read(call, range(10, 22))
    assert all(2 in object_ids(result) for result in results)
    await until_caught_up(real)
    (last,) = await send_and_read(call, range(22, 23))
    assert object_ids(last) == [2, 1]


async def test_two_objects_that_catch_up_at_once_both_arrive(
    call: Call, real: tuple[Scheduler, SteppedTracker]
) -> None:
    await start_catching_up(call, real[1], 1, 2)
    real[1].release()
    await until_caught_up(real)
    (result,) = await send_and_read(call, range(10, 11))
    assert object_ids(result) == [1, 2]


async def until_asked(real: tuple[Scheduler, SteppedTracker]) -> None:
    await until(lambda: bool(real[0]._streams[0].tasks))


async def test_correction_while_the_object_catches_up_is_accepted_on_its_own_frame(
    call: Call, real: tuple[Scheduler, SteppedTracker]
) -> None:
    await start_catching_up(call, real[1], 1)
    await call.prompt_red(5)
    await until_asked(real)
    real[1].release()
    await until_caught_up(real)
    (result,) = await send_and_read(call, range(10, 11))
    assert object_ids(result) == [1]
    assert not rejections_of(await call.read_rest())
    assert real[1].log.count("catch_up") <= 2 + 4, "frames 3 and 4 at most, then 6 to 9"


@pytest.mark.parametrize(
    "forget",
    [
        pb.TrackRequest(remove_object=pb.RemoveObject(object_id=1)),
        pb.TrackRequest(reset_stream=pb.ResetStream()),
    ],
)
async def test_object_that_is_forgotten_while_it_catches_up_never_appears(
    call: Call, real: tuple[Scheduler, SteppedTracker], forget: pb.TrackRequest
) -> None:
    await start_catching_up(call, real[1], 1)
    await call.write(forget)
    await until_asked(real)
    real[1].release()
    results = await send_and_read(call, range(10, 14))
    assert [object_ids(result) for result in results] == [[]] * 4
    assert real[1].pool.rows_in_use == 0
    assert not warnings_of(await call.read_rest())


async def test_client_that_leaves_while_its_object_catches_up_frees_the_row(
    call: Call, real: tuple[Scheduler, SteppedTracker]
) -> None:
    await start_catching_up(call, real[1], 1)
    call.cancel()
    await until(lambda: all(stream.is_closed for stream in real[0]._streams))
    real[1].release()
    await until(lambda: not real[0]._streams)
    assert real[1].pool.rows_in_use == 0
    assert real[0].is_healthy


# Gaps


async def test_nothing_of_an_untrusted_frame_is_ever_remembered(
    call: Call, real: tuple[Scheduler, SteppedTracker]
) -> None:
    await call.open()
    time_s = {}
    results = []
    for frame_id in range(30):
        if frame_id in (4, 13, 14, 22):
            continue
        await call.frame(frame_id, PACKETS[frame_id], pts=3_000 * frame_id)
        if frame_id == 0:
            await call.prompt_red(0)
        results.append(await call.read_result())
        time_s[frame_id] = 3_000 * frame_id / 90_000
        untrusted = {time_s[result.frame_id] for result in results if not result.is_trusted}
        for tracked in real[0]._streams[0].state.objects.values():
            bank = tracked.bank
            remembered = {*bank.recent.times.values(), *bank.long_term.times.values()}
            assert not remembered & untrusted
    assert [result.frame_id for result in results if not result.is_trusted] == [
        *range(5, 10),
        *range(15, 20),
        *range(23, 30),
    ]
    assert remembered, "trusted frames are"
    responses = await call.read_rest()
    assert accounted_ids(responses) == []
    assert count_keyframe_requests(responses) <= 3
