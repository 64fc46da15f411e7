"""Messages of the contract to values and back; nothing here waits, decodes or tracks."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from trocar.config import ServerConfig
from trocar.decode import Codec, ColorMatrix, Fault, FaultKind, VideoFormat
from trocar.errors import ContractError
from trocar.masklet_codec import EncodedMask, MaskEncoding, encode_mask, find_box
from trocar.telemetry import STAGES
from trocar.tracking import ModelCard
from trocar.v1 import tracking_pb2 as pb
from trocar_engines.masklets import BoolArray, Masklet, ObjectState

CODECS = {
    pb.VIDEO_CODEC_H264_ANNEX_B: Codec.H264,
    pb.VIDEO_CODEC_HEVC_ANNEX_B: Codec.HEVC,
    pb.VIDEO_CODEC_JPEG: Codec.JPEG,
    pb.VIDEO_CODEC_RGB24: Codec.RGB24,
    pb.VIDEO_CODEC_NV12: Codec.NV12,
}
COLOR_MATRICES = {
    pb.COLOR_MATRIX_UNSPECIFIED: ColorMatrix.BT601,
    pb.COLOR_MATRIX_BT601: ColorMatrix.BT601,
    pb.COLOR_MATRIX_BT709: ColorMatrix.BT709,
}
MEMORY_POLICIES = {
    pb.MEMORY_POLICY_VANILLA: "vanilla",
    pb.MEMORY_POLICY_FIFO: "fifo",
    pb.MEMORY_POLICY_SPREAD: "spread",
}
POLICY_NUMBERS = {name: number for number, name in MEMORY_POLICIES.items()}
MASK_ENCODINGS = {
    pb.MASK_ENCODING_UNSPECIFIED: MaskEncoding.RLE,
    pb.MASK_ENCODING_RLE: MaskEncoding.RLE,
    pb.MASK_ENCODING_PACKED_BITS: MaskEncoding.PACKED_BITS,
}
ENCODING_NUMBERS = {
    MaskEncoding.RLE: pb.MASK_ENCODING_RLE,
    MaskEncoding.PACKED_BITS: pb.MASK_ENCODING_PACKED_BITS,
}
STATE_NUMBERS = {
    ObjectState.VISIBLE: pb.OBJECT_STATE_VISIBLE,
    ObjectState.OCCLUDED: pb.OBJECT_STATE_OCCLUDED,
    ObjectState.LOST: pb.OBJECT_STATE_LOST,
}
WARNING_REASONS = {
    FaultKind.GAP: pb.WARNING_REASON_FRAME_GAP,
    FaultKind.UNDECODABLE: pb.WARNING_REASON_UNDECODABLE,
    FaultKind.RESOLUTION_CHANGED: pb.WARNING_REASON_RESOLUTION_CHANGED,
}
DEFAULT_TIME_BASE = Fraction(1, 90_000)
SHUTTING_DOWN = "shutting_down"
"""Name of WARNING_REASON_SHUTTING_DOWN."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamSettings:
    """What a client asked for, checked, with the defaults filled in.

    Args:
        model: name, not yet looked up.
        memory: memory policy.
        is_live: delivery LATEST.
        video: what the payloads hold.
        time_base: seconds per tick of pts.
        mask_encoding: preferred coding.
        is_low_resolution: masks on the network's grid instead of source pixels.
        resolve_overlaps: one owner per pixel.
        max_objects: at once.
    """

    model: str
    memory: str
    is_live: bool
    video: VideoFormat
    time_base: Fraction
    mask_encoding: MaskEncoding
    is_low_resolution: bool
    resolve_overlaps: bool
    max_objects: int


