"""What both faces of the client share: values to messages and back, which frames are unanswered, and what to
send again when a server fails.

No I/O and no waiting here. A face takes messages from the core and hands responses to it. After a fault it
opens another call and rewinds the core, which then gives out the kept packets and the objects' last good
masks before anything new, and swallows what was answered before.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Literal

import grpc
import numpy as np

from trocar import messages
from trocar.decode import Codec, ColorMatrix
from trocar.errors import ConfigError, ContractError
from trocar.masklet_codec import EncodedMask, MaskEncoding, decode_mask, encode_mask
from trocar.replay import ObjectStore, PacketStore
from trocar.telemetry import STAGES
from trocar.v1 import tracking_pb2 as pb
from trocar_engines.masklets import BoolArray, ObjectState, Prompt, PromptMode

CODEC_NUMBERS = {codec: number for number, codec in messages.CODECS.items()}
STATES = {number: state for state, number in messages.STATE_NUMBERS.items()}
WIRE_ENCODINGS = {number: encoding for encoding, number in messages.ENCODING_NUMBERS.items()}
MATRIX_NUMBERS = {ColorMatrix.BT601: pb.COLOR_MATRIX_BT601, ColorMatrix.BT709: pb.COLOR_MATRIX_BT709}
MODE_NUMBERS = {PromptMode.REFINE: pb.PROMPT_MODE_REFINE, PromptMode.REPLACE: pb.PROMPT_MODE_REPLACE}
EVERY_WINDOW_FRAMES = 6
"""As many as the server works on at once. More only wait: 4, 6, 8 and 12 give the same frames/s on 2 cores,
and 65, 100, 125 and 170 ms of service latency."""
LIVE_WINDOW_FRAMES = 60
"""A second at 60 frames/s: a server that owes more is gone or hopelessly late."""
CATCH_UP_WINDOW_FRAMES = 16
"""Sent again at once: enough for a live server to decode ahead and track only the newest, and well below the
30 packets that it lets wait, so that it skips none."""
MOST_FUTILE_RESUMPTIONS = 3
"""One after the other without a new result: then it is what we send that the servers fail on."""
RECOVERABLE = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED})
"""Directly a dead server is UNAVAILABLE, behind nginx INTERNAL, behind haproxy CANCELLED."""
OBJECT_LOST = "object_lost"
"""Reason of a Notice about an object that could not be taken up again."""
END: Literal["end"] = "end"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconnect:
    """How a stream outlives its server.

    Args:
        timeout_s: since the fault; then the stream fails. 0 never reconnects.
        silence_s: without an answer to what was sent, after which a server counts as dead.
    """

    timeout_s: float = 30.0
    silence_s: float = 10.0

    def __post_init__(self) -> None:
        if self.timeout_s < 0 or self.silence_s <= 0:
            raise ConfigError(
                f"reconnect: timeout_s {self.timeout_s:g}, silence_s {self.silence_s:g}: expected 0 or more, "
                "and above 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamOptions:
    """What to ask of the server; see `OpenStream` in the contract.

    Args:
        codec: format of the payloads.
        is_live: newest frame first, others dropped (LATEST); otherwise every frame is tracked (EVERY).
        model: empty for the server's default.
        memory: "vanilla", "fifo" or "spread"; empty for the server's default.
        width_px: raw formats only.
        height_px: raw formats only.
        color_matrix: NV12 only.
        time_base: seconds per tick of pts.
        mask_encoding: preferred coding.
        is_low_resolution: masks on the network's grid instead of source pixels.
        resolve_overlaps: one owner per pixel.
        max_objects: 0 for the server's limit.
    """

    codec: Codec
    is_live: bool = True
    model: str = ""
    memory: str = ""
    width_px: int = 0
    height_px: int = 0
    color_matrix: ColorMatrix = ColorMatrix.BT601
    time_base: Fraction = messages.DEFAULT_TIME_BASE
    mask_encoding: MaskEncoding = MaskEncoding.RLE
    is_low_resolution: bool = False
    resolve_overlaps: bool = False
    max_objects: int = 0

    def __post_init__(self) -> None:
        if self.memory and self.memory not in messages.POLICY_NUMBERS:
            known = ", ".join(messages.POLICY_NUMBERS)
            raise ContractError(f"memory policy {self.memory!r}: expected one of {known}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Frame:
    """One frame to send.

    Args:
        payload: in the codec of the stream.
        frame_id: None takes the one after the last.
        pts: in ticks of the stream's time base; None lets the server's clock stand in.
        capture_time_ns: echoed.
        width_px: raw formats, from this frame on; 0 leaves it.
        height_px: raw formats, from this frame on; 0 leaves it.
    """

    payload: bytes
    frame_id: int | None = None
    pts: int | None = None
    capture_time_ns: int = 0
    width_px: int = 0
    height_px: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Removal:
    """An object to forget."""

    object_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Pin:
    """A frame to keep for prompts until another one is pinned."""

    frame_id: int


@dataclass(frozen=True, kw_only=True)
class TrackedObject:
    """One object on one frame, as received.

    Args:
        object_id: ours.
        state: VISIBLE, OCCLUDED or LOST.
        predicted_iou: 0 to 1.
        presence: 0 to 1.
        class_name: "unknown" where the model is unsure.
        class_probability: 0 to 1.
        frames_since_seen: 0 while VISIBLE.
        box: x_min, y_min, x_max, y_max in source pixels; None when the mask is empty.
        encoded_mask: as it came.
    """

    object_id: int
    state: ObjectState
    predicted_iou: float
    presence: float
    class_name: str
    class_probability: float
    frames_since_seen: int
    box: tuple[float, float, float, float] | None
    encoded_mask: EncodedMask

    @cached_property
    def mask(self) -> BoolArray:
        """Decode the mask, once: bool [H, W]."""
        return decode_mask(self.encoded_mask)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What is on one frame; see `FrameResult` in the contract."""

    frame_id: int
    pts: int | None
    capture_time_ns: int
    objects: tuple[TrackedObject, ...]
    is_trusted: bool
    width_px: int
    height_px: int
    stage_ns: dict[str, int]
    service_latency_ns: int
    queue_depth_frames: int
    dropped_frame_ids: tuple[int, ...]
    dropped_frames_total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptAccepted:
    """A prompt took effect.

    Args:
        prompt: as sent.
        frame_id: the frame that it was applied to.
        tracked: the object on that frame; the frame's own result was sent before and lacks it.
    """

    prompt: Prompt
    frame_id: int
    tracked: TrackedObject


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRejected:
    """A prompt had no effect.

    Args:
        prompt: as sent.
        reason: for programs, such as "unknown_frame".
        message: why, and what to do.
    """

    prompt: Prompt
    reason: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyframeWanted:
    """Results are untrusted until a keyframe comes."""

    frame_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Notice:
    """Something that did not end the stream."""

    reason: str
    message: str
    lost_frame_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """What the stream is like; the first event."""

    stream_id: int
    model: str
    memory: str
    input_size_px: int
    max_objects: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """Another server, or the same one again, has taken up the stream; object ids go on.

    Args:
        address: of the server.
        stream_id: its number of the stream.
        outage_s: from the fault to its answer.
        attempts: calls that it took.
        replayed_frames: sent again.
        lost_frame_ids: sent before, never answered and not sent again.
        unsent_frames: that `send` refused meanwhile.
        lost_object_ids: objects that were not seen recently enough to be taken up: prompt them anew.
    """

    address: str
    stream_id: int
    outage_s: float
    attempts: int
    replayed_frames: int
    lost_frame_ids: tuple[int, ...]
    unsent_frames: int
    lost_object_ids: tuple[int, ...]


