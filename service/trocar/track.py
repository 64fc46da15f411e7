"""From an input to files, through a server: what `trocar track` does once everything is open."""

import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trocar.client import Client
from trocar.client_core import (
    Event,
    KeyframeWanted,
    Notice,
    Opened,
    PromptAccepted,
    PromptRejected,
    Request,
    Result,
    Resumed,
    StreamOptions,
)
from trocar.errors import ResultError, SourceError
from trocar.sources import Source, SourceFrame
from trocar.writer import Header, ResultWriter
from trocar_engines.masklets import Prompt

ReportProgress = Callable[[int], None]
"""Called with the number of frames written."""
ReportNotice = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackSummary:
    """What a run came to.

    Args:
        frames: written.
        dropped: for newer ones, by a live stream.
        lost: without a picture.
        untrusted: tracked, after damage or a gap and before the input's next keyframe.
        fps: frames written per second of the whole run.
        latency_p50_ms: service latency, median.
        latency_p99_ms: service latency, 99th percentile.
        model: that tracked.
    """

    frames: int
    dropped: int
    lost: int
    untrusted: int
    fps: float
    latency_p50_ms: float
    latency_p99_ms: float
    model: str


class TrackRun:
    """One input through one stream into one folder.

    Args:
        client: a connection.
        source: an opened input.
        label: what the user called it.
        prompts: to send right after their frames.
        options: of the stream.
    """

    def __init__(
        self,
        *,
        client: Client,
        source: Source,
        label: str,
        prompts: Sequence[Prompt],
        options: StreamOptions,
    ) -> None:
        _check_frames(source, prompts)
        self._client = client
        self._source = source
        self._label = label
        self._prompts = prompts
        self._options = options
        self._waiting: dict[int, SourceFrame] = {}
        self._results: dict[int, Result | None] = {}
        self._open_prompts = list(prompts)
        self._latencies_ns = array("Q")
        self._frames = self._dropped = self._lost = self._untrusted = 0
        self._is_stopped = False
        self._notify: ReportNotice = lambda _: None

    def stop(self) -> None:
        """Read no more of the input; what was read is still answered and written."""
        self._is_stopped = True

    def run(self, folder: Path, *, on_progress: ReportProgress, on_notice: ReportNotice) -> TrackSummary:
        """Track the whole input and write the results.

        Raises:
            SourceError: the input broke.
            ResultError: a prompt was refused, or results cannot be written.
            ConnectionFailedError: the server refused or vanished.
        """
        started_s = time.perf_counter()
        self._notify = on_notice
        with (
            self._client.open_stream(self._options) as stream,
            closing(stream.track(self._read_requests())) as events,
        ):
            opened = next(events)
            assert isinstance(opened, Opened)
            header = Header(
                source=self._label,
                model=opened.model,
                memory=opened.memory,
                time_base=self._source.time_base,
                width_px=self._source.width_px,
                height_px=self._source.height_px,
            )
            with ResultWriter(folder, header) as writer:
                for event in events:
                    self._take(event)
                    self._write_settled(writer)
                    on_progress(self._frames)
                self._settle_rest()
                self._write_settled(writer)
                summary = self._sum_up(opened.model, time.perf_counter() - started_s)
                writer.commit({"frames": summary.frames, "dropped": summary.dropped, "lost": summary.lost})
        return summary

    def _read_requests(self) -> Iterator[Request]:
        """Runs in the stream's sending thread."""
        for frame_id, source_frame in enumerate(self._read_source()):
            if self._is_stopped:
                break
            self._waiting[frame_id] = source_frame
            # Numbered here: a frame that a live stream does not send must leave a gap.
            yield replace(source_frame.frame, frame_id=frame_id)
            yield from (prompt for prompt in self._prompts if prompt.frame_id == frame_id)

    def _read_source(self) -> Iterator[SourceFrame]:
        """Read the input; a camera that hangs up or falls silent ends a recording, it does not undo it."""
        has_read = False
        try:
            for source_frame in self._source.read():
                has_read = True
                yield source_frame
        except SourceError as error:
            if not (self._source.is_live and has_read):
                raise
            self._notify(str(error))
        if self._source.is_live and not self._is_stopped:
            self._notify(f"{self._label} ended")

    def _take(self, event: Event) -> None:
        match event:
            case Result():
                self._latencies_ns.append(event.service_latency_ns)
                self._untrusted += not event.is_trusted
                self._results[event.frame_id] = event
                self._results |= dict.fromkeys(event.dropped_frame_ids)
                self._dropped += len(event.dropped_frame_ids)
            case Notice():
                self._results |= dict.fromkeys(event.lost_frame_ids)
                self._lost += len(event.lost_frame_ids)
                self._notify(event.message)
            case Resumed():
                self._take_resumption(event)
            case PromptAccepted():
                self._open_prompts.remove(event.prompt)
                self._add_prompted(event)
            case PromptRejected():
                prompt = event.prompt
                raise ResultError(
                    f"object {prompt.object_id}: prompt on frame {prompt.frame_id} refused: {event.message}"
                )
            case KeyframeWanted() | Opened():
                # Neither a recording nor a camera behind a URL makes a keyframe on demand: the next one that
                # it holds ends the distrust, and the notice before this request has told of it.
                pass

    def _take_resumption(self, resumed: Resumed) -> None:
        self._results |= dict.fromkeys(resumed.lost_frame_ids)
        self._lost += len(resumed.lost_frame_ids)
        self._notify(
            f"{resumed.address} took the stream up after {resumed.outage_s:.2f} s: "
            f"{len(resumed.lost_frame_ids)} frames lost, {resumed.unsent_frames} not sent"
        )
        if resumed.lost_object_ids:
            lost = ", ".join(map(str, resumed.lost_object_ids))
            self._notify(f"not seen recently enough to be taken up again: object {lost}")

    def _add_prompted(self, accepted: PromptAccepted) -> None:
        """Put a prompted object into its frame's result, which was sent before the prompt took effect."""
        result = self._results.get(accepted.frame_id)
        if result is not None:
            others = tuple(one for one in result.objects if one.object_id != accepted.tracked.object_id)
            self._results[accepted.frame_id] = replace(result, objects=(*others, accepted.tracked))

    def _is_settled(self, frame_id: int) -> bool:
        is_prompted = any(prompt.frame_id == frame_id for prompt in self._open_prompts)
        return frame_id in self._results and frame_id in self._waiting and not is_prompted

    def _write_settled(self, writer: ResultWriter) -> None:
        while self._is_settled(frame_id := self._frames):
            source_frame = self._waiting.pop(frame_id)
            writer.add(
                self._results.pop(frame_id),
                frame_id=frame_id,
                pts=source_frame.frame.pts,
                rgb=source_frame.rgb,
            )
            self._frames += 1

    def _settle_rest(self) -> None:
        """Count as lost what was read and never answered, such as frames that a late server never got."""
        self._open_prompts.clear()
        for frame_id in self._waiting:
            if frame_id not in self._results:
                self._results[frame_id] = None
                self._lost += 1

    def _sum_up(self, model: str, seconds: float) -> TrackSummary:
        if not self._frames:
            raise SourceError(f"{self._label} has no frames that can be decoded")
        latencies_ms = np.asarray(self._latencies_ns) / 1e6
        p50, p99 = np.percentile(latencies_ms, [50, 99]) if latencies_ms.size else (0.0, 0.0)
        return TrackSummary(
            frames=self._frames,
            dropped=self._dropped,
            lost=self._lost,
            untrusted=self._untrusted,
            fps=round(self._frames / seconds, 2),
            latency_p50_ms=round(float(p50), 3),
            latency_p99_ms=round(float(p99), 3),
            model=model,
        )


def _check_frames(source: Source, prompts: Sequence[Prompt]) -> None:
    last = max(prompt.frame_id for prompt in prompts)
    if source.frame_count is not None and last >= source.frame_count:
        raise SourceError(
            f"--at {last}: the input has {source.frame_count} frames, 0 to {source.frame_count - 1}"
        )