def read_open_stream(
    message: pb.OpenStream, *, config: ServerConfig, default_model: str, default_memory: str
) -> StreamSettings:
    """Check the first message of a call and fill in the defaults.

    Raises:
        ContractError: a value that the contract does not have, or a size that is missing.
    """
    _check_enum("delivery", message.delivery, pb.Delivery.values())
    _check_enum("memory_policy", message.memory_policy, pb.MemoryPolicy.values())
    _check_enum("mask_encoding", message.mask_encoding, MASK_ENCODINGS)
    _check_enum("mask_resolution", message.mask_resolution, pb.MaskResolution.values())
    return StreamSettings(
        model=message.model or default_model,
        memory=MEMORY_POLICIES.get(message.memory_policy, default_memory),
        is_live=message.delivery != pb.DELIVERY_EVERY,
        video=_read_video_format(message.video, config.max_picture_pixels),
        time_base=_read_time_base(message.video),
        mask_encoding=MASK_ENCODINGS[message.mask_encoding],
        is_low_resolution=message.mask_resolution == pb.MASK_RESOLUTION_LOW,
        resolve_overlaps=message.resolve_overlaps,
        max_objects=min(message.max_objects or config.max_objects, config.max_objects),
    )


def _check_enum(field: str, value: int, known: object) -> None:
    if value not in known:  # type: ignore[operator]
        raise ContractError(f"OpenStream.{field} is {value}, which this server does not know: see trocar.v1")


def _read_video_format(message: pb.VideoFormat, max_pixels: int) -> VideoFormat:
    if message.codec not in CODECS:
        raise ContractError(
            f"OpenStream.video.codec is {message.codec}: expected H264_ANNEX_B (1), HEVC_ANNEX_B (2), "
            "JPEG (3), RGB24 (4) or NV12 (5)"
        )
    _check_enum("video.color_matrix", message.color_matrix, COLOR_MATRICES)
    codec = CODECS[message.codec]
    if codec.is_raw and not 0 < message.width_px * message.height_px <= max_pixels:
        raise ContractError(
            f"OpenStream.video is {message.width_px}x{message.height_px} {codec.value}: expected width_px "
            f"and height_px above 0 and, limit max_picture_pixels, at most {max_pixels} pixels in all"
        )
    return VideoFormat(
        codec=codec,
        width_px=message.width_px,
        height_px=message.height_px,
        color_matrix=COLOR_MATRICES[message.color_matrix],
        max_pixels=max_pixels,
    )


def _read_time_base(message: pb.VideoFormat) -> Fraction:
    if not message.HasField("time_base"):
        return DEFAULT_TIME_BASE
    numerator, denominator = message.time_base.numerator, message.time_base.denominator
    if not (numerator and denominator):
        raise ContractError(
            f"OpenStream.video.time_base is {numerator}/{denominator}: expected both above 0, such as 1/90000"
        )
    return Fraction(numerator, denominator)


def write_limits(config: ServerConfig) -> pb.Limits:
    """Write what the server admits."""
    return pb.Limits(
        max_streams=config.max_streams,
        max_objects=config.max_objects,
        max_message_bytes=config.max_message_bytes,
        max_picture_pixels=config.max_picture_pixels,
        max_objects_total=config.max_objects_total,
        max_prompts_per_s=config.max_prompts_per_s,
        max_idle_s=config.max_idle_s,
    )


def write_model_card(card: ModelCard) -> pb.ModelCard:
    """Write a model's short description."""
    return pb.ModelCard(
        name=card.name,
        weights_hash=card.weights_hash,
        runtime=card.runtime,
        input_size_px=card.input_size_px,
        classes=card.classes,
        memory_policies=[POLICY_NUMBERS[policy] for policy in card.policies if policy in POLICY_NUMBERS],
    )


