from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from trocar.paced import PaceClock, PacedSource
from trocar.sources import open_source


def write_video(path: Path, codec: str, frames: int = 5) -> list[np.ndarray]:
    pictures = []
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 30)
        stream.options = {"tune": "zerolatency", "crf": "12"} if codec.startswith("lib") else {}
        for index in range(frames):
            picture = np.full((64, 96, 3), 40 + 30 * index, dtype=np.uint8)
            picture[:, : 10 + 10 * index] = 230
            pictures.append(picture)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return pictures


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_every_frame_comes_with_its_picture(tmp_path: Path, codec: str) -> None:
    """The overlay is drawn on it: a source that yields none gives a black film with outlines."""
    path = tmp_path / "clip.mp4"
    pictures = write_video(path, codec)
    source = open_source(str(path))
    frames = list(source.read())
    source.close()
    assert len(frames) == len(pictures)
    for frame, expected in zip(frames, pictures, strict=True):
        assert frame.rgb is not None
        assert np.abs(frame.rgb.astype(int) - expected).mean() < 8


def test_paced_source_delivers_on_an_absolute_schedule(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, "libx264")
    now_s, slept = 0.0, []

    def sleep(seconds: float) -> None:
        nonlocal now_s
        slept.append(round(seconds, 6))
        now_s += seconds

    source = PacedSource(open_source(str(path)), 10.0, PaceClock(now_s=lambda: now_s, sleep=sleep))
    for index, _ in enumerate(source.read()):
        now_s += 0.25 if index == 1 else 0.02  # one frame takes long: the next is late, none is skipped
    source.close()
    assert slept == [0.08, 0.01]