Event = Opened | Result | PromptAccepted | PromptRejected | KeyframeWanted | Notice | Resumed
Request = Frame | Prompt | Pin | Removal


@dataclass(eq=False)
class _Outage:
    """What is known of a fault until a server answers."""

    began_s: float
    address: str = ""
    attempts: int = 0
    replayed_frames: int = 0
    unsent_frames: int = 0
    lost_frame_ids: list[int] = field(default_factory=list)
    lost_object_ids: list[int] = field(default_factory=list)


@dataclass(eq=False)
class StreamCore:
    """One stream's state on the client. Thread safe; used by both faces.

    Args:
        options: of the stream.
        clock: monotonic, s.
    """

    options: StreamOptions
    clock: Callable[[], float] = time.monotonic
    _next_frame_id: int = 0
    _next_prompt_id: int = 1
    _unanswered: set[int] = field(default_factory=set)
    _prompts: dict[int, Prompt] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    # What goes out: a frame's id, or None for the rest, and the message.
    _waiting: deque[tuple[int | None, pb.TrackRequest]] = field(default_factory=deque)
    _on_the_way: dict[int, float] = field(default_factory=dict)
    _listening_since_s: float | None = None
    _opening_since_s: float | None = field(init=False)
    _is_finished: bool = False
    _leaving_since_s: float | None = None
    # What another server would need.
    _packets: PacketStore = field(init=False)
    _objects: ObjectStore = field(default_factory=ObjectStore)
    _void_prompts: set[int] = field(default_factory=set)
    _picture_size: tuple[int, int] = (0, 0)
    # What the present call repeats.
    _has_opened: bool = False
    _outage: _Outage | None = None
    _is_catching_up: bool = False
    _resent_up_to: int = -1
    _reprompts: dict[int, int] = field(default_factory=dict)
    _asked: dict[int, float] = field(default_factory=dict)
    _has_picture: bool = False
    _own_events: list[Event] = field(default_factory=list)
    _futile_resumptions: int = 0
    _dropped_before: int = 0
    _dropped_total: int = 0
    _swallowed_drops: int = 0
    _unreported_drops: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._packets = PacketStore(codec=self.options.codec)
        self._opening_since_s = self.clock()

    @property
    def unanswered_frames(self) -> int:
        """Frames sent and not accounted for yet."""
        return len(self._unanswered)

    @property
    def has_room(self) -> bool:
        """Whether another frame should be sent now."""
        window = LIVE_WINDOW_FRAMES if self.options.is_live else EVERY_WINDOW_FRAMES
        return len(self._unanswered) < window

    @property
    def is_done(self) -> bool:
        """Whether everything was sent and answered."""
        return self._is_finished and not (self._unanswered or self._prompts)

    def begin_listening(self) -> None:
        """Note that a response is waited for."""
        self._listening_since_s = self.clock()

    def end_listening(self) -> None:
        """Note that a response came, or will not."""
        self._listening_since_s = None

    def is_server_silent(self, silence_s: float) -> bool:
        """Tell whether an answer is owed and nothing came for so long, while somebody was listening."""
        with self._lock:
            first_frame_s = next(iter(self._on_the_way.values()), None)
            first_mask_s = next(iter(self._asked.values()), None) if self._awaits_objects else None
            # The beginning of a call is owed too, and its end once we leave.
            asked_s = (self._opening_since_s, first_frame_s, first_mask_s, self._leaving_since_s)
            owed_s = min((one for one in asked_s if one is not None), default=None)
            if self._listening_since_s is None or owed_s is None:
                return False
            return self.clock() - max(self._listening_since_s, owed_s) > silence_s

    @property
    def _awaits_objects(self) -> bool:
        """Whether frames wait until masks that were sent again are answered.

        Not when each frame so far was lost: a server keeps prompts until it has a picture, and refuses them
        when they are for an earlier frame. Only what is held back can bring one.
        """
        can_be_answered = self._has_picture or bool(self._on_the_way)
        return self._is_catching_up and bool(self._asked) and can_be_answered

    @property
    def is_leaving(self) -> bool:
        """Whether the present call ends on our own wish, to go on with another server."""
        return self._leaving_since_s is not None

    @property
    def attempts(self) -> int:
        """Calls since the fault."""
        return 0 if self._outage is None else self._outage.attempts

    def finish(self) -> None:
        """Note that nothing more will be written."""
        self._is_finished = True

    def leave(self) -> None:
        """End the call once it has answered; what is written from now on waits for another server."""
        self._leaving_since_s = self.clock()

    def note_unsent(self) -> None:
        """Count a frame that found no room while there was no server."""
        with self._lock:
            if self._outage is not None:
                self._outage.unsent_frames += 1

    def take(self) -> pb.TrackRequest | Literal["end"] | None:
        """The next message for the present call; None when there is none now, `END` after the last."""
        with self._lock:
            if self.is_leaving:
                return END
            if not self._waiting:
                # What is new waits too until the objects are there again: else its result would lack them.
                self._is_catching_up = self._is_catching_up and bool(self._asked)
                return END if self._is_finished else None
            frame_id, message = self._waiting[0]
            if frame_id is None:
                if message.prompt.prompt_id in self._reprompts:
                    self._asked[message.prompt.prompt_id] = self.clock()
            else:
                # An object's frame must find room in the server's queues, else it cannot be prompted on.
                is_full = self._is_catching_up and len(self._on_the_way) >= CATCH_UP_WINDOW_FRAMES
                if is_full or self._awaits_objects:
                    return None
                self._on_the_way[frame_id] = self.clock()
            self._waiting.popleft()
            return message

    def note_fault(self) -> None:
        """Note that the present call is over before its time."""
        with self._lock:
            if self._outage is None:
                self._outage = _Outage(began_s=self.clock())
            self._on_the_way.clear()

    def may_resume(self, code: grpc.StatusCode) -> bool:
        """Tell whether a call that ended with that code is worth another one."""
        is_full = code is grpc.StatusCode.RESOURCE_EXHAUSTED and self._is_between_servers
        return self._futile_resumptions < MOST_FUTILE_RESUMPTIONS and (code in RECOVERABLE or is_full)

    @property
    def _is_between_servers(self) -> bool:
        # A server that is full, perhaps of streams whose clients it still believes alive.
        return self._has_opened and self._outage is not None

    def outage_s(self) -> float:
        """Time since the fault."""
        return 0.0 if self._outage is None else self.clock() - self._outage.began_s

    def rewind(self, address: str) -> None:
        """Begin anew on another call: kept packets, last good masks, unanswered prompts, then what is new.

        Args:
            address: of the server that is called.
        """
        with self._lock:
            self.note_fault()
            assert self._outage is not None
            outage = self._outage
            outage.address, outage.attempts = address, outage.attempts + 1
            self._opening_since_s = self.clock()
            self._leaving_since_s = None
            self._dropped_before, self._swallowed_drops = self._dropped_total, 0
            self._packets.trim(unanswered=self._unanswered, anchors=self._objects.anchors)
            self._reprompts.clear()
            self._asked.clear()
            self._waiting = deque(self._list_again())
            self._is_catching_up, self._has_picture = True, False
            self._resent_up_to = self._next_frame_id - 1
            kept = {frame_id for frame_id, _ in self._waiting if frame_id is not None}
            outage.replayed_frames = len(kept)
            lost = sorted(self._unanswered - kept)
            self._unanswered &= kept
            outage.lost_frame_ids += lost
            self._give_up_prompts(kept)

    def _list_again(self) -> Iterable[tuple[int | None, pb.TrackRequest]]:
        """Frames in order, each followed by the masks and the prompts that belong to it."""
        goods = [(object_id, good) for object_id, good in self._objects.items() if good is not None]
        for kept in self._packets:
            yield kept.frame_id, kept.message
            for object_id, good in goods:
                if good.frame_id == kept.frame_id:
                    prompt = Prompt(
                        object_id=object_id,
                        frame_id=good.frame_id,
                        mask=good.read_mask(),
                        mode=PromptMode.REPLACE,
                    )
                    prompt_id, self._next_prompt_id = self._next_prompt_id, self._next_prompt_id + 1
                    self._reprompts[prompt_id] = object_id
                    yield None, _write_prompt(prompt, prompt_id)
            for prompt_id, prompt in self._prompts.items():
                if prompt.frame_id == kept.frame_id and prompt_id not in self._void_prompts:
                    yield None, _write_prompt(prompt, prompt_id)

    def _give_up_prompts(self, kept: set[int]) -> None:
        """Answer what cannot be asked again, and name the objects that cannot be taken up."""
        assert self._outage is not None
        for prompt_id, prompt in list(self._prompts.items()):
            if prompt_id in self._void_prompts or prompt.frame_id not in kept:
                del self._prompts[prompt_id]
                self._void_prompts.discard(prompt_id)
                text = "the server failed before it answered, and the frame cannot be sent again: prompt anew"
                self._own_events.append(PromptRejected(prompt=prompt, reason="unknown_frame", message=text))
        for object_id, good in self._objects.items():
            if good is None or good.frame_id not in kept:
                self._outage.lost_object_ids.append(object_id)
                self._objects.forget(object_id, next_frame_id=self._next_frame_id)

    def take_own_events(self) -> list[Event]:
        """Events that no response brought."""
        with self._lock:
            events, self._own_events = self._own_events, []
            return events

    def write_open(self) -> pb.TrackRequest:
        """Write the first message."""
        options = self.options
        video = pb.VideoFormat(
            codec=CODEC_NUMBERS[options.codec],
            width_px=options.width_px,
            height_px=options.height_px,
            time_base=pb.Rational(
                numerator=options.time_base.numerator, denominator=options.time_base.denominator
            ),
            color_matrix=MATRIX_NUMBERS[options.color_matrix],
        )
        message = pb.OpenStream(
            model=options.model,
            video=video,
            delivery=pb.DELIVERY_LATEST if options.is_live else pb.DELIVERY_EVERY,
            memory_policy=messages.POLICY_NUMBERS.get(options.memory, pb.MEMORY_POLICY_UNSPECIFIED),
            mask_encoding=messages.ENCODING_NUMBERS[options.mask_encoding],
            mask_resolution=(
                pb.MASK_RESOLUTION_LOW if options.is_low_resolution else pb.MASK_RESOLUTION_SOURCE
            ),
            resolve_overlaps=options.resolve_overlaps,
            max_objects=options.max_objects,
        )
        return pb.TrackRequest(open_stream=message)

    def write(self, request: Request) -> pb.TrackRequest:
        """Write a frame, prompt, pin or removal, to be taken in its turn, and count what will be answered.

        Returns:
            the message.
        """
        with self._lock:
            match request:
                case Frame():
                    return self._write_frame(request)
                case Prompt():
                    prompt_id, self._next_prompt_id = self._next_prompt_id, self._next_prompt_id + 1
                    self._prompts[prompt_id] = request
                    message = _write_prompt(request, prompt_id)
                case Pin():
                    message = pb.TrackRequest(pin_frame=pb.PinFrame(frame_id=request.frame_id))
                case Removal():
                    object_id = request.object_id
                    self._objects.forget(object_id, next_frame_id=self._next_frame_id)
                    self._void_prompts.update(
                        one for one, prompt in self._prompts.items() if prompt.object_id == object_id
                    )
                    message = pb.TrackRequest(remove_object=pb.RemoveObject(object_id=object_id))
            self._waiting.append((None, message))
            return message

    def write_reset(self) -> pb.TrackRequest:
        """Write that all objects are to be forgotten."""
        with self._lock:
            self._objects.forget_all(next_frame_id=self._next_frame_id)
            self._void_prompts.update(self._prompts)
            message = pb.TrackRequest(reset_stream=pb.ResetStream())
            self._waiting.append((None, message))
            return message

    def read(self, response: pb.TrackResponse) -> Event | None:
        """Read a response, and note which frames it answers.

        Returns:
            None for the answer to something that was sent again and answered before.
        """
        with self._lock:
            kind = response.WhichOneof("response")
            match kind:
                case "frame_result":
                    return self._read_result(response.frame_result)
                case "prompt_accepted":
                    return self._read_accepted(response.prompt_accepted)
                case "prompt_rejected":
                    return self._read_rejected(response.prompt_rejected)
                case "keyframe_request":
                    frame_id = response.keyframe_request.frame_id
                    # A gap between kept packets ends at the next keyframe among them.
                    is_own_gap = frame_id <= self._resent_up_to and frame_id < (
                        self._packets.first_of_last_group or 0
                    )
                    return None if is_own_gap else KeyframeWanted(frame_id=frame_id)
                case "stream_warning":
                    return self._read_warning(response.stream_warning)
                case "stream_opened":
                    return self._read_opened(response.stream_opened)
                case None:
                    raise ContractError("the server sent an empty response: is it newer than this client?")

    def _write_frame(self, frame: Frame) -> pb.TrackRequest:
        frame_id = self._next_frame_id if frame.frame_id is None else frame.frame_id
        self._next_frame_id = frame_id + 1
        self._unanswered.add(frame_id)
        message = pb.TrackRequest(
            video_frame=pb.VideoFrame(
                frame_id=frame_id,
                pts=frame.pts,
                capture_time_ns=frame.capture_time_ns,
                payload=frame.payload,
                width_px=frame.width_px,
                height_px=frame.height_px,
            )
        )
        self._packets.add(frame_id, message, unanswered=self._unanswered, anchors=self._objects.anchors)
        self._waiting.append((frame_id, message))
        return message

    def _read_result(self, result: pb.FrameResult) -> Result | None:
        is_known = result.frame_id <= self._resent_up_to and result.frame_id not in self._unanswered
        dropped = tuple(self._keep_new(result.dropped_frame_ids))
        self._swallowed_drops += len(result.dropped_frame_ids) - len(dropped)
        self._settle([result.frame_id, *result.dropped_frame_ids])
        self._has_picture = True
        self._dropped_total = self._dropped_before + result.dropped_frames_total - self._swallowed_drops
        if is_known:
            # Drops that nobody has heard of ride on the next result.
            self._unreported_drops += dropped
            return None
        dropped, self._unreported_drops = (*self._unreported_drops, *dropped), ()
        self._futile_resumptions = 0
        self._picture_size = result.width_px, result.height_px
        objects = tuple(_read_object(masklet) for masklet in result.masklets)
        if result.is_trusted:
            for tracked in objects:
                self._objects.see(result.frame_id, tracked, *self._picture_size)
        return Result(
            frame_id=result.frame_id,
            pts=result.pts if result.HasField("pts") else None,
            capture_time_ns=result.capture_time_ns,
            objects=objects,
            is_trusted=result.is_trusted,
            width_px=result.width_px,
            height_px=result.height_px,
            stage_ns={stage: getattr(result.stages, f"{stage}_ns") for stage in STAGES},
            service_latency_ns=result.service_latency_ns,
            queue_depth_frames=result.queue_depth_frames,
            dropped_frame_ids=dropped,
            dropped_frames_total=self._dropped_total,
        )

    def _keep_new(self, frame_ids: Iterable[int]) -> list[int]:
        """Those that were not accounted for on an earlier call."""
        return [one for one in frame_ids if one > self._resent_up_to or one in self._unanswered]

    def _read_accepted(self, accepted: pb.PromptAccepted) -> PromptAccepted | None:
        self._asked.pop(accepted.prompt_id, None)
        if self._reprompts.pop(accepted.prompt_id, None) is not None:
            return None
        tracked = _read_object(accepted.masklet)
        if accepted.prompt_id not in self._void_prompts:
            size = self._picture_size
            if not all(size):
                size = tracked.encoded_mask.width_px, tracked.encoded_mask.height_px
            self._objects.accept(accepted.frame_id, tracked, *size)
        self._void_prompts.discard(accepted.prompt_id)
        prompt = self._prompts.pop(accepted.prompt_id)
        return PromptAccepted(prompt=prompt, frame_id=accepted.frame_id, tracked=tracked)

    def _read_rejected(self, rejected: pb.PromptRejected) -> PromptRejected | Notice:
        self._asked.pop(rejected.prompt_id, None)
        object_id = self._reprompts.pop(rejected.prompt_id, None)
        if object_id is not None:
            self._objects.forget(object_id, next_frame_id=self._next_frame_id)
            text = f"object {object_id} could not be taken up again, prompt it anew: {rejected.message}"
            return Notice(reason=OBJECT_LOST, message=text, lost_frame_ids=())
        self._void_prompts.discard(rejected.prompt_id)
        return PromptRejected(
            prompt=self._prompts.pop(rejected.prompt_id),
            reason=pb.RejectionReason.Name(rejected.reason).removeprefix("REJECTION_REASON_").lower(),
            message=rejected.message,
        )

    def _read_opened(self, opened: pb.StreamOpened) -> Opened | Resumed:
        self._opening_since_s = None
        outage, self._outage = self._outage, None
        if not self._has_opened or outage is None:
            self._has_opened = True
            return _read_opened(opened)
        self._futile_resumptions += 1
        return Resumed(
            address=outage.address,
            stream_id=opened.stream_id,
            outage_s=self.clock() - outage.began_s,
            attempts=outage.attempts,
            replayed_frames=outage.replayed_frames,
            lost_frame_ids=tuple(outage.lost_frame_ids),
            unsent_frames=outage.unsent_frames,
            lost_object_ids=tuple(outage.lost_object_ids),
        )

    def _read_warning(self, warning: pb.StreamWarning) -> Notice | None:
        lost = self._keep_new(warning.lost_frame_ids)
        is_repeating = next(iter(self._on_the_way), self._next_frame_id) <= self._resent_up_to
        self._settle(warning.lost_frame_ids)
        is_shutdown = warning.reason == pb.WARNING_REASON_SHUTTING_DOWN
        if is_repeating and not lost and not is_shutdown:
            # Gaps and changes of size between kept packets were told when they came first.
            return None
        name = messages.name_warning(warning.reason)
        return Notice(reason=name, message=warning.message, lost_frame_ids=tuple(lost))

    def _settle(self, frame_ids: Iterable[int]) -> None:
        for frame_id in frame_ids:
            self._unanswered.discard(frame_id)
            self._on_the_way.pop(frame_id, None)


