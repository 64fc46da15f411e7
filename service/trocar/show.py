"""One source on one page, tracked: from the page's words to requests, from events to the page's words."""

import asyncio
import secrets
import time
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, assert_never

from trocar.client_core import (
    Event,
    Frame,
    KeyframeWanted,
    Notice,
    Opened,
    Pin,
    PromptAccepted,
    PromptRejected,
    Removal,
    Result,
    Resumed,
    StreamOptions,
    TrackedObject,
)
from trocar.config import Access
from trocar.decode import Codec, is_entry_point
from trocar.envelope import Outbox, pack
from trocar.errors import MaskDataError, TrocarError
from trocar.lifeline import Lifeline
from trocar.link import LinkState, TrackerLink
from trocar.masklet_codec import EncodedMask, MaskEncoding, decode_mask
from trocar.pump import SourcePump
from trocar.sources import LARGEST_PICTURE_PX, Source
from trocar.takeaway import RecordedFrame, Recording
from trocar_engines.masklets import Prompt, PromptMode

PAGE_TIME_BASE = Fraction(1, 1_000)
"""Of the page's frames, which count milliseconds."""
PAGE_CODECS = {"h264": Codec.H264, "jpeg": Codec.JPEG}
LIFELINE_S = 60.0
"""For so long objects wait for a page that lost its connection."""
PROGRESS_EVERY_S = 0.25
SLOW_EVERY_S = 5.0
"""Between two words about a slow network."""
NO_SERVER = "There is no server to track it."


@dataclass(kw_only=True)
class Backstage:
    """What one show leaves to the next, and to the page when it is over.

    Args:
        address: host:port of the tracking server.
        access: to it.
        folder: an existing one, for archives that wait to be taken away.
    """

    address: str
    access: Access
    folder: Path
    archives: dict[str, Path] = field(default_factory=dict)
    _lifelines: dict[str, tuple[Lifeline, float]] = field(default_factory=dict)

    def keep_lifeline(self, source_id: str, lifeline: Lifeline) -> None:
        """Keep objects for a page that may come back."""
        self._lifelines = {source_id: (lifeline, time.monotonic())}

    def take_lifeline(self, source_id: str) -> Lifeline:
        """Objects of the page that was here before, if that was just now; else an empty one."""
        lifeline, kept_s = self._lifelines.pop(source_id, (Lifeline(), 0.0))
        return lifeline if time.monotonic() - kept_s < LIFELINE_S else Lifeline()

    def offer_archive(self, path: Path) -> str:
        """Let the page fetch an archive, once: its address."""
        for former in self.archives.values():
            former.unlink(missing_ok=True)
        token = secrets.token_urlsafe(16)
        self.archives = {token: path}
        return f"/takeaway/{token}.zip"


