"""INPUT of `trocar track`: a video file, an rtsp:// URL or a folder of frames, as frames to send.

H.264 and HEVC without B-frames travel as they are. Everything else is decoded here and travels as NV12 (RGB24
where width or height is odd): a decoder on a live server must not hold pictures back, which B-frames demand.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import av
import av.error
import cv2
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.container import InputContainer

from trocar import annexb
from trocar.client_core import Frame
from trocar.decode import Codec, ColorMatrix, Packet, PacketDecoder, VideoFormat
from trocar.errors import SourceError
from trocar_engines.masklets import UInt8Array

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
JPEG_SUFFIXES = frozenset({".jpg", ".jpeg"})
FOLDER_RATE = 25
"""A folder has no clock; what to assume, frames per second."""
ASSUMED_RATE = 30
"""Raw streams have no clock either."""
RTSP_TIMEOUT_US = 5_000_000
ANNEX_B_FILTERS = {"h264": "h264_mp4toannexb", "hevc": "hevc_mp4toannexb"}
INTER_CODECS = {"h264": Codec.H264, "hevc": Codec.HEVC}
H264_SPS = 7
HEVC_SPS = 33
LARGEST_PICTURE_PX = 1 << 28
"""More than any camera's; FFmpeg's own limit is a 31-bit number and is set to twice this."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SourceFrame:
    """One frame of the input.

    Args:
        frame: what to send.
        rgb: uint8 [H, W, 3], to draw on; None where the packet gives no picture.
    """

    frame: Frame
    rgb: UInt8Array | None


class Source(Protocol):
    """An opened input."""

    codec: Codec
    width_px: int
    height_px: int
    color_matrix: ColorMatrix
    time_base: Fraction
    frame_count: int | None
    is_live: bool

    def read(self) -> Iterator[SourceFrame]:
        """Read the frames in the order in which they are shown.

        Raises:
            SourceError: the input became unreadable.
        """

    def close(self) -> None:
        """Let go of the input."""


def open_source(text: str) -> Source:
    """Open an input.

    Raises:
        SourceError: it does not exist, is no video, or has no frames.
    """
    if text.startswith(("rtsp://", "rtsps://")):
        options = {"rtsp_transport": "tcp", "timeout": str(RTSP_TIMEOUT_US)}
        return _open_container(text, options=options, is_live=True)
    path = Path(text)
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise SourceError(
            f"{text} does not exist: expected a video file, a folder of frames or an rtsp:// URL"
        )
    return _open_container(text, options={}, is_live=False)


