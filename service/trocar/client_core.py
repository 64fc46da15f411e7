"""What both faces of the client share: values to messages and back, and which frames are unanswered.

No I/O and no waiting here. Whoever reconnects one day finds what to replay in this place.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

import numpy as np

from trocar import messages
from trocar.decode import Codec, ColorMatrix
from trocar.errors import ContractError
from trocar.masklet_codec import EncodedMask, MaskEncoding, decode_mask, encode_mask
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


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamOptions:
    """What to ask of the server; see `OpenStream` in the contract.

    Args:
        codec: format of the payloads.
        is_live: newest frame first, others dropped (LATEST); otherwise every frame is tracked (EVERY).
        model: empty for the server's default.
        memory: "vanilla" or "fifo"; empty for the server's default.
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


Event = Opened | Result | PromptAccepted | PromptRejected | KeyframeWanted | Notice
Request = Frame | Prompt | Removal


@dataclass
class StreamCore:
    """One stream's state on the client. Thread safe; used by both faces."""

    options: StreamOptions
    _next_frame_id: int = 0
    _next_prompt_id: int = 1
    _unanswered: set[int] = field(default_factory=set)
    _prompts: dict[int, Prompt] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def unanswered_frames(self) -> int:
        """Frames sent and not accounted for yet."""
        return len(self._unanswered)

    @property
    def has_room(self) -> bool:
        """Whether another frame should be sent now."""
        window = LIVE_WINDOW_FRAMES if self.options.is_live else EVERY_WINDOW_FRAMES
        return len(self._unanswered) < window

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
        """Write a frame, prompt or removal, and count what will be answered."""
        match request:
            case Frame():
                return self._write_frame(request)
            case Prompt():
                return self._write_prompt(request)
            case Removal():
                return pb.TrackRequest(remove_object=pb.RemoveObject(object_id=request.object_id))

    def write_reset(self) -> pb.TrackRequest:
        """Write that all objects are to be forgotten."""
        return pb.TrackRequest(reset_stream=pb.ResetStream())

    def read(self, response: pb.TrackResponse) -> Event:
        """Read a response, and note which frames it answers."""
        kind = response.WhichOneof("response")
        match kind:
            case "frame_result":
                return self._read_result(response.frame_result)
            case "prompt_accepted":
                accepted = response.prompt_accepted
                return PromptAccepted(
                    prompt=self._prompts.pop(accepted.prompt_id),
                    frame_id=accepted.frame_id,
                    tracked=_read_object(accepted.masklet),
                )
            case "prompt_rejected":
                rejected = response.prompt_rejected
                return PromptRejected(
                    prompt=self._prompts.pop(rejected.prompt_id),
                    reason=pb.RejectionReason.Name(rejected.reason).removeprefix("REJECTION_REASON_").lower(),
                    message=rejected.message,
                )
            case "keyframe_request":
                return KeyframeWanted(frame_id=response.keyframe_request.frame_id)
            case "stream_warning":
                return self._read_warning(response.stream_warning)
            case "stream_opened":
                return _read_opened(response.stream_opened)
            case None:
                raise ContractError("the server sent an empty response: is it newer than this client?")

    def _write_frame(self, frame: Frame) -> pb.TrackRequest:
        with self._lock:
            frame_id = self._next_frame_id if frame.frame_id is None else frame.frame_id
            self._next_frame_id = frame_id + 1
            self._unanswered.add(frame_id)
        message = pb.VideoFrame(
            frame_id=frame_id,
            pts=frame.pts,
            capture_time_ns=frame.capture_time_ns,
            payload=frame.payload,
            width_px=frame.width_px,
            height_px=frame.height_px,
        )
        return pb.TrackRequest(video_frame=message)

    def _write_prompt(self, prompt: Prompt) -> pb.TrackRequest:
        with self._lock:
            prompt_id, self._next_prompt_id = self._next_prompt_id, self._next_prompt_id + 1
            self._prompts[prompt_id] = prompt
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

    def _read_result(self, result: pb.FrameResult) -> Result:
        self._settle([result.frame_id, *result.dropped_frame_ids])
        return Result(
            frame_id=result.frame_id,
            pts=result.pts if result.HasField("pts") else None,
            capture_time_ns=result.capture_time_ns,
            objects=tuple(_read_object(masklet) for masklet in result.masklets),
            is_trusted=result.is_trusted,
            width_px=result.width_px,
            height_px=result.height_px,
            stage_ns={stage: getattr(result.stages, f"{stage}_ns") for stage in STAGES},
            service_latency_ns=result.service_latency_ns,
            queue_depth_frames=result.queue_depth_frames,
            dropped_frame_ids=tuple(result.dropped_frame_ids),
            dropped_frames_total=result.dropped_frames_total,
        )

    def _read_warning(self, warning: pb.StreamWarning) -> Notice:
        self._settle(warning.lost_frame_ids)
        name = pb.WarningReason.Name(warning.reason).removeprefix("WARNING_REASON_").lower()
        return Notice(reason=name, message=warning.message, lost_frame_ids=tuple(warning.lost_frame_ids))

    def _settle(self, frame_ids: Iterable[int]) -> None:
        with self._lock:
            self._unanswered.difference_update(frame_ids)


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
