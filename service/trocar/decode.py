"""Packet to picture: one decoder per stream.

Measured (PyAV 18, 2 cores, 1080p H.264): slice threading 320 to 355 frames/s with no frame held back; frame
threading holds one back and deadlocks the process when dropped with frames in flight.
"""

import enum
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import av
import av.error
import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from trocar import annexb
from trocar.errors import ContractError
from trocar_engines.masklets import UInt8Array

PACKETS_BEFORE_MISMATCH = 30
"""So many packets in a row that cannot be of the stated codec end the stream."""
PACKETS_BETWEEN_KEYFRAME_REQUESTS = 30
"""A second at the usual frame rate: long enough for an encoder to answer."""
DECODER_THREADS = 2
JPEG_END = b"\xff\xd9"


class Codec(enum.Enum):
    """Format of a frame's payload."""

    H264 = "H.264 Annex B"
    HEVC = "HEVC Annex B"
    JPEG = "JPEG"
    RGB24 = "RGB24"
    NV12 = "NV12"

    @property
    def is_inter_coded(self) -> bool:
        """Whether a frame needs the frames before it."""
        return self in (Codec.H264, Codec.HEVC)

    @property
    def is_raw(self) -> bool:
        """Whether width and height must be told."""
        return self in (Codec.RGB24, Codec.NV12)


class ColorMatrix(enum.Enum):
    """How NV12 becomes RGB; the values are swscale's names."""

    BT601 = "ITU601"
    BT709 = "ITU709"