class FolderSource:
    """A folder of image files, sorted by name."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise SourceError(
                f"{folder} has no frames: expected image files ({', '.join(sorted(IMAGE_SUFFIXES))})"
            )
        self._paths = paths
        self.codec = (
            Codec.JPEG if all(path.suffix.lower() in JPEG_SUFFIXES for path in paths) else Codec.RGB24
        )
        self.height_px, self.width_px = _read_image(paths[0])[1].shape[:2]
        self.color_matrix = ColorMatrix.BT601
        self.time_base = Fraction(1, FOLDER_RATE)
        self.frame_count: int | None = len(paths)
        self.is_live = False

    def read(self) -> Iterator[SourceFrame]:
        """Read the images in order."""
        for index, path in enumerate(self._paths):
            data, rgb = _read_image(path)
            if self.codec is Codec.JPEG:
                frame = Frame(payload=data, pts=index)
            else:
                height_px, width_px = rgb.shape[:2]
                frame = Frame(payload=rgb.tobytes(), pts=index, width_px=width_px, height_px=height_px)
            yield SourceFrame(frame=frame, rgb=rgb)

    def close(self) -> None:
        """Nothing is held open."""


class CodedSource:
    """H.264 or HEVC whose packets travel as they are."""

    def __init__(self, container: InputContainer, scan: "_Scan", *, is_live: bool) -> None:
        self._container = container
        self._stream = container.streams.video[0]
        codec_context = self._stream.codec_context
        name = codec_context.name
        self.codec = INTER_CODECS[name]
        self.width_px, self.height_px = codec_context.width, codec_context.height
        self.color_matrix = ColorMatrix.BT601
        self.time_base = _find_time_base(self._stream)
        self.frame_count = scan.packets
        self.is_live = is_live
        self._filter = BitStreamFilterContext(ANNEX_B_FILTERS[name], self._stream)
        self._extradata = bytes(codec_context.extradata or b"")

    def read(self) -> Iterator[SourceFrame]:
        """Read the packets, with the picture that each of them gives."""
        # What the server will see; the picture is for drawing only, so its size is hardly limited here.
        video = VideoFormat(codec=self.codec, max_pixels=LARGEST_PICTURE_PX)
        decoder = PacketDecoder(video)
        clock = _Clock(self._stream)
        for index, packet in enumerate(self._read_packets()):
            payload = self._complete(bytes(packet), is_keyframe=packet.is_keyframe)
            picture = decoder.decode(Packet(frame_id=index, payload=payload)).picture
            frame = Frame(payload=payload, pts=clock.next(packet.pts))
            yield SourceFrame(frame=frame, rgb=None if picture is None else picture.rgb)

    def close(self) -> None:
        """Close the file or connection."""
        self._container.close()

    def _read_packets(self) -> "Iterator[av.Packet[av.VideoStream]]":
        for packet in _demux(self._container, self._stream):
            if packet.size:
                yield from self._filter.filter(packet)

    def _complete(self, payload: bytes, *, is_keyframe: bool) -> bytes:
        """Put the parameter sets before a keyframe that has none, as RTSP and some files leave them out."""
        if not is_keyframe or not self._extradata.startswith((b"\x00\x00\x01", b"\x00\x00\x00\x01")):
            return payload
        if self.codec is Codec.H264:
            has_parameters = H264_SPS in annexb.list_h264_types(payload)
        else:
            has_parameters = HEVC_SPS in annexb.list_hevc_types(payload)
        return payload if has_parameters else self._extradata + payload


class DecodedSource:
    """Any video that FFmpeg reads, decoded here."""

    def __init__(self, container: InputContainer, scan: "_Scan", *, is_live: bool) -> None:
        self._container = container
        self._stream = container.streams.video[0]
        # Slices only: a context with frame threads deadlocks when dropped with frames in flight.
        self._stream.thread_type = "SLICE"
        codec_context = self._stream.codec_context
        self.width_px, self.height_px = codec_context.width, codec_context.height
        is_even = self.width_px % 2 == 0 and self.height_px % 2 == 0
        self.codec = Codec.NV12 if is_even else Codec.RGB24
        is_bt709 = int(codec_context.colorspace) == int(av.video.reformatter.Colorspace.ITU709)
        self.color_matrix = ColorMatrix.BT709 if is_bt709 else ColorMatrix.BT601
        self.time_base = _find_time_base(self._stream)
        self.frame_count = None if scan.packets is None else scan.packets - scan.discarded
        self.is_live = is_live

    def read(self) -> Iterator[SourceFrame]:
        """Decode and read the pictures in the order in which they are shown."""
        clock = _Clock(self._stream)
        for packet in _demux(self._container, self._stream):
            for picture in _decode_leniently(packet):
                yield self._write(picture, clock.next(picture.pts))

    def close(self) -> None:
        """Close the file or connection."""
        self._container.close()

    def _write(self, picture: av.VideoFrame, pts: int) -> SourceFrame:
        # A source that changes size midway is brought to its first size: overlay and masks have one size too.
        width_px, height_px = self.width_px, self.height_px
        rgb = picture.to_ndarray(format="rgb24", width=width_px, height=height_px).view(np.uint8)
        if self.codec is Codec.RGB24:
            payload = rgb.tobytes()
        else:
            payload = picture.reformat(width_px, height_px, format="nv12").to_ndarray().tobytes()
        return SourceFrame(frame=Frame(payload=payload, pts=pts), rgb=rgb)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scan:
    """What the packets tell without decoding.

    Args:
        packets: how many; None for a live source.
        discarded: packets that an edit list hides.
        is_in_order: shown in the order in which they are coded.
    """

    packets: int | None
    discarded: int = 0
    is_in_order: bool = True


class _Clock:
    """Strictly increasing pts, also where the source has none or repeats them."""

    def __init__(self, stream: av.VideoStream) -> None:
        rate = stream.average_rate or Fraction(ASSUMED_RATE)
        self._ticks_per_frame = max(1, round(1 / (rate * _find_time_base(stream))))
        self._last: int | None = None

    def next(self, pts: int | None) -> int:
        earliest = 0 if self._last is None else self._last + 1
        if pts is None:
            pts = 0 if self._last is None else self._last + self._ticks_per_frame
        self._last = pts if self._last is None else max(pts, earliest)
        return self._last


def _open_container(text: str, *, options: dict[str, str], is_live: bool) -> Source:
    try:
        container = av.open(text, options=options, timeout=RTSP_TIMEOUT_US / 1e6 if is_live else None)
    except (av.error.FFmpegError, OSError) as error:
        raise SourceError(f"{text} cannot be read as video: {_describe(error)}") from error
    if not container.streams.video:
        container.close()
        raise SourceError(f"{text} has no video stream")
    scan = _Scan(packets=None) if is_live else _scan(text)
    if scan.packets == 0:
        container.close()
        raise SourceError(f"{text} has no frames")
    context = container.streams.video[0].codec_context
    is_plain = context.name in INTER_CODECS and not context.has_b_frames
    if is_plain and scan.is_in_order and not scan.discarded:
        return CodedSource(container, scan, is_live=is_live)
    return DecodedSource(container, scan, is_live=is_live)


def _scan(text: str) -> _Scan:
    """Read all packets without decoding: as fast as the disk."""
    packets = discarded = 0
    is_in_order, last_pts = True, None
    try:
        with av.open(text) as container:
            for packet in container.demux(container.streams.video[0]):
                if not packet.size:
                    continue
                packets += 1
                discarded += packet.is_discard
                is_in_order = is_in_order and (
                    last_pts is None or packet.pts is None or packet.pts > last_pts
                )
                last_pts = packet.pts if packet.pts is not None else last_pts
    except av.error.FFmpegError as error:
        raise SourceError(f"{text} cannot be read as video: {_describe(error)}") from error
    return _Scan(packets=packets, discarded=discarded, is_in_order=is_in_order)


def _demux(container: InputContainer, stream: av.VideoStream) -> "Iterator[av.Packet[av.VideoStream]]":
    try:
        yield from container.demux(stream)
    except av.error.FFmpegError as error:
        raise SourceError(f"{container.name} became unreadable: {_describe(error)}") from error


def _decode_leniently(packet: "av.Packet[av.VideoStream]") -> list[av.VideoFrame]:
    """Decode a packet; a damaged one gives nothing, as in every player."""
    try:
        return packet.decode()
    except av.error.FFmpegError:
        return []


def _find_time_base(stream: av.VideoStream) -> Fraction:
    return stream.time_base or Fraction(1, 90_000)


def _read_image(path: Path) -> tuple[bytes, UInt8Array]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    rgb = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    if rgb is None:
        raise SourceError(f"{path} is not a readable image")
    return data, rgb.view(np.uint8)


def _describe(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