def _write_prompt(prompt: Prompt, prompt_id: int) -> pb.TrackRequest:
    labels = {0: pb.POINT_LABEL_OFF_OBJECT, 1: pb.POINT_LABEL_ON_OBJECT}
    message = pb.Prompt(
        object_id=prompt.object_id,
        frame_id=prompt.frame_id,
        points=[
            pb.Point(x=x, y=y, label=labels.get(label, pb.POINT_LABEL_UNSPECIFIED))
            for (x, y), label in zip(prompt.points, prompt.labels, strict=True)
        ],
        mode=MODE_NUMBERS[prompt.mode],
        prompt_id=prompt_id,
    )
    if prompt.box is not None:
        x_min, y_min, x_max, y_max = prompt.box
        message.box.CopyFrom(pb.Box(x_min=x_min, y_min=y_min, x_max=x_max, y_max=y_max))
    if prompt.mask is not None:
        message.mask.CopyFrom(messages.write_mask(encode_mask(prompt.mask.astype(np.bool_))))
    return pb.TrackRequest(prompt=message)


def _read_opened(opened: pb.StreamOpened) -> Opened:
    return Opened(
        stream_id=opened.stream_id,
        model=opened.model.name,
        memory=messages.MEMORY_POLICIES.get(opened.settings.memory_policy, ""),
        input_size_px=opened.model.input_size_px,
        max_objects=opened.settings.max_objects,
    )


def _read_object(masklet: pb.Masklet) -> TrackedObject:
    box = masklet.box
    has_box = masklet.HasField("box")
    return TrackedObject(
        object_id=masklet.object_id,
        state=STATES[masklet.state],
        predicted_iou=masklet.predicted_iou,
        presence=masklet.presence,
        class_name=masklet.class_name,
        class_probability=masklet.class_probability,
        frames_since_seen=masklet.frames_since_seen,
        box=(box.x_min, box.y_min, box.x_max, box.y_max) if has_box else None,
        encoded_mask=EncodedMask(
            width_px=masklet.mask.width_px,
            height_px=masklet.mask.height_px,
            encoding=WIRE_ENCODINGS[masklet.mask.encoding],
            data=masklet.mask.data,
        ),
    )
