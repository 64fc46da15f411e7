"""What the client keeps for another server, and what it sends first there."""

from collections.abc import Iterable

import grpc
import numpy as np
import pytest

from trocar import replay
from trocar.client_core import (
    CATCH_UP_WINDOW_FRAMES,
    END,
    MOST_FUTILE_RESUMPTIONS,
    OBJECT_LOST,
    Frame,
    Notice,
    PromptRejected,
    Removal,
    Result,
    Resumed,
    StreamCore,
    StreamOptions,
)
from trocar.decode import Codec
from trocar.masklet_codec import EncodedMask, decode_mask, encode_mask
from trocar.messages import write_mask
from trocar.prompts import ENCODINGS
from trocar.v1 import tracking_pb2 as pb
from trocar_engines.masklets import Prompt

KEYFRAME = b"\x00\x00\x00\x01\x67\x00\x00\x00\x01\x68\x00\x00\x00\x01\x65key"
INTER = b"\x00\x00\x00\x01\x41inter"
GROUP = 10
SIZE_PX = 8


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Peer:
    """Writes into a core and answers for the server."""

    def __init__(self, *, is_live: bool = True, codec: Codec = Codec.H264) -> None:
        self.clock = Clock()
        self.core = StreamCore(StreamOptions(codec=codec, is_live=is_live), clock=self.clock)
        self.core.read(pb.TrackResponse(stream_opened=pb.StreamOpened()))

    def send(self, frame_ids: Iterable[int]) -> None:
        for frame_id in frame_ids:
            payload = KEYFRAME if frame_id % GROUP == 0 else INTER
            self.core.write(Frame(payload=payload, frame_id=frame_id))
            self.take()

    def take(self) -> list[pb.TrackRequest]:
        messages = []
        while isinstance(message := self.core.take(), pb.TrackRequest):
            messages.append(message)
        return messages

    def answer(self, frame_id: int, visible: Iterable[int] = (), dropped: Iterable[int] = ()) -> object:
        objects = [masklet(object_id, frame_id) for object_id in visible]
        result = pb.FrameResult(
            frame_id=frame_id,
            masklets=objects,
            is_trusted=True,
            width_px=SIZE_PX,
            height_px=SIZE_PX,
            dropped_frame_ids=dropped,
        )
        return self.core.read(pb.TrackResponse(frame_result=result))

    def prompt(self, object_id: int, frame_id: int) -> None:
        prompt = Prompt(object_id=object_id, frame_id=frame_id, points=((1, 1),), labels=(1,))
        prompt_id = self.core.write(prompt).prompt.prompt_id
        self.take()
        accepted = pb.PromptAccepted(
            prompt_id=prompt_id, frame_id=frame_id, masklet=masklet(object_id, frame_id)
        )
        self.core.read(pb.TrackResponse(prompt_accepted=accepted))

    def reopen(self) -> Resumed:
        resumed = self.core.read(pb.TrackResponse(stream_opened=pb.StreamOpened(stream_id=2)))
        assert isinstance(resumed, Resumed)
        return resumed


def masklet(
    object_id: int, frame_id: int, state: pb.ObjectState.ValueType = pb.OBJECT_STATE_VISIBLE
) -> pb.Masklet:
    """A single pixel whose column is the frame's number, modulo the size."""
    mask = np.zeros((SIZE_PX, SIZE_PX), np.bool_)
    mask[object_id, frame_id % SIZE_PX] = True
    return pb.Masklet(
        object_id=object_id,
        state=state,
        mask=write_mask(encode_mask(mask)),
        box=pb.Box(x_min=0, y_min=0, x_max=1, y_max=1),
    )


def describe(messages: Iterable[pb.TrackRequest]) -> list[str]:
    """Frames as their number, prompts as p and their object."""
    return [
        f"p{one.prompt.object_id}" if one.HasField("prompt") else str(one.video_frame.frame_id)
        for one in messages
    ]


def take_all_again(peer: Peer) -> list[str]:
    """Take everything of a call that begins anew, answering as a server would."""
    taken: list[str] = []
    while messages := peer.take():
        taken += describe(messages)
        for message in messages:
            if message.HasField("video_frame"):
                peer.answer(message.video_frame.frame_id)
            else:
                accepted = pb.PromptAccepted(prompt_id=message.prompt.prompt_id, masklet=masklet(1, 0))
                peer.core.read(pb.TrackResponse(prompt_accepted=accepted))
    return taken