def write_opened(
    stream_id: int, asked: pb.OpenStream, settings: StreamSettings, config: ServerConfig, card: ModelCard
) -> pb.TrackResponse:
    """Write the first answer of a call."""
    effective = pb.OpenStream()
    effective.CopyFrom(asked)
    effective.model = settings.model
    effective.delivery = pb.DELIVERY_LATEST if settings.is_live else pb.DELIVERY_EVERY
    effective.memory_policy = POLICY_NUMBERS.get(settings.memory, pb.MEMORY_POLICY_UNSPECIFIED)
    effective.mask_encoding = ENCODING_NUMBERS[settings.mask_encoding]
    effective.mask_resolution = (
        pb.MASK_RESOLUTION_LOW if settings.is_low_resolution else pb.MASK_RESOLUTION_SOURCE
    )
    effective.max_objects = settings.max_objects
    effective.video.time_base.numerator = settings.time_base.numerator
    effective.video.time_base.denominator = settings.time_base.denominator
    opened = pb.StreamOpened(
        stream_id=stream_id, settings=effective, limits=write_limits(config), model=write_model_card(card)
    )
    return pb.TrackResponse(stream_opened=opened)


def write_stage_times(stage_ns: dict[str, int]) -> pb.StageTimes:
    """Write a frame's durations; a stage that did not run took 0."""
    return pb.StageTimes(**{f"{stage}_ns": stage_ns.get(stage, 0) for stage in STAGES})


def write_masklet(
    masklet: Masklet, mask: BoolArray, preferred: MaskEncoding, width_px: int, height_px: int
) -> pb.Masklet:
    """Write one object.

    Args:
        masklet: everything but the mask's pixels.
        mask: bool [H, W] on the grid that the client wants.
        preferred: coding that the client wants.
        width_px: of the picture, which the box refers to.
        height_px: of the picture.
    """
    message = pb.Masklet(
        object_id=masklet.object_id,
        state=STATE_NUMBERS[masklet.state],
        mask=write_mask(encode_mask(mask, preferred)),
        predicted_iou=masklet.predicted_iou,
        presence=masklet.presence,
        class_name=masklet.class_name,
        class_probability=masklet.class_probability,
        frames_since_seen=masklet.frames_since_seen,
    )
    box = find_box(mask)
    if box is not None:
        scale_x, scale_y = width_px / mask.shape[1], height_px / mask.shape[0]
        message.box.x_min, message.box.x_max = box.x_min * scale_x, box.x_max * scale_x
        message.box.y_min, message.box.y_max = box.y_min * scale_y, box.y_max * scale_y
    return message


def write_mask(mask: EncodedMask) -> pb.Mask:
    """Write a coded mask."""
    return pb.Mask(
        width_px=mask.width_px,
        height_px=mask.height_px,
        encoding=ENCODING_NUMBERS[mask.encoding],
        data=mask.data,
    )


def write_rejection(
    prompt: pb.Prompt, reason: pb.RejectionReason.ValueType, message: str
) -> pb.TrackResponse:
    """Write that a prompt had no effect."""
    rejected = pb.PromptRejected(
        prompt_id=prompt.prompt_id,
        object_id=prompt.object_id,
        frame_id=prompt.frame_id,
        reason=reason,
        message=message,
    )
    return pb.TrackResponse(prompt_rejected=rejected)


def write_faults(faults: Sequence[Fault], lost_frame_ids: Sequence[int]) -> list[pb.TrackResponse]:
    """Write what was wrong with a packet; the last warning carries the frames lost by it."""
    responses = [write_warning(WARNING_REASONS[fault.kind], fault.message) for fault in faults]
    if responses:
        responses[-1].stream_warning.lost_frame_ids.extend(lost_frame_ids)
    return responses


def write_warning(
    reason: pb.WarningReason.ValueType, message: str, lost_frame_ids: Sequence[int] = ()
) -> pb.TrackResponse:
    """Write something that did not end the stream."""
    warning = pb.StreamWarning(reason=reason, message=message, lost_frame_ids=lost_frame_ids)
    return pb.TrackResponse(stream_warning=warning)


def name_warning(reason: pb.WarningReason.ValueType) -> str:
    """Name of a warning's reason for programs, such as "frame_gap"."""
    return pb.WarningReason.Name(reason).removeprefix("WARNING_REASON_").lower()


def write_keyframe_request(frame_id: int) -> pb.TrackResponse:
    """Write that the encoder should send a keyframe."""
    return pb.TrackResponse(keyframe_request=pb.KeyframeRequest(frame_id=frame_id))