class FaultKind(enum.Enum):
    """What can be wrong with a packet."""

    GAP = "gap"
    UNDECODABLE = "undecodable"
    RESOLUTION_CHANGED = "resolution changed"


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoFormat:
    """What the payloads of a stream hold.

    Args:
        codec: the format.
        width_px: raw formats only.
        height_px: raw formats only.
        color_matrix: NV12 only.
        max_pixels: width times height of the largest picture admitted.
    """

    codec: Codec
    width_px: int = 0
    height_px: int = 0
    color_matrix: ColorMatrix = ColorMatrix.BT601
    max_pixels: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Packet:
    """One frame as it came.

    Args:
        frame_id: the client's number.
        payload: coded or raw pixels.
        width_px: raw formats, from this frame on; 0 leaves it.
        height_px: raw formats, from this frame on; 0 leaves it.
    """

    frame_id: int
    payload: bytes
    width_px: int = 0
    height_px: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodedPicture:
    """A picture in source pixels.

    Args:
        width_px: of the picture.
        height_px: of the picture.
        convert: to uint8 [H, W, 3].
        is_trusted: False when the packet, or one that it depends on, was damaged or missing.
    """

    width_px: int
    height_px: int
    convert: Callable[[], UInt8Array]
    is_trusted: bool

    @cached_property
    def rgb(self) -> UInt8Array:
        """Pixels, uint8 [H, W, 3]; may be read-only and borrowed from the packet. Converted when first asked
        for: a picture that is only there for the ones after it costs its decoding alone.
        """
        return self.convert()


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something wrong that the client should hear of."""

    kind: FaultKind
    message: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Decoded:
    """What came of one packet.

    Args:
        picture: None when the packet gave none.
        faults: what was wrong.
        needs_keyframe: ask the encoder for one now.
    """

    picture: DecodedPicture | None
    faults: tuple[Fault, ...] = ()
    needs_keyframe: bool = False


class PacketDecoder:
    """Turns the packets of one stream into pictures and says which of them to trust.

    Not thread safe. Drop it without ceremony: it holds no frame back.
    """

    def __init__(self, video: VideoFormat) -> None:
        self._codec = video.codec
        self._decode_pixels = _open_coder(video)
        self._last_frame_id: int | None = None
        self._last_size: tuple[int, int] | None = None
        self._is_trusted = True
        self._pictureless = 0
        self._misfits = 0
        self._packets_to_next_request = 0

    def decode(self, packet: Packet) -> Decoded:
        """Decode the stream's next packet.

        Raises:
            ContractError: packet after packet is not of the stated codec, or the stream has B-frames.
        """
        faults = self._find_gap(packet.frame_id)
        picture: DecodedPicture | None = None
        try:
            pixels = self._decode_pixels(packet)
        except _BadPacketError as error:
            self._count_misfit(packet, error)
            self._is_trusted = False
            faults.append(Fault(kind=FaultKind.UNDECODABLE, message=f"frame {packet.frame_id}: {error}"))
        else:
            self._pictureless = self._misfits = 0
            picture = self._judge(packet.frame_id, pixels, faults)
        return Decoded(picture=picture, faults=tuple(faults), needs_keyframe=self._wants_keyframe())

    def skip(self, last_frame_id: int) -> bool:
        """Pass over packets without decoding them; what depends on them is not trusted.

        Returns:
            Whether to ask the encoder for a keyframe now.
        """
        self._last_frame_id = last_frame_id
        if self._codec.is_inter_coded:
            self._is_trusted = False
        return self._wants_keyframe()

    def _find_gap(self, frame_id: int) -> list[Fault]:
        previous, self._last_frame_id = self._last_frame_id, frame_id
        if not self._codec.is_inter_coded or previous is None or frame_id == previous + 1:
            return []
        self._is_trusted = False
        missing = "frame {0} is" if frame_id == previous + 2 else "frames {0} to {1} are"
        message = (
            missing.format(previous + 1, frame_id - 1) + " missing: results are untrusted until a keyframe"
        )
        return [Fault(kind=FaultKind.GAP, message=message)]

    def _judge(self, frame_id: int, pixels: "_Pixels", faults: list[Fault]) -> DecodedPicture:
        if pixels.damage is not None:
            self._is_trusted = False
            faults.append(Fault(kind=FaultKind.UNDECODABLE, message=f"frame {frame_id}: {pixels.damage}"))
        elif pixels.is_keyframe:
            self._is_trusted = True
        picture = DecodedPicture(
            width_px=pixels.width_px,
            height_px=pixels.height_px,
            convert=pixels.convert,
            is_trusted=self._is_trusted,
        )
        size, previous = (picture.width_px, picture.height_px), self._last_size
        self._last_size = size
        if previous is not None and size != previous:
            change = f"{size[0]}x{size[1]} from frame {frame_id} on, {previous[0]}x{previous[1]} before"
            faults.append(Fault(kind=FaultKind.RESOLUTION_CHANGED, message=f"the picture is {change}"))
        return picture

    def _wants_keyframe(self) -> bool:
        """Ask when trust is lost, then again from time to time, not on every packet."""
        if self._is_trusted or not self._codec.is_inter_coded:
            self._packets_to_next_request = 0
            return False
        is_due = self._packets_to_next_request == 0
        self._packets_to_next_request = (
            PACKETS_BETWEEN_KEYFRAME_REQUESTS if is_due else self._packets_to_next_request
        ) - 1
        return is_due

    def _count_misfit(self, packet: Packet, error: "_BadPacketError") -> None:
        self._pictureless += 1
        self._misfits += error.is_misfit
        # Mostly misfits: now and then a packet of one codec passes for one of another. None of them is what
        # a stream joined between two keyframes looks like, which may wait as long as it takes.
        if self._pictureless >= PACKETS_BEFORE_MISMATCH and 2 * self._misfits > self._pictureless:
            raise ContractError(
                f"{self._pictureless} frames in a row are not {self._codec.value}: frame {packet.frame_id}: "
                f"{error}; name the format that you send in OpenStream.video"
            )


def is_entry_point(codec: Codec, payload: bytes) -> bool:
    """Tell, without decoding, whether decoding can start at this packet."""
    if codec is Codec.H264:
        return not annexb.H264_KEY_TYPES.isdisjoint(annexb.list_h264_types(payload))
    if codec is Codec.HEVC:
        return not annexb.HEVC_KEY_TYPES.isdisjoint(annexb.list_hevc_types(payload))
    return True


def describe_payload(payload: bytes) -> str:
    """Say what a payload looks like, for messages."""
    if not payload:
        return "an empty payload"
    begins = f"{len(payload)} bytes beginning with {payload[:4].hex(' ')}"
    if payload.startswith(b"\xff\xd8\xff"):
        return f"{begins} (a JPEG)"
    if payload.startswith(b"\x89PNG"):
        return f"{begins} (a PNG)"
    if payload.startswith((annexb.START_CODE, b"\x00" + annexb.START_CODE)):
        if annexb.HEVC_SLICE_TYPES & annexb.list_hevc_types(payload):
            return f"{begins} (HEVC Annex B)"
        if annexb.H264_SLICE_TYPES & annexb.list_h264_types(payload):
            return f"{begins} (H.264 Annex B)"
        return f"{begins} (Annex B without a picture)"
    if int.from_bytes(payload[:4], "big") == len(payload) - 4:
        return f"{begins} (a length-prefixed access unit as in MP4; Annex B has start codes instead)"
    return begins


class _BadPacketError(Exception):
    """A packet that gives no picture; `is_misfit` when it cannot be of the stated codec at all."""

    def __init__(self, message: str, *, is_misfit: bool) -> None:
        super().__init__(message)
        self.is_misfit = is_misfit


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Pixels:
    width_px: int
    height_px: int
    convert: Callable[[], UInt8Array]
    is_keyframe: bool = True
    damage: str | None = None


class _Coder(Protocol):
    def __call__(self, packet: Packet) -> _Pixels: ...


def _open_coder(video: VideoFormat) -> _Coder:
    if video.codec.is_inter_coded:
        return _InterCoder(video)
    return _JpegCoder(video) if video.codec is Codec.JPEG else _RawCoder(video)


class _InterCoder:
    """H.264 and HEVC through FFmpeg."""

    def __init__(self, video: VideoFormat) -> None:
        self._video = video
        self._is_started = False
        self._packets = 0
        context = av.CodecContext.create("h264" if video.codec is Codec.H264 else "hevc", "r")
        assert isinstance(context, av.VideoCodecContext)
        context.thread_type = "SLICE"
        context.thread_count = DECODER_THREADS
        # Before the decoder allocates; twice, since it rounds up to whole blocks before it crops.
        context.options = {"max_pixels": str(2 * video.max_pixels)}
        if video.codec is Codec.HEVC:
            # Without this the HEVC decoder conceals a truncated packet and says nothing. The H.264 decoder
            # flags it and still gives the picture, which is better to track than none.
            context.options |= {"err_detect": "explode"}
        self._context = context

    def __call__(self, packet: Packet) -> _Pixels:
        self._check(packet.payload)
        frame = self._find_frame(packet.payload)
        _check_pixels(frame.width, frame.height, self._video.max_pixels)
        damage = "the packet is truncated or garbled" if frame.is_corrupt else None
        return _Pixels(
            width_px=frame.width,
            height_px=frame.height,
            convert=lambda: _as_uint8(frame.to_ndarray(format="rgb24")),
            is_keyframe=bool(frame.key_frame),
            damage=damage,
        )

    def _check(self, payload: bytes) -> None:
        if not payload:
            # To FFmpeg an empty packet is the end of the stream.
            raise _BadPacketError("the payload is empty", is_misfit=True)
        if self._video.codec is Codec.H264:
            has_slice = bool(annexb.H264_SLICE_TYPES & annexb.list_h264_types(payload))
        else:
            has_slice = bool(annexb.HEVC_SLICE_TYPES & annexb.list_hevc_types(payload))
        if not has_slice:
            message = (
                f"expected an access unit of {self._video.codec.value}, received {describe_payload(payload)}"
            )
            raise _BadPacketError(message, is_misfit=True)
        if not self._is_started and not is_entry_point(self._video.codec, payload):
            raise _BadPacketError("no keyframe has come yet: begin the stream with one", is_misfit=False)

    def _find_frame(self, payload: bytes) -> av.VideoFrame:
        self._packets += 1
        coded = av.Packet(payload)
        coded.pts = self._packets
        try:
            frames = self._context.decode(coded)
        except av.error.EOFError:
            self._context.flush_buffers()
            frames = []
        except av.error.FFmpegError as error:
            _check_pixels(self._context.width, self._context.height, self._video.max_pixels)
            raise _BadPacketError(f"the packet is garbled ({error.strerror})", is_misfit=False) from error
        if self._context.has_b_frames:
            raise ContractError(
                "the stream has B-frames, which hold pictures back: encode without them "
                "(x264 and x265: bframes=0 or tune=zerolatency)"
            )
        # After an error the HEVC decoder hands out the broken picture late: it is not this packet's.
        for frame in frames:
            if frame.pts == self._packets:
                self._is_started = True
                return frame
        raise _BadPacketError(
            "the packet gave no picture: one that it depends on is missing", is_misfit=False
        )


class _JpegCoder:
    """JPEG files."""

    def __init__(self, video: VideoFormat) -> None:
        self._video = video

    def __call__(self, packet: Packet) -> _Pixels:
        payload = packet.payload
        try:
            with Image.open(io.BytesIO(payload), formats=["JPEG"]) as header:
                width_px, height_px = header.size
        except (OSError, SyntaxError, ValueError) as error:
            message = f"expected a JPEG, received {describe_payload(payload)}"
            raise _BadPacketError(message, is_misfit=True) from error
        _check_pixels(width_px, height_px, self._video.max_pixels)
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        rgb = cv2.imdecode(np.frombuffer(payload, np.uint8), flags)
        if rgb is None:
            raise _BadPacketError("the JPEG is truncated or garbled", is_misfit=False)
        # Depending on where it ends, libjpeg fills what is missing with grey and says nothing. Cameras pad
        # with zeros.
        is_whole = payload.rstrip(b"\x00").endswith(JPEG_END)
        return _hold(_as_uint8(rgb), damage=None if is_whole else "the JPEG is truncated")


class _RawCoder:
    """RGB24 and NV12."""

    def __init__(self, video: VideoFormat) -> None:
        self._video = video
        self._width_px = video.width_px
        self._height_px = video.height_px

    def __call__(self, packet: Packet) -> _Pixels:
        self._width_px = packet.width_px or self._width_px
        self._height_px = packet.height_px or self._height_px
        width_px, height_px = self._width_px, self._height_px
        _check_pixels(width_px, height_px, self._video.max_pixels)
        is_rgb = self._video.codec is Codec.RGB24
        expected = width_px * height_px * 3 if is_rgb else width_px * height_px * 3 // 2
        if len(packet.payload) != expected or (not is_rgb and (width_px % 2 or height_px % 2)):
            raise _BadPacketError(
                f"a {width_px}x{height_px} {self._video.codec.value} frame has {expected} bytes and, in "
                f"NV12, even width and height; received {len(packet.payload)} bytes",
                is_misfit=True,
            )
        flat = np.frombuffer(packet.payload, np.uint8)
        if is_rgb:
            return _hold(flat.reshape(height_px, width_px, 3))
        frame = av.VideoFrame.from_ndarray(flat.reshape(height_px * 3 // 2, width_px), format="nv12")
        rgb = frame.to_ndarray(format="rgb24", src_colorspace=self._video.color_matrix.value)
        return _hold(_as_uint8(rgb))


def _hold(rgb: UInt8Array, *, damage: str | None = None) -> _Pixels:
    height_px, width_px, _ = rgb.shape
    return _Pixels(width_px=width_px, height_px=height_px, convert=lambda: rgb, damage=damage)


def _check_pixels(width_px: int, height_px: int, max_pixels: int) -> None:
    if width_px * height_px > max_pixels:
        message = (
            f"limit max_picture_pixels: the picture has {width_px}x{height_px}, expected at most {max_pixels}"
        )
        raise _BadPacketError(message, is_misfit=True)


def _as_uint8(pixels: npt.NDArray[np.generic]) -> UInt8Array:
    assert pixels.dtype == np.uint8
    return pixels.view(np.uint8)