def test_packets_since_the_keyframe_are_sent_again_with_the_mask_behind_its_frame() -> None:
    peer = Peer()
    peer.send(range(14))
    peer.answer(0)
    peer.prompt(1, 0)
    for frame_id in range(1, 13):
        peer.answer(frame_id, visible=[1])
    peer.core.rewind("b:1")
    assert peer.reopen().lost_object_ids == ()
    assert take_all_again(peer) == ["10", "11", "12", "p1", "13"]


def test_last_good_mask_is_the_one_that_is_sent() -> None:
    peer = Peer()
    peer.send(range(5))
    peer.prompt(1, 0)
    for frame_id in range(5):
        peer.answer(frame_id, visible=[1])
    peer.core.rewind("b:1")
    (prompt,) = [one.prompt for one in list_taken(peer) if one.HasField("prompt")]
    mask = prompt.mask
    decoded = decode_mask(
        EncodedMask(
            width_px=mask.width_px,
            height_px=mask.height_px,
            encoding=ENCODINGS[mask.encoding],
            data=mask.data,
        )
    )
    assert (prompt.frame_id, prompt.mode) == (4, pb.PROMPT_MODE_REPLACE)
    np.testing.assert_array_equal(np.argwhere(decoded), [[1, 4]])


def list_taken(peer: Peer) -> list[pb.TrackRequest]:
    taken: list[pb.TrackRequest] = []
    while messages := peer.take():
        taken += messages
        for message in messages:
            peer.answer(message.video_frame.frame_id)
    return taken


def test_object_out_of_view_keeps_the_packets_up_to_where_it_was_seen() -> None:
    peer = Peer()
    peer.send(range(6))
    peer.prompt(1, 0)
    peer.prompt(2, 0)
    for frame_id in range(4):
        peer.answer(frame_id, visible=[1, 2])
    peer.answer(4, visible=[2])
    peer.answer(5, visible=[2])
    for frame_id in range(6, 45):
        peer.send([frame_id])
        peer.answer(frame_id, visible=[2])
    peer.core.rewind("b:1")
    assert take_all_again(peer) == ["0", "1", "2", "3", "p1", "40", "41", "42", "43", "44", "p2"]


def test_mask_of_an_untrusted_or_hidden_object_is_not_a_good_one() -> None:
    peer = Peer()
    peer.send(range(3))
    peer.prompt(1, 0)
    peer.answer(0, visible=[1])
    hidden = masklet(1, 1, pb.OBJECT_STATE_OCCLUDED)
    doubtful = masklet(1, 2)
    for frame_id, one, is_trusted in ((1, hidden, True), (2, doubtful, False)):
        result = pb.FrameResult(frame_id=frame_id, masklets=[one], is_trusted=is_trusted)
        peer.core.read(pb.TrackResponse(frame_result=result))
    peer.core.rewind("b:1")
    assert take_all_again(peer) == ["0", "p1", "1", "2"]


def test_what_was_answered_before_is_swallowed_and_what_was_not_is_told_once() -> None:
    peer = Peer(is_live=False)
    peer.send(range(12))
    for frame_id in range(9):
        peer.answer(frame_id)
    peer.core.rewind("b:1")
    assert peer.reopen().lost_frame_ids == ()
    told = []
    while messages := peer.take():
        for message in messages:
            event = peer.answer(message.video_frame.frame_id)
            told += [event.frame_id] if isinstance(event, Result) else []
    assert told == [9, 10, 11]
    assert peer.core.unanswered_frames == 0


def test_drops_ride_on_the_next_result_that_is_told() -> None:
    peer = Peer()
    peer.send(range(6))
    peer.answer(0)
    peer.answer(3, dropped=[1, 2])
    peer.core.rewind("b:1")
    peer.take()
    assert peer.answer(3, dropped=[0, 1, 2]) is None
    event = peer.answer(5, dropped=[4])
    assert isinstance(event, Result)
    assert event.dropped_frame_ids == (4,)


def test_video_without_keyframes_loses_its_packets_and_its_objects_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replay, "REPLAY_FRAMES", 5)
    peer = Peer()
    peer.send(range(9))
    peer.prompt(1, 0)
    for frame_id in range(8):
        peer.answer(frame_id, visible=[1])
    peer.core.rewind("b:1")
    resumed = peer.reopen()
    assert (resumed.lost_frame_ids, resumed.lost_object_ids) == ((8,), (1,))
    assert peer.take() == []
    peer.send([9, 10])
    assert peer.core.unanswered_frames == 2


