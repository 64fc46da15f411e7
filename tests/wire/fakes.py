"""A tracker that follows colours: an object is every pixel that looks like the one it was prompted on."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import cv2
import numpy as np

from trocar_engines.errors import (
    CapacityError,
    CheckpointError,
    DeviceFaultError,
    FrameNotKeptError,
    StreamLimitError,
    UnknownModelError,
    UnknownObjectError,
)
from trocar_engines.masklets import (
    FrameMasklets,
    Masklet,
    ObjectState,
    Picture,
    Prompt,
    PromptOutcome,
    UInt8Array,
)

INPUT_SIZE_PX = 64
COLOR_DISTANCE = 80
BROKEN_MODEL = "fake-broken"
"""Has a card, but weights that do not fit."""


def resize_linear(rgb: UInt8Array, size: int) -> UInt8Array:
    resized = cv2.resize(rgb, (size, size), interpolation=cv2.INTER_AREA)
    assert resized.dtype == np.uint8
    return resized.view(np.uint8)


@dataclass(frozen=True, kw_only=True)
class FakeCard:
    name: str = "fake-nano"
    input_size_px: int = INPUT_SIZE_PX
    weights_hash: str = "0" * 64
    runtime: str = "fake"
    classes: tuple[str, ...] = ("grasper",)
    policies: tuple[str, ...] = ("vanilla", "fifo")


@dataclass(frozen=True, kw_only=True)
class FakeRows:
    in_use: int
    total: int = 64


@dataclass(eq=False)
class _Job:
    """Work on one stream; `picture` is set when it may be replaced by a newer one."""

    run: Callable[[], None]
    future: "Future[object]"
    picture: Picture | None = None


@dataclass(eq=False)
class FakeStream:
    scheduler: "FakeScheduler"
    is_live: bool
    max_objects: int
    input_size_px: int = INPUT_SIZE_PX
    is_closed: bool = False
    colors: dict[int, UInt8Array] = field(default_factory=dict)
    pictures: "deque[Picture]" = field(default_factory=lambda: deque(maxlen=32))
    pinned: Picture | None = None
    tracked_ids: list[int] = field(default_factory=list)
    most_waiting: int = 0

    def offer(self, picture: Picture) -> "Future[FrameMasklets]":
        future: Future[FrameMasklets] = Future()
        with self.scheduler.changed:
            jobs = self.scheduler.jobs_of(self)
            if self.is_live and jobs and jobs[-1].picture is not None:
                replaced = jobs[-1]
                self.scheduler.jobs.remove((self, replaced))
                assert replaced.picture is not None
                replaced.future.set_result(FrameMasklets(frame_id=replaced.picture.frame_id, is_dropped=True))
        self.scheduler.submit(self, future, lambda: self._track(picture), picture)
        self.most_waiting = max(self.most_waiting, len(self.scheduler.jobs_of(self)))
        return future

    def prompt(self, prompt: Prompt) -> "Future[PromptOutcome]":
        future: Future[PromptOutcome] = Future()
        self.scheduler.submit(self, future, lambda: self._prompt(prompt))
        return future

    def pin(self, frame_id: int) -> "Future[int]":
        future: Future[int] = Future()
        self.scheduler.submit(self, future, lambda: self._pin(frame_id))
        return future

    def remove_object(self, object_id: int) -> "Future[None]":
        future: Future[None] = Future()
        self.scheduler.submit(self, future, lambda: self._remove(object_id))
        return future

    def reset(self) -> "Future[None]":
        future: Future[None] = Future()
        self.scheduler.submit(self, future, self.colors.clear)
        return future

    def close(self) -> None:
        self.scheduler.close_stream(self)

    def _track(self, picture: Picture) -> FrameMasklets:
        self.pictures.append(picture)
        self.tracked_ids.append(picture.frame_id)
        masklets = tuple(self._segment(object_id, picture) for object_id in self.colors)
        stages = {"queue": 10, "encode_image": 20, "decode_masks": 30, "readback": 40}
        return FrameMasklets(
            frame_id=picture.frame_id, masklets=masklets, is_trusted=picture.is_trusted, stage_ns=stages
        )

    def _prompt(self, prompt: Prompt) -> PromptOutcome:
        picture = self._find_picture(prompt.frame_id)
        if prompt.object_id not in self.colors and len(self.colors) >= self.max_objects:
            raise CapacityError(f"{len(self.colors)} objects are tracked, as many as allowed: remove one")
        x, y = _find_place(prompt)
        column, row = int(x * INPUT_SIZE_PX / picture.width_px), int(y * INPUT_SIZE_PX / picture.height_px)
        self.colors[prompt.object_id] = picture.pixels[row, column]
        return PromptOutcome(frame_id=prompt.frame_id, masklet=self._segment(prompt.object_id, picture))

    def _pin(self, frame_id: int) -> int:
        self.pinned = self._find_picture(frame_id)
        return self.pinned.frame_id

    def _find_picture(self, frame_id: int) -> Picture:
        if self.pinned is not None and self.pinned.frame_id == frame_id:
            return self.pinned
        if not self.pictures or frame_id < self.pictures[0].frame_id:
            raise FrameNotKeptError(f"frame {frame_id} is not kept: prompt on a recent frame")
        return min(self.pictures, key=lambda picture: abs(picture.frame_id - frame_id))

    def _remove(self, object_id: int) -> None:
        if object_id not in self.colors:
            raise UnknownObjectError(f"object {object_id} is not tracked")
        del self.colors[object_id]

    def _segment(self, object_id: int, picture: Picture) -> Masklet:
        difference = picture.pixels.astype(np.int32) - self.colors[object_id].astype(np.int32)
        is_object = np.abs(difference).sum(axis=2) < COLOR_DISTANCE
        is_visible = bool(is_object.any())
        return Masklet(
            object_id=object_id,
            state=ObjectState.VISIBLE if is_visible else ObjectState.LOST,
            mask_logits=np.where(is_object, np.float32(8), np.float32(-8)),
            predicted_iou=0.9,
            presence=1.0 if is_visible else 0.0,
            class_name="grasper",
            class_probability=0.5,
            frames_since_seen=0 if is_visible else 1,
        )


class FakeScheduler:
    """One worker thread, as in the real one; `gate` holds it back."""

    model_names = ("fake-nano",)
    default_model = "fake-nano"
    default_memory = "fifo"

    def __init__(self, *, max_streams: int = 64) -> None:
        self.is_healthy = True
        self.is_warm = False
        self.is_answering = True
        self.probes = 0
        self.busy_s = 0.0
        self.max_streams = max_streams
        self.streams: list[FakeStream] = []
        self.jobs: list[tuple[FakeStream, _Job]] = []
        self.changed = threading.Condition()
        self.gate = threading.Event()
        self.gate.set()
        self._is_closed = False
        self._worker = threading.Thread(target=self._work, name="fake-scheduler")
        self._worker.start()

    def open_stream(self, *, model: str, memory: str | None, is_live: bool, max_objects: int) -> FakeStream:
        self.model_card(model)
        if model == BROKEN_MODEL:
            raise CheckpointError(
                "broken.pt: missing keys: memory_attention.norm; unexpected keys: head.bias"
            )
        if len(self.streams) >= self.max_streams:
            raise StreamLimitError(f"{self.max_streams} streams are open")
        stream = FakeStream(self, is_live, max_objects)
        self.streams.append(stream)
        return stream

    def model_card(self, model: str) -> FakeCard:
        if model not in (*self.model_names, BROKEN_MODEL):
            raise UnknownModelError(
                f"model {model!r} is unknown: expected one of {', '.join(self.model_names)}"
            )
        return FakeCard()

    def warm_up(self) -> None:
        self.is_warm = True

    def memory_rows(self) -> dict[str, FakeRows]:
        rows = sum(len(stream.colors) for stream in self.streams)
        return {self.default_model: FakeRows(in_use=rows)}

    def probe(self, model: str, timeout_s: float) -> None:
        self.probes += 1
        if not self.is_answering:
            raise TimeoutError

    def close(self) -> None:
        with self.changed:
            self._is_closed = True
            self.changed.notify_all()
        self.gate.set()
        self._worker.join()

    def submit(
        self,
        stream: FakeStream,
        future: "Future[FrameMasklets] | Future[PromptOutcome] | Future[int] | Future[None]",
        compute: Callable[[], object],
        picture: Picture | None = None,
    ) -> None:
        untyped: Future[object] = future  # type: ignore[assignment]

        def run() -> None:
            if not untyped.set_running_or_notify_cancel():
                return
            try:
                if not self.is_healthy:
                    raise DeviceFaultError("the device failed")
                result = compute()
            except Exception as error:
                untyped.set_exception(error)
            else:
                untyped.set_result(result)

        with self.changed:
            self.jobs.append((stream, _Job(run, untyped, picture)))
            self.changed.notify_all()

    def jobs_of(self, stream: FakeStream) -> list[_Job]:
        return [job for owner, job in self.jobs if owner is stream]

    def close_stream(self, stream: FakeStream) -> None:
        with self.changed:
            stream.is_closed = True
            for job in self.jobs_of(stream):
                job.future.cancel()
            self.jobs = [entry for entry in self.jobs if entry[0] is not stream]
            if stream in self.streams:
                self.streams.remove(stream)

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.jobs or self._is_closed)
                if self._is_closed:
                    return
            self.gate.wait()
            with self.changed:
                if not self.jobs:
                    continue
                _, job = self.jobs.pop(0)
            job.run()


def _find_place(prompt: Prompt) -> tuple[float, float]:
    if prompt.points:
        return prompt.points[0]
    if prompt.box is not None:
        x_min, y_min, x_max, y_max = prompt.box
        return (x_min + x_max) / 2, (y_min + y_max) / 2
    assert prompt.mask is not None
    rows, columns = np.nonzero(prompt.mask)
    return float(np.median(columns)), float(np.median(rows))