class Show:
    """One source on one page, tracked.

    Args:
        backstage: what outlives the show.
        outbox: to the page.
        start: what the page asked for.
        source: on this side, closed when `run` ends; None when the page sends frames.
        can_decode: the page decodes H.264.
    """

    def __init__(
        self,
        backstage: Backstage,
        outbox: Outbox,
        start: dict[str, Any],
        source: Source | None,
        *,
        can_decode: bool,
    ) -> None:
        self._backstage = backstage
        self._outbox = outbox
        self._source = source
        self._source_id = str(start["source"])
        self._label = str(start.get("label", self._source_id))
        if source is None:
            self._page_codec = PAGE_CODECS[start["codec"]]
        else:
            is_direct = source.codec is Codec.H264 and can_decode
            self._page_codec = Codec.H264 if is_direct else Codec.JPEG
        self._lifeline = backstage.take_lifeline(self._source_id) if start.get("resume") else Lifeline()
        self._link = TrackerLink(
            backstage.address,
            backstage.access,
            self._make_options(),
            self._lifeline,
            on_event=self._take_event,
            on_state=self._take_state,
            on_keyframe_wanted=lambda: self._tell(type="keyframe"),
        )
        self._asked: dict[Prompt, int] = {}
        self._names: dict[int, str] = {}
        self._told_slow_s = float("-inf")
        self._dropped_before = outbox.dropped_frames
        self._opened: Opened | None = None
        self._is_link_known = asyncio.Event()
        self._recording: Recording | None = None
        self._is_writing = False
        self._work: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Show until cancelled.

        Raises:
            SourceError: the source broke.
        """
        # Before the link comes up: the page numbers its frames from here.
        self._tell(
            type="ready",
            source=self._source_id,
            codec="h264" if self._page_codec is Codec.H264 else "jpeg",
            first_frame=self._lifeline.next_frame_id,
            objects=list(self._lifeline.object_ids),
        )
        pump = (
            None if self._source is None else SourcePump(self._source, self._page_codec, self._take_picture)
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._link.run())
                if pump is not None:
                    tasks.create_task(self._pump(pump))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            # Here, since a task that is cancelled before it began runs none of its lines.
            if pump is not None:
                pump.stop()
            self._backstage.keep_lifeline(self._source_id, self._lifeline)

    def take(self, header: dict[str, Any], blob: bytes) -> None:
        """Take a message of the page.

        Raises:
            KeyError, TypeError, ValueError: it is malformed.
            MaskDataError: its mask is.
        """
        match header["type"]:
            case "frame":
                self._take_frame(header, blob)
            case "prompt":
                self._take_prompt(header, blob)
            case "remove":
                object_id = int(header["object"])
                self._lifeline.forget(object_id)
                self._link.send(Removal(object_id=object_id))
            case "pin":
                self._link.send(Pin(frame_id=int(header["frame"])))
            case "rename":
                self._names[int(header["object"])] = str(header["name"])
            case "record":
                self._start_recording() if header["on"] else self._end_recording()
            case unknown:
                raise ValueError(f"unknown message {unknown!r}")

    # from the page, or from a source on this side

    def _take_frame(self, header: dict[str, Any], payload: bytes) -> None:
        frame = Frame(frame_id=int(header["id"]), payload=payload, pts=int(header["pts"]))
        is_keyframe = self._page_codec is Codec.JPEG or bool(header["key"])
        self._link.send_frame(frame, is_keyframe=is_keyframe)
        self._record(frame, payload, is_keyframe=is_keyframe)

    def _take_picture(self, frame: Frame, payload: bytes, due_ms: float) -> None:
        """Show a frame of a source on this side; `payload` is what the page gets of it."""
        assert self._source is not None
        # Set here, on the loop: an earlier show's lifeline decides where the numbers begin.
        frame = Frame(
            payload=frame.payload,
            frame_id=self._lifeline.next_frame_id,
            pts=frame.pts,
            width_px=frame.width_px,
            height_px=frame.height_px,
        )
        is_keyframe = is_entry_point(self._source.codec, frame.payload)
        # What the page gets may be coded otherwise than what the server gets.
        is_entry = is_keyframe or self._page_codec is Codec.JPEG
        header = {"type": "frame", "id": frame.frame_id, "key": is_entry, "due": due_ms}
        self._outbox.put(pack(header, payload), "frame", is_keyframe=is_entry)
        self._tell_when_slow()
        self._link.send_frame(frame, is_keyframe=is_keyframe)
        self._record(frame, payload, is_keyframe=is_entry)

    def _tell_when_slow(self) -> None:
        dropped = self._outbox.dropped_frames
        if dropped == self._dropped_before or time.monotonic() - self._told_slow_s < SLOW_EVERY_S:
            return
        self._dropped_before, self._told_slow_s = dropped, time.monotonic()
        self._tell(
            type="warning",
            reason="page",
            message="The network is slow and pictures are missing: use a cable, or go nearer to the antenna.",
        )

    async def _pump(self, pump: SourcePump) -> None:
        # The first frame is a keyframe: without a server to take it, the next one would be waited for.
        await self._is_link_known.wait()
        await pump.run()
        self._tell(type="ended", message=f"{self._label} has ended.")

    def _take_prompt(self, header: dict[str, Any], blob: bytes) -> None:
        coded = header.get("mask")
        box = header.get("box")
        points = header.get("points", ())
        prompt = Prompt(
            object_id=int(header["object"]),
            frame_id=int(header["frame"]),
            points=tuple((float(x), float(y)) for x, y, _ in points),
            labels=tuple(int(label) for _, _, label in points),
            box=None if box is None else (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
            mask=None if coded is None else decode_mask(_read_mask(coded, blob)),
            mode=PromptMode(header.get("mode", "refine")),
        )
        sequence = int(header["seq"])
        if not self._link.send(prompt):
            self._tell_rejection(prompt, sequence, "not_connected", NO_SERVER)
            return
        self._lifeline.want(prompt.object_id)
        self._asked[prompt] = sequence

    # from the server

    def _take_event(self, event: Event) -> None:
        match event:
            case Result():
                self._lifeline.note_result(event)
                if self._recording is not None:
                    self._recording.add_result(event)
                self._outbox.put(_pack_result(event), "result")
            case PromptAccepted():
                self._lifeline.note_accepted(event)
                if self._recording is not None:
                    self._recording.add_prompted(event)
                self._tell_accepted(event)
            case PromptRejected():
                sequence = self._asked.pop(event.prompt, -1)
                self._tell_rejection(event.prompt, sequence, event.reason, event.message)
            case KeyframeWanted():
                self._tell(type="keyframe")
            case Notice():
                lost = list(event.lost_frame_ids)
                self._tell(type="warning", reason=event.reason, message=event.message, lost=lost)
            case Opened() | Resumed():
                pass  # comes with the link's state; the link begins anew by itself
            case _:
                assert_never(event)

    def _take_state(self, state: LinkState) -> None:
        self._is_link_known.set()
        if state.opened is None:
            for prompt, sequence in self._asked.items():
                self._tell_rejection(prompt, sequence, "not_connected", NO_SERVER)
            self._asked.clear()
            self._tell(type="link", up=False, message=state.message)
            return
        self._opened = state.opened
        self._tell(
            type="link",
            up=True,
            model=state.opened.model,
            memory=state.opened.memory,
            runtime=state.runtime,
            max_objects=state.opened.max_objects,
        )

    def _tell_accepted(self, accepted: PromptAccepted) -> None:
        described, mask = _describe(accepted.tracked)
        header = {
            "type": "accepted",
            "seq": self._asked.pop(accepted.prompt, -1),
            "frame": accepted.frame_id,
            "object": described,
        }
        self._outbox.put(pack(header, mask), "word")

    def _tell_rejection(self, prompt: Prompt, sequence: int, reason: str, message: str) -> None:
        self._tell(type="rejected", seq=sequence, object=prompt.object_id, reason=reason, message=message)

    def _tell(self, **header: object) -> None:
        self._outbox.put(pack(header), "word")

    # take-away

    def _record(self, frame: Frame, payload: bytes, *, is_keyframe: bool) -> None:
        if self._recording is None:
            return
        assert frame.frame_id is not None
        kept = RecordedFrame(frame_id=frame.frame_id, pts=frame.pts or 0, payload=payload)
        self._recording.add_frame(kept, is_keyframe=is_keyframe)
        if self._recording.is_full:
            self._end_recording()

    def _start_recording(self) -> None:
        if self._recording is not None or self._is_writing:
            return
        self._recording = Recording(
            codec=self._page_codec,
            label=self._label,
            model=self._opened.model if self._opened else "",
            memory=self._opened.memory if self._opened else "",
            time_base=PAGE_TIME_BASE if self._source is None else self._source.time_base,
        )
        self._tell(type="keyframe")
        self._tell(type="recording", state="on")

    def _end_recording(self) -> None:
        recording, self._recording = self._recording, None
        if recording is None:
            return
        task = asyncio.create_task(self._write(recording))
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _write(self, recording: Recording) -> None:
        self._is_writing = True
        loop, told_s = asyncio.get_running_loop(), 0.0

        def tell(done: int, total: int) -> None:
            nonlocal told_s
            if time.monotonic() - told_s > PROGRESS_EVERY_S:
                told_s = time.monotonic()
                loop.call_soon_threadsafe(
                    lambda: self._tell(type="recording", state="writing", done=done, total=total)
                )

        try:
            path = await asyncio.to_thread(recording.write, self._backstage.folder, dict(self._names), tell)
        except TrocarError as error:
            self._tell(type="recording", state="failed", message=str(error))
        else:
            url = self._backstage.offer_archive(path)
            self._tell(type="recording", state="ready", url=url, frames=recording.frames)
        finally:
            self._is_writing = False

    def _make_options(self) -> StreamOptions:
        source = self._source
        if source is None:
            return StreamOptions(codec=self._page_codec, time_base=PAGE_TIME_BASE, resolve_overlaps=True)
        return StreamOptions(
            codec=source.codec,
            width_px=source.width_px if source.codec.is_raw else 0,
            height_px=source.height_px if source.codec.is_raw else 0,
            color_matrix=source.color_matrix,
            time_base=source.time_base,
            resolve_overlaps=True,
        )


def _pack_result(result: Result) -> bytes:
    described = [_describe(tracked) for tracked in result.objects]
    header = {
        "type": "result",
        "id": result.frame_id,
        "trusted": result.is_trusted,
        "width": result.width_px,
        "height": result.height_px,
        "dropped": list(result.dropped_frame_ids),
        "dropped_total": result.dropped_frames_total,
        "objects": [fields for fields, _ in described],
    }
    return pack(header, *(mask for _, mask in described))


def _describe(tracked: TrackedObject) -> tuple[dict[str, Any], bytes]:
    """An object's fields, and the bytes of its mask, which follow the header in the order of the objects."""
    coded = tracked.encoded_mask
    # An empty mask needs no bytes, and the page no work.
    data = coded.data if tracked.box is not None else b""
    fields = {
        "id": tracked.object_id,
        "state": tracked.state.value,
        "score": round(tracked.predicted_iou, 4),
        "class": tracked.class_name,
        "class_score": round(tracked.class_probability, 4),
        "unseen": tracked.frames_since_seen,
        "box": tracked.box,
        "mask": {
            "width": coded.width_px,
            "height": coded.height_px,
            "encoding": coded.encoding.value,
            "bytes": len(data),
        },
    }
    return fields, data


def _read_mask(coded: dict[str, Any], data: bytes) -> EncodedMask:
    mask = EncodedMask(
        width_px=int(coded["width"]),
        height_px=int(coded["height"]),
        encoding=MaskEncoding(coded["encoding"]),
        data=data,
    )
    if not 0 < mask.width_px * mask.height_px <= LARGEST_PICTURE_PX:
        raise MaskDataError(f"a mask of {mask.width_px}x{mask.height_px} pixels")
    return mask
