"""The built-in operation: a synthetic scene that plays for ever, to see how the screen works.

Ten seconds are rendered once, which takes a minute, and kept in the user's cache; they are shown to and fro,
since a cut would make the tracker lose its objects.
"""

import io
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from trocar.client_core import Frame
from trocar.decode import Codec, ColorMatrix
from trocar.errors import SourceError
from trocar.sources import SourceFrame
from trocar_engines.masklets import UInt8Array

WIDTH_PX, HEIGHT_PX = 1280, 720
FRAME_RATE_HZ = 30
SCENE_FRAMES = 300
"""The shortest in which the second instrument leaves the view and comes back."""
KEYFRAME_EVERY = 30
"""A second: for as long a viewer may wait after trouble."""
CACHE_FILE = f"operation-{WIDTH_PX}x{HEIGHT_PX}-{SCENE_FRAMES}.npz"
JPEG_QUALITY = 97
"""Of the pictures that wait for the way back: raw ones would take 0.8 GB."""

ReportProgress = Callable[[int, int], None]
"""Called with the frames done and the frames in all."""


class OperationSource:
    """Plays coded packets in an endless round; the first of them is a keyframe.

    Args:
        packets: H.264 access units in Annex B form.
        width_px: of the picture.
        height_px: of the picture.
        frame_rate_hz: how fast it plays.
    """

    def __init__(
        self,
        packets: tuple[bytes, ...],
        width_px: int = WIDTH_PX,
        height_px: int = HEIGHT_PX,
        frame_rate_hz: int = FRAME_RATE_HZ,
    ) -> None:
        self._packets = packets
        self.codec = Codec.H264
        self.width_px, self.height_px = width_px, height_px
        self.color_matrix = ColorMatrix.BT601
        self.time_base = Fraction(1, frame_rate_hz)
        self.frame_count: int | None = None
        self.is_live = False

    def read(self) -> Iterator[SourceFrame]:
        """Packets without pictures: whoever shows them decodes them."""
        pts = 0
        while True:
            for packet in self._packets:
                yield SourceFrame(frame=Frame(payload=packet, pts=pts), rgb=None)
                pts += 1

    def close(self) -> None:
        """Nothing is held open."""


def open_operation(cache: Path, on_progress: ReportProgress) -> OperationSource:
    """Open the built-in operation, rendering it when the cache lacks it.

    Args:
        cache: folder that keeps it.
        on_progress: called while it is rendered.

    Raises:
        SourceError: the cache cannot be written.
    """
    path = cache / CACHE_FILE
    packets = _load(path)
    if packets is None:
        packets = _encode(_render(on_progress))
        _save(path, packets)
    return OperationSource(packets)


def _render(on_progress: ReportProgress) -> Iterator[UInt8Array]:
    """Pictures of one round, uint8 [H, W, 3]: to the last one and back to the second."""
    from trocar_engines.training.scenes import demo_scene

    scene = demo_scene(
        height_px=HEIGHT_PX, width_px=WIDTH_PX, frames=SCENE_FRAMES, frame_rate=float(FRAME_RATE_HZ)
    )
    shelf: list[bytes] = []
    for index in range(SCENE_FRAMES):
        picture = scene.render(index)[0].numpy()
        yield picture
        shelf.append(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes())
        on_progress(index + 1, SCENE_FRAMES)
    for data in shelf[-2:0:-1]:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        assert decoded is not None, "coded just now"
        yield decoded.view(np.uint8)


def _encode(pictures: Iterator[UInt8Array]) -> tuple[bytes, ...]:
    context = av.CodecContext.create("libx264", "w")
    assert isinstance(context, av.VideoCodecContext)
    context.width, context.height, context.pix_fmt = WIDTH_PX, HEIGHT_PX, "yuv420p"
    context.framerate = Fraction(FRAME_RATE_HZ)
    context.time_base = 1 / context.framerate
    context.gop_size = KEYFRAME_EVERY
    # As a camera's encoder is set: no B-frames, which hold pictures back, and a size that a network carries.
    context.options = {"preset": "veryfast", "tune": "zerolatency", "crf": "22"}
    packets = []
    for pts, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts = pts
        packets += context.encode(frame)
    packets += context.encode(None)
    return tuple(bytes(packet) for packet in packets)


def _load(path: Path) -> tuple[bytes, ...] | None:
    try:
        with np.load(path) as kept:
            data, sizes = kept["data"].tobytes(), kept["sizes"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"{path} cannot be read: delete it, and it is rendered anew") from error
    ends = np.cumsum(sizes)
    return tuple(data[end - size : end] for size, end in zip(sizes.tolist(), ends.tolist(), strict=True))


def _save(path: Path, packets: tuple[bytes, ...]) -> None:
    """Write in one move, so that nobody ever reads half a file."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        data=np.frombuffer(b"".join(packets), np.uint8),
        sizes=np.array([len(packet) for packet in packets], np.int64),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as partial:
            partial.write(buffer.getvalue())
        Path(partial.name).replace(path)
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror}") from error