def test_bytes_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "REPLAY_BYTES", 3_000)
    peer = Peer(codec=Codec.RGB24)
    for frame_id in range(10):
        peer.core.write(Frame(payload=bytes(1_000), frame_id=frame_id))
    peer.core.rewind("b:1")
    assert peer.reopen().lost_frame_ids == tuple(range(7))


def test_catching_up_stays_below_what_a_live_server_skips() -> None:
    peer = Peer()
    peer.send(range(40))
    peer.core.rewind("b:1")
    peer.reopen()
    assert len(peer.take()) == CATCH_UP_WINDOW_FRAMES
    peer.answer(1, dropped=[0])
    assert len(peer.take()) == 2


def test_new_frame_waits_until_the_objects_are_there_again() -> None:
    peer = Peer()
    peer.send(range(3))
    peer.answer(0)
    peer.prompt(1, 0)
    for frame_id in (1, 2):
        peer.answer(frame_id, visible=[1])
    peer.core.rewind("b:1")
    peer.reopen()
    asked = peer.take()
    assert describe(asked) == ["0", "1", "2", "p1"]
    peer.core.write(Frame(payload=INTER, frame_id=3))
    assert peer.take() == [], "its result would lack the object"
    prompt_id = asked[-1].prompt.prompt_id
    accepted = pb.PromptAccepted(prompt_id=prompt_id, frame_id=2, masklet=masklet(1, 2))
    peer.core.read(pb.TrackResponse(prompt_accepted=accepted))
    assert describe(peer.take()) == ["3"]


def lose(peer: Peer, *frame_ids: int) -> None:
    warning = pb.StreamWarning(reason=pb.WARNING_REASON_UNDECODABLE, lost_frame_ids=frame_ids)
    peer.core.read(pb.TrackResponse(stream_warning=warning))


def test_new_frame_goes_out_when_no_repeated_frame_gives_a_picture() -> None:
    peer = Peer()
    peer.send(range(3))
    peer.answer(0)
    peer.prompt(1, 0)
    for frame_id in (1, 2):
        peer.answer(frame_id, visible=[1])
    peer.core.rewind("b:1")
    peer.reopen()
    asked = peer.take()
    assert describe(asked) == ["0", "1", "2", "p1"]
    peer.core.write(Frame(payload=KEYFRAME, frame_id=3))
    lose(peer, 0, 1)
    assert peer.take() == [], "frame 2 may still give a picture"
    lose(peer, 2)
    peer.core.begin_listening()
    peer.clock.now_s += 60
    assert not peer.core.is_server_silent(10), "it is the camera's turn"
    assert describe(peer.take()) == ["3"], "nothing else would ever answer the mask"
    peer.answer(3)
    prompt_id = asked[-1].prompt.prompt_id
    rejected = pb.PromptRejected(prompt_id=prompt_id, message="frame 2 is none of the pictures at hand")
    notice = peer.core.read(pb.TrackResponse(prompt_rejected=rejected))
    assert isinstance(notice, Notice)
    assert notice.reason == OBJECT_LOST


def test_server_that_leaves_a_repeated_mask_unanswered_is_silent() -> None:
    peer = Peer()
    peer.send(range(1))
    peer.prompt(1, 0)
    peer.answer(0)
    peer.core.rewind("b:1")
    peer.reopen()
    assert describe(peer.take()) == ["0", "p1"]
    peer.answer(0)
    peer.core.begin_listening()
    peer.clock.now_s += 9
    assert not peer.core.is_server_silent(10)
    peer.clock.now_s += 2
    assert peer.core.is_server_silent(10), "new frames wait for it, and nothing else is owed"


def test_unanswered_prompt_is_asked_again_and_one_on_a_lost_frame_is_rejected() -> None:
    peer = Peer()
    peer.send(range(15))
    for frame_id in range(15):
        peer.answer(frame_id)
    prompts = [
        Prompt(object_id=object_id, frame_id=frame_id, points=((1, 1),), labels=(1,))
        for object_id, frame_id in ((1, 3), (2, 13))
    ]
    for prompt in prompts:
        peer.core.write(prompt)
    peer.core.rewind("b:1")
    (rejected,) = peer.core.take_own_events()
    assert isinstance(rejected, PromptRejected)
    assert (rejected.prompt, rejected.reason) == (prompts[0], "unknown_frame")
    assert "p2" in describe(list_taken(peer))


