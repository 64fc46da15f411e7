from fractions import Fraction

import numpy as np
import pytest

from trocar.client_core import (
    EVERY_WINDOW_FRAMES,
    Frame,
    Notice,
    PromptAccepted,
    PromptRejected,
    Removal,
    Result,
    StreamCore,
    StreamOptions,
)
from trocar.decode import Codec
from trocar.errors import ContractError
from trocar.masklet_codec import encode_mask
from trocar.messages import write_mask
from trocar.v1 import tracking_pb2 as pb
from trocar_engines.masklets import ObjectState, Prompt, PromptMode


def core(*, is_live: bool = False) -> StreamCore:
    return StreamCore(StreamOptions(codec=Codec.H264, is_live=is_live))


def masklet() -> pb.Masklet:
    mask = write_mask(encode_mask(np.eye(4, dtype=np.bool_)))
    return pb.Masklet(object_id=5, state=pb.OBJECT_STATE_OCCLUDED, mask=mask)


def test_options_become_open_stream() -> None:
    options = StreamOptions(
        codec=Codec.NV12,
        width_px=64,
        height_px=32,
        memory="vanilla",
        time_base=Fraction(1, 25),
        max_objects=3,
    )
    message = StreamCore(options).write_open().open_stream
    assert message.video.codec == pb.VIDEO_CODEC_NV12
    assert (message.video.width_px, message.video.height_px) == (64, 32)
    assert (message.video.time_base.numerator, message.video.time_base.denominator) == (1, 25)
    assert message.delivery == pb.DELIVERY_LATEST
    assert message.memory_policy == pb.MEMORY_POLICY_VANILLA
    assert message.max_objects == 3


def test_unknown_memory_policy_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(ContractError, match="vanilla, fifo"):
        StreamOptions(codec=Codec.H264, memory="infinite")


def test_frames_are_numbered_unless_they_bring_a_number() -> None:
    stream = core()
    ids = [
        stream.write(Frame(payload=b"x", frame_id=given)).video_frame.frame_id for given in (None, 7, None)
    ]
    assert ids == [0, 7, 8]


def test_absent_pts_stays_absent() -> None:
    assert not core().write(Frame(payload=b"x")).video_frame.HasField("pts")
    assert core().write(Frame(payload=b"x", pts=0)).video_frame.HasField("pts")


def test_prompt_keeps_points_labels_box_and_mode() -> None:
    prompt = Prompt(
        object_id=4,
        frame_id=2,
        points=((1, 2), (3, 4)),
        labels=(1, 0),
        box=(0, 1, 2, 3),
        mode=PromptMode.REPLACE,
    )
    message = core().write(prompt).prompt
    assert [point.label for point in message.points] == [pb.POINT_LABEL_ON_OBJECT, pb.POINT_LABEL_OFF_OBJECT]
    assert (message.box.y_max, message.mode) == (3, pb.PROMPT_MODE_REPLACE)
    assert not message.HasField("mask")


def test_removal_names_its_object() -> None:
    assert core().write(Removal(object_id=8)).remove_object.object_id == 8


def test_window_closes_when_full_and_opens_with_each_kind_of_answer() -> None:
    stream = core()
    for _ in range(EVERY_WINDOW_FRAMES):
        stream.write(Frame(payload=b"x"))
    was_full = not stream.has_room
    stream.read(pb.TrackResponse(frame_result=pb.FrameResult(frame_id=0, dropped_frame_ids=[1, 2])))
    stream.read(pb.TrackResponse(stream_warning=pb.StreamWarning(lost_frame_ids=[3])))
    assert was_full
    assert stream.has_room
    assert stream.unanswered_frames == EVERY_WINDOW_FRAMES - 4


def test_result_decodes_masks_only_when_asked() -> None:
    result = core().read(pb.TrackResponse(frame_result=pb.FrameResult(frame_id=3, masklets=[masklet()])))
    assert isinstance(result, Result)
    (tracked,) = result.objects
    assert tracked.state is ObjectState.OCCLUDED
    assert "mask" not in vars(tracked)
    np.testing.assert_array_equal(tracked.mask, np.eye(4, dtype=np.bool_))
    assert tracked.mask is tracked.mask


def test_answers_to_prompts_bring_the_prompt_back() -> None:
    stream = core()
    prompts = [Prompt(object_id=5, frame_id=0, points=((1, 1),), labels=(1,)) for _ in range(2)]
    ids = [stream.write(prompt).prompt.prompt_id for prompt in prompts]
    rejected = stream.read(
        pb.TrackResponse(
            prompt_rejected=pb.PromptRejected(
                prompt_id=ids[1], reason=pb.REJECTION_REASON_UNKNOWN_FRAME, message="too old"
            )
        )
    )
    accepted = stream.read(
        pb.TrackResponse(prompt_accepted=pb.PromptAccepted(prompt_id=ids[0], masklet=masklet()))
    )
    assert isinstance(rejected, PromptRejected)
    assert (rejected.prompt, rejected.reason, rejected.message) == (prompts[1], "unknown_frame", "too old")
    assert isinstance(accepted, PromptAccepted)
    assert accepted.prompt is prompts[0]


def test_warning_reason_is_readable() -> None:
    warning = pb.StreamWarning(reason=pb.WARNING_REASON_FRAME_GAP, message="frame 3 is missing")
    notice = core().read(pb.TrackResponse(stream_warning=warning))
    assert notice == Notice(reason="frame_gap", message="frame 3 is missing", lost_frame_ids=())


def test_empty_response_is_an_error_that_suggests_the_cause() -> None:
    with pytest.raises(ContractError, match="newer than this client"):
        core().read(pb.TrackResponse())
