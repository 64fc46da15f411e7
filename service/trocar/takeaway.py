"""What a surgeon takes home, on request only: packets and masklets kept while recording, files afterwards."""

import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

from trocar.client_core import PromptAccepted, Result
from trocar.decode import Codec, Packet, PacketDecoder, VideoFormat
from trocar.errors import ResultError
from trocar.sources import LARGEST_PICTURE_PX
from trocar.writer import Header, ResultWriter

MOST_UNANSWERED_FRAMES = 60
"""At the end of a recording, whose results are still on their way; after more of them there was no server."""
MOST_BYTES = 1 << 30
"""Kept in memory, since nothing may lie on a disk unasked: half an hour at 4 Mbit/s."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedFrame:
    """One frame as the page saw it.

    Args:
        frame_id: its number.
        pts: in ticks of the recording's time base.
        payload: H.264 access unit or JPEG.
    """

    frame_id: int
    pts: int
    payload: bytes


@dataclass(kw_only=True)
class Recording:
    """From the first keyframe after the request to the last frame that was answered before its end.

    Args:
        codec: of the payloads.
        label: what the user calls the source.
        model: that tracks.
        memory: its policy.
        time_base: seconds per tick of pts.
    """

    codec: Codec
    label: str
    model: str
    memory: str
    time_base: Fraction
    size_bytes: int = 0
    _frames: list[RecordedFrame] = field(default_factory=list)
    _results: dict[int, Result] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        """How many are written."""
        last = max(self._results, default=-1)
        unanswered = sum(frame.frame_id > last for frame in self._frames)
        return len(self._frames) - (unanswered if unanswered <= MOST_UNANSWERED_FRAMES else 0)

    @property
    def is_full(self) -> bool:
        """Whether no more should be added."""
        return self.size_bytes >= MOST_BYTES

    def add_frame(self, frame: RecordedFrame, *, is_keyframe: bool) -> None:
        """Keep a frame, unless decoding cannot start with it."""
        if self._frames or is_keyframe:
            self._frames.append(frame)
            self.size_bytes += len(frame.payload)

    def add_result(self, result: Result) -> None:
        """Keep a result, if its frame is kept."""
        if self._frames and result.frame_id >= self._frames[0].frame_id:
            self._results[result.frame_id] = result
            self.size_bytes += sum(len(one.encoded_mask.data) for one in result.objects)

    def add_prompted(self, accepted: PromptAccepted) -> None:
        """Put a prompted object into its frame's result, which was sent before the prompt took effect."""
        result = self._results.get(accepted.frame_id)
        if result is not None:
            others = tuple(one for one in result.objects if one.object_id != accepted.tracked.object_id)
            self._results[accepted.frame_id] = replace(result, objects=(*others, accepted.tracked))

    def write(self, folder: Path, names: Mapping[int, str], on_progress: Callable[[int, int], None]) -> Path:
        """Write DAVIS masks, COCO JSON, result JSON and the overlay video, as one archive.

        Args:
            folder: an existing one, for the archive.
            names: what the surgeon calls the objects.
            on_progress: called with the frames done and the frames in all.

        Raises:
            ResultError: there is nothing to write, or no room.
        """
        if not self._frames:
            raise ResultError("nothing was recorded: record for a second at least")
        # Without a mask a frame whose result is on its way would read as "not there".
        written = self._frames[: self.frames]
        decoder = PacketDecoder(VideoFormat(codec=self.codec, max_pixels=LARGEST_PICTURE_PX))
        first = next(iter(self._results.values()), None)
        header = Header(
            source=self.label,
            model=self.model,
            memory=self.memory,
            time_base=self.time_base,
            width_px=first.width_px if first else 16,
            height_px=first.height_px if first else 16,
        )
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            results = Path(scratch) / "trocar"
            with ResultWriter(results, header, coco_names=names) as writer:
                for index, frame in enumerate(written):
                    packet = Packet(frame_id=frame.frame_id, payload=frame.payload)
                    picture = decoder.decode(packet).picture
                    writer.add(
                        self._results.get(frame.frame_id),
                        frame_id=frame.frame_id,
                        pts=frame.pts,
                        rgb=None if picture is None else picture.rgb,
                    )
                    on_progress(index + 1, len(written))
                writer.commit({"frames": len(written)})
            return _pack(results, folder)


def _pack(results: Path, folder: Path) -> Path:
    """Everything in it is compressed already: stored as it is."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".zip", delete=False) as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for path in sorted(results.rglob("*")):
                    archive.write(path, path.relative_to(results.parent))
            return Path(file.name)
    except OSError as error:
        raise ResultError(f"the archive cannot be written: {error.strerror}") from error