def test_prompt_whose_object_was_removed_is_not_asked_again() -> None:
    peer = Peer()
    peer.send(range(3))
    peer.core.write(Prompt(object_id=1, frame_id=2, points=((1, 1),), labels=(1,)))
    peer.core.write(Removal(object_id=1))
    peer.core.rewind("b:1")
    assert isinstance(peer.core.take_own_events()[0], PromptRejected)
    assert describe(list_taken(peer)) == ["0", "1", "2"]


def test_refused_mask_is_told_as_a_lost_object() -> None:
    peer = Peer()
    peer.send(range(2))
    peer.prompt(1, 0)
    peer.core.rewind("b:1")
    peer.reopen()
    prompt_id = peer.take()[1].prompt.prompt_id
    rejected = pb.PromptRejected(prompt_id=prompt_id, object_id=1, message="no room")
    event = peer.core.read(pb.TrackResponse(prompt_rejected=rejected))
    assert isinstance(event, Notice)
    assert (event.reason, "object 1" in event.message) == ("object_lost", True)


def test_outage_is_measured_and_refused_frames_counted() -> None:
    peer = Peer()
    peer.send([0])
    peer.core.note_fault()
    peer.core.note_unsent()
    peer.core.note_unsent()
    peer.core.rewind("a:1")
    peer.core.rewind("b:1")
    peer.clock.now_s += 1.5
    resumed = peer.reopen()
    assert (resumed.outage_s, resumed.unsent_frames, resumed.attempts) == (1.5, 2, 2)
    assert resumed.address == "b:1"


def test_only_faults_of_servers_and_lines_are_worth_another_call() -> None:
    peer = Peer()
    recoverable = {code for code in grpc.StatusCode if peer.core.may_resume(code)}
    assert {code.name for code in recoverable} == {"UNAVAILABLE", "INTERNAL", "CANCELLED"}
    peer.core.note_fault()
    assert peer.core.may_resume(grpc.StatusCode.RESOURCE_EXHAUSTED), "a server may be full for a moment"


def test_what_fails_every_server_is_given_up() -> None:
    peer = Peer()
    for _ in range(MOST_FUTILE_RESUMPTIONS):
        assert peer.core.may_resume(grpc.StatusCode.INTERNAL)
        peer.core.rewind("b:1")
        peer.reopen()
    assert not peer.core.may_resume(grpc.StatusCode.INTERNAL)


def test_server_is_silent_only_while_it_owes_an_answer_to_somebody_who_listens() -> None:
    peer = Peer()
    peer.core.begin_listening()
    peer.clock.now_s += 60
    assert not peer.core.is_server_silent(10)
    peer.send([0])
    peer.clock.now_s += 9
    assert not peer.core.is_server_silent(10)
    peer.clock.now_s += 2
    assert peer.core.is_server_silent(10)
    peer.core.end_listening()
    assert not peer.core.is_server_silent(10)


def test_server_that_does_not_open_the_stream_is_silent() -> None:
    clock = Clock()
    core = StreamCore(StreamOptions(codec=Codec.H264), clock=clock)
    core.begin_listening()
    clock.now_s += 11
    assert core.is_server_silent(10), "nothing is sent before, but the stream's opening is owed"
    core.note_fault()
    core.rewind("b:1")
    assert not core.is_server_silent(10)
    clock.now_s += 11
    assert core.is_server_silent(10)
    core.read(pb.TrackResponse(stream_opened=pb.StreamOpened()))
    assert not core.is_server_silent(10)


def test_server_that_does_not_let_go_is_silent() -> None:
    peer = Peer()
    peer.core.leave()
    peer.core.begin_listening()
    peer.clock.now_s += 11
    assert peer.core.is_server_silent(10), "what is written waits for another server"


def test_leaving_ends_the_call_and_keeps_what_is_written() -> None:
    peer = Peer()
    peer.core.leave()
    peer.core.write(Frame(payload=KEYFRAME))
    assert peer.core.take() == END
    peer.core.rewind("b:1")
    assert describe(peer.take()) == ["0"]
