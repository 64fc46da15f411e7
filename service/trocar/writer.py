"""Results to files: DAVIS masks, an overlay video, JSON, and COCO JSON on request. Complete, or not there."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import av
import av.error
import cv2
import numpy as np
from av.container import OutputContainer
from PIL import Image

from trocar.client_core import Result, TrackedObject
from trocar.errors import ResultError
from trocar.overlay import draw_overlay
from trocar_engines.masklets import BoolArray, UInt8Array

MASKS_FOLDER = "masks"
OVERLAY_FILE = "overlay.mp4"
JSON_FILE = "result.json"
COCO_FILE = "coco.json"
OWN_NAMES = frozenset({MASKS_FOLDER, OVERLAY_FILE, JSON_FILE, COCO_FILE})
LARGEST_PNG_ID = 255
PALETTE_COLORS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What is known of the run before its first frame.

    Args:
        source: what the user called the input.
        model: that tracks.
        memory: its memory policy.
        time_base: seconds per tick of pts.
        width_px: of the input, for frames that come without a picture.
        height_px: of the input.
    """

    source: str
    model: str
    memory: str
    time_base: Fraction
    width_px: int
    height_px: int


class ResultWriter:
    """Writes DIR/masks/NNNNN.png, DIR/overlay.mp4 and DIR/result.json, one input frame after another.

    Everything goes into a hidden folder beside DIR and moves there in `commit`. As a context manager it
    throws away what was not committed.

    Args:
        folder: DIR.
        header: for the JSON.
        coco_names: adds DIR/coco.json; what people call each object, by object_id, as far as they do. None
            adds nothing.

    Raises:
        ResultError: DIR cannot be written, or holds something that is not ours.
    """

    def __init__(self, folder: Path, header: Header, *, coco_names: Mapping[int, str] | None = None) -> None:
        folder = folder.resolve()
        self._folder = folder
        self._frames = 0
        self._last_rgb: UInt8Array = np.zeros((header.height_px, header.width_px, 3), np.uint8)
        self._overlay: _Overlay | None = None
        self._time_base = header.time_base
        check_result_folder(folder)
        with self._explain_failure():
            folder.parent.mkdir(parents=True, exist_ok=True)
            self._partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-partial-", dir=folder.parent))
            # mkdtemp makes it private; results are as readable as anything else that the user writes.
            self._partial.chmod(0o755)
            (self._partial / MASKS_FOLDER).mkdir()
            self._json = _JsonFrames((self._partial / JSON_FILE).open("w", encoding="utf-8"), header)
            self._coco: _CocoFrames | None = None
            if coco_names is not None:
                self._coco = _CocoFrames((self._partial / COCO_FILE).open("w", encoding="utf-8"), coco_names)

    def add(self, result: Result | None, *, frame_id: int, pts: int | None, rgb: UInt8Array | None) -> None:
        """Write one input frame.

        Args:
            result: None for a frame that was dropped or lost: its mask is empty.
            frame_id: of the frame.
            pts: in ticks of the header's time base.
            rgb: uint8 [H, W, 3]; None where there was no picture: the last one stands in.
        """
        if rgb is not None:
            self._last_rgb = rgb
        with self._explain_failure():
            self._write_mask(result)
            self._write_overlay(result, pts)
            self._json.add(result, frame_id=frame_id, pts=pts)
            if self._coco is not None:
                height_px, width_px = self._last_rgb.shape[:2]
                self._coco.add(result, self._frames, width_px, height_px)
        self._frames += 1

    def commit(self, summary: dict[str, Any]) -> None:
        """Finish the files and move them into place.

        Args:
            summary: more for the JSON.
        """
        with self._explain_failure():
            self._close(summary)
            former = self._partial.with_name(f"{self._partial.name}-former")
            if self._folder.exists():
                self._folder.rename(former)
            self._partial.rename(self._folder)
            shutil.rmtree(former, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(OSError, av.error.FFmpegError):
            self._close({})
        shutil.rmtree(self._partial, ignore_errors=True)

    def _write_mask(self, result: Result | None) -> None:
        height_px, width_px = self._last_rgb.shape[:2]
        if result is not None:
            height_px, width_px = result.height_px, result.width_px
        ids = paint_ids(result.objects if result is not None else (), width_px, height_px)
        write_paletted_png(self._partial / MASKS_FOLDER / f"{self._frames:05d}.png", ids)

    def _write_overlay(self, result: Result | None, pts: int | None) -> None:
        if result is None:
            picture = draw_overlay(self._last_rgb, (), note="no result for this frame")
        else:
            note = "" if result.is_trusted else "picture damaged: not trusted"
            picture = draw_overlay(self._last_rgb, result.objects, note=note)
        if self._overlay is None:
            height_px, width_px = picture.shape[:2]
            self._overlay = _Overlay(self._partial / OVERLAY_FILE, width_px, height_px, self._time_base)
        self._overlay.add(picture, pts)

    @contextmanager
    def _explain_failure(self) -> Iterator[None]:
        try:
            yield
        except (OSError, av.error.FFmpegError) as error:
            raise ResultError(f"{self._folder} cannot be written: {error.strerror}") from error

    def _close(self, summary: dict[str, Any]) -> None:
        if self._overlay is not None:
            self._overlay.close()
        self._json.close(summary)
        if self._coco is not None:
            self._coco.close()


def check_result_folder(folder: Path) -> None:
    """Make sure, before any work, that results may go there.

    Raises:
        ResultError: it is a file, or holds something that is not ours.
    """
    if folder.exists() and not folder.is_dir():
        raise ResultError(f"{folder} is a file: expected a folder to write results to")
    foreign = (
        sorted(path.name for path in folder.iterdir() if path.name not in OWN_NAMES)
        if folder.exists()
        else []
    )
    if foreign:
        raise ResultError(
            f"{folder} holds other files, such as {foreign[0]}: choose a new or an empty folder"
        )


def check_png_ids(object_ids: Sequence[int]) -> None:
    """Make sure, before any work, that object ids fit a paletted PNG.

    Raises:
        ResultError: one does not.
    """
    for object_id in object_ids:
        if not 1 <= object_id <= LARGEST_PNG_ID:
            raise ResultError(
                f"object {object_id} does not fit masks/*.png, whose pixels are object ids: expected 1 to "
                f"{LARGEST_PNG_ID}"
            )


def paint_ids(objects: Sequence[TrackedObject], width_px: int, height_px: int) -> UInt8Array:
    """Paint object ids where the masks are, which must not overlap: uint8 [H, W], 0 is background."""
    ids = np.zeros((height_px, width_px), np.uint8)
    for tracked in objects:
        if tracked.box is not None and tracked.mask.shape == ids.shape:
            ids[tracked.mask] = tracked.object_id
    return ids


def write_paletted_png(path: Path, ids: UInt8Array) -> None:
    """Write an index image with the DAVIS palette."""
    image = Image.fromarray(ids, mode="P")
    image.putpalette(davis_palette().tobytes())
    # Level 1 is 4x faster than the default and masks compress well anyway.
    image.save(path, compress_level=1)


def davis_palette() -> UInt8Array:
    """Make the palette of PASCAL VOC and DAVIS: uint8 [256, 3].

    The bits of an index, lowest first, go to R, G and B in turn, from their highest bits down.
    """
    index = np.arange(PALETTE_COLORS)
    palette = np.zeros((PALETTE_COLORS, 3), np.uint8)
    for bit in range(8):
        palette[:, bit % 3] |= ((index >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return palette


class _Overlay:
    """An H.264 file with one size, that of the first picture, rounded up to even numbers."""

    def __init__(self, path: Path, width_px: int, height_px: int, time_base: Fraction) -> None:
        self._width_px, self._height_px = width_px + width_px % 2, height_px + height_px % 2
        self._time_base = time_base
        self._first_pts: int | None = None
        self._last_pts = -1
        container = av.open(str(path), "w")
        assert isinstance(container, OutputContainer)
        self._container = container
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast", "crf": "22"})
        stream.width, stream.height, stream.pix_fmt = self._width_px, self._height_px, "yuv420p"
        stream.time_base = stream.codec_context.time_base = time_base
        self._stream = stream
        self._is_closed = False

    def add(self, rgb: UInt8Array, pts: int | None) -> None:
        height_px, width_px = rgb.shape[:2]
        if (width_px + width_px % 2, height_px + height_px % 2) != (self._width_px, self._height_px):
            rgb = cv2.resize(rgb, (self._width_px, self._height_px)).view(np.uint8)
        elif (width_px, height_px) != (self._width_px, self._height_px):
            padding = ((0, self._height_px - height_px), (0, self._width_px - width_px), (0, 0))
            rgb = np.pad(rgb, padding, mode="edge")
        frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
        if self._first_pts is None:
            self._first_pts = pts or 0
        self._last_pts = max(self._last_pts + 1, (pts or 0) - self._first_pts)
        frame.pts, frame.time_base = self._last_pts, self._time_base
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._container.mux(self._stream.encode(None))
        self._container.close()


class _JsonFrames:
    """A JSON object written piece by piece, so that hours of video need no memory."""

    def __init__(self, file: TextIO, header: Header) -> None:
        self._file = file
        self._separator = "\n"
        fields = {
            "source": header.source,
            "model": header.model,
            "memory": header.memory,
            "time_base": [header.time_base.numerator, header.time_base.denominator],
        }
        file.write(json.dumps(fields)[:-1] + ', "frames": [')

    def add(self, result: Result | None, *, frame_id: int, pts: int | None) -> None:
        fields: dict[str, Any] = {"frame_id": frame_id, "pts": pts, "is_answered": result is not None}
        if result is not None:
            fields["is_trusted"] = result.is_trusted
        fields["objects"] = [_describe_object(one) for one in result.objects] if result is not None else []
        self._file.write(self._separator + json.dumps(fields))
        self._separator = ",\n"

    def close(self, summary: dict[str, Any]) -> None:
        if self._file.closed:
            return
        self._file.write(f'\n], "summary": {json.dumps(summary)}}}\n')
        self._file.close()


class _CocoFrames:
    """COCO's object detection format, annotations written piece by piece; `track_id` is the object_id."""

    def __init__(self, file: TextIO, names: Mapping[int, str]) -> None:
        self._file = file
        self._names = names
        self._images: list[dict[str, Any]] = []
        self._categories: dict[str, int] = {}
        self._annotations = 0
        file.write('{"annotations": [')

    def add(self, result: Result | None, index: int, width_px: int, height_px: int) -> None:
        image_id = index + 1
        name = f"{MASKS_FOLDER}/{index:05d}.png"
        self._images.append({"id": image_id, "width": width_px, "height": height_px, "file_name": name})
        for tracked in result.objects if result is not None else ():
            if tracked.box is not None:
                self._add_object(tracked, image_id)

    def _add_object(self, tracked: TrackedObject, image_id: int) -> None:
        known_class = tracked.class_name if tracked.class_name != "unknown" else ""
        name = self._names.get(tracked.object_id) or known_class or "object"
        assert tracked.box is not None, "only what is seen is annotated"
        x_min, y_min, x_max, y_max = tracked.box
        fields = {
            "id": self._annotations + 1,
            "image_id": image_id,
            "category_id": self._categories.setdefault(name, len(self._categories) + 1),
            "track_id": tracked.object_id,
            "segmentation": {"size": list(tracked.mask.shape), "counts": count_column_runs(tracked.mask)},
            "area": int(tracked.mask.sum()),
            "bbox": [x_min, y_min, x_max - x_min, y_max - y_min],
            "iscrowd": 0,
            "score": round(tracked.predicted_iou, 4),
        }
        self._file.write((",\n" if self._annotations else "\n") + json.dumps(fields))
        self._annotations += 1

    def close(self) -> None:
        if self._file.closed:
            return
        categories = [{"id": number, "name": name} for name, number in self._categories.items()]
        self._file.write(f'\n], "images": {json.dumps(self._images)}, ')
        self._file.write(f'"categories": {json.dumps(categories)}}}\n')
        self._file.close()


def count_column_runs(mask: BoolArray) -> list[int]:
    """Count COCO's uncompressed run lengths: column by column, background first, which may be 0 long.

    Args:
        mask: bool [H, W], at least one pixel.
    """
    flat = np.ravel(mask, order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    ends = [0, *([0] if flat[0] else []), *changes.tolist(), flat.size]
    return np.diff(ends).tolist()


def _describe_object(tracked: TrackedObject) -> dict[str, Any]:
    return {
        "object_id": tracked.object_id,
        "state": tracked.state.value,
        "score": round(tracked.predicted_iou, 4),
        "presence": round(tracked.presence, 4),
        "box": None if tracked.box is None else [round(edge, 2) for edge in tracked.box],
        "class": tracked.class_name,
        "class_probability": round(tracked.class_probability, 4),
        "frames_since_seen": tracked.frames_since_seen,
    }
