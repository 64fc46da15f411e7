"""`trocar demo`: a synthetic operation that nobody trained on, tracked through the service and scored."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from trocar.writer import write_paletted_png
from trocar_bench.jf import MaskletScore
from trocar_engines.masklets import UInt8Array
from trocar_engines.training.scenes import demo_scene

WIDTH_PX, HEIGHT_PX = 1280, 720
FRAME_RATE_HZ = 30
FRAMES = 600
FRAMES_AT_LEAST = 300
"""Ten seconds: time for an instrument to leave and come back."""
KEYFRAME_EVERY = 60
SETTLED_SHARE = 0.9
"""An identity is kept if so large a share of an object's visible frames overlaps its own truth most."""


@dataclass(frozen=True, kw_only=True)
class DemoClip:
    """A rendered clip on disk.

    Args:
        video: H.264 without B-frames, as a live encoder sends it.
        truth: folder of paletted PNGs, NNNNN.png; ids 1 and 2 are the instruments.
        clicks: (x, y) on each instrument on frame 0, in pixels.
        classes: of the instruments.
        frames: how many.
    """

    video: Path
    truth: Path
    clicks: tuple[tuple[int, int], ...]
    classes: tuple[str, ...]
    frames: int


@dataclass(frozen=True, kw_only=True)
class DemoScore:
    """How the tracker did.

    Args:
        jf: J&F over frames on which the object is visible, mean of the objects, 0 to 100.
        absent_ok: share of frames on which an absent object has an empty mask.
        id_kept: whether each object, whenever visible, was found under its own id.
        jf_per_object: by object id.
    """

    jf: float
    absent_ok: float
    id_kept: bool
    jf_per_object: dict[int, float]


def render_demo(folder: Path, *, frames: int = FRAMES, on_frame: Callable[[int], None]) -> DemoClip:
    """Render the clip and its truth; `on_frame` is called with the number of frames done.

    Args:
        folder: is made; receives `demo.mp4` and `truth/`.
        frames: length.
        on_frame: for progress.
    """
    truth = folder / "truth"
    truth.mkdir(parents=True, exist_ok=True)
    scene = demo_scene(height_px=HEIGHT_PX, width_px=WIDTH_PX, frames=frames, frame_rate=float(FRAME_RATE_HZ))
    video = folder / "demo.mp4"
    with av.open(str(video), "w") as container:
        stream = container.add_stream("libx264", rate=FRAME_RATE_HZ)
        stream.width, stream.height, stream.pix_fmt = WIDTH_PX, HEIGHT_PX, "yuv420p"
        stream.codec_context.time_base = Fraction(1, FRAME_RATE_HZ)
        # What a live encoder is set to: no B-frames, which would hold pictures back.
        stream.codec_context.gop_size = KEYFRAME_EVERY
        stream.options = {"preset": "veryfast", "tune": "zerolatency", "crf": "20"}
        for index in range(frames):
            image, labels = scene.render(index)
            write_paletted_png(truth / f"{index:05d}.png", labels.numpy())
            picture = av.VideoFrame.from_ndarray(image.numpy(), format="rgb24")
            picture.pts = index
            container.mux(stream.encode(picture))
            on_frame(index + 1)
        container.mux(stream.encode(None))
    return DemoClip(
        video=video, truth=truth, clicks=scene.first_clicks(), classes=tuple(scene.classes), frames=frames
    )


def score_demo(clip: DemoClip, masks: Path) -> DemoScore:
    """Compare the masks of a run with the truth.

    Args:
        clip: as rendered.
        masks: folder of paletted PNGs, one per frame.
    """
    object_ids = range(1, len(clip.clicks) + 1)
    scores = {object_id: MaskletScore() for object_id in object_ids}
    found, visible = Counter[int](), Counter[int]()
    absent = empty = 0
    for index, (predicted, truth) in enumerate(_label_pairs(clip, masks)):
        for object_id in object_ids:
            mask, expected = predicted == object_id, truth == object_id
            if not expected.any():
                absent += 1
                empty += not mask.any()
                continue
            scores[object_id].add(index, mask, expected)
            if index:
                overlaps = [np.count_nonzero(mask & (truth == other)) for other in object_ids]
                found[object_id] += 0 < overlaps[object_id - 1] == max(overlaps)
                visible[object_id] += 1
    per_object = {object_id: score.jf for object_id, score in scores.items()}
    return DemoScore(
        jf=round(float(np.mean(list(per_object.values()))), 2),
        absent_ok=round(empty / absent, 4) if absent else 1.0,
        id_kept=all(found[object_id] >= SETTLED_SHARE * visible[object_id] for object_id in object_ids),
        jf_per_object={object_id: round(jf, 2) for object_id, jf in per_object.items()},
    )


def _label_pairs(clip: DemoClip, masks: Path) -> Iterator[tuple[UInt8Array, UInt8Array]]:
    for index in range(clip.frames):
        name = f"{index:05d}.png"
        yield _read_labels(masks / name), _read_labels(clip.truth / name)


def _read_labels(path: Path) -> npt.NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image, dtype=np.uint8)
