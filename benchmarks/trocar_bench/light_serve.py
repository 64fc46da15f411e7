"""`trocar serve` around a tracker that computes nothing: what an attack on the service meets, without the
cost of a network. Each object is a disc that stands somewhere.

    python -m trocar_bench.light_serve serve --address 127.0.0.1:0
"""

import sys
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from trocar.cli import EngineOptions, main
from trocar_engines.errors import (
    CapacityError,
    FrameNotKeptError,
    StreamLimitError,
    TrocarError,
    UnknownModelError,
    UnknownObjectError,
)
from trocar_engines.masklets import (
    Float32Array,
    FrameMasklets,
    Masklet,
    ObjectState,
    Picture,
    Prompt,
    PromptOutcome,
)
from trocar_engines.models import ModelCard
from trocar_engines.scheduler import DEFAULT_MEMORY, MemoryRows

MODEL = "light"
INPUT_SIZE_PX = 64
KEPT_FRAMES = 75
"""As many as the shipped model's ring holds."""
RADIUS_SHARE = 1 / 8
"""Of the picture's edge: about the area of one instrument."""

T = TypeVar("T")


@dataclass(eq=False)
class LightStream:
    """See `trocar.tracking.TrackedStream`; answers in the caller's thread, so nothing ever waits.

    Args:
        scheduler: counts its objects.
        max_objects: at once.
    """

    scheduler: "LightScheduler"
    max_objects: int
    input_size_px: int = INPUT_SIZE_PX
    masks: dict[int, Float32Array] = field(default_factory=dict)
    _kept: "deque[int]" = field(default_factory=lambda: deque(maxlen=KEPT_FRAMES))
    _pinned: int | None = None

    def offer(self, picture: Picture) -> "Future[FrameMasklets]":
        """See `TrackedStream.offer`."""
        self._kept.append(picture.frame_id)
        masklets = tuple(_write_masklet(object_id, mask) for object_id, mask in self.masks.items())
        return _done(
            FrameMasklets(frame_id=picture.frame_id, masklets=masklets, is_trusted=picture.is_trusted)
        )

    def prompt(self, prompt: Prompt) -> "Future[PromptOutcome]":
        """See `TrackedStream.prompt`."""
        frame_id = self._find_frame(prompt.frame_id)
        if frame_id is None:
            return _failed(FrameNotKeptError(f"frame {prompt.frame_id} is not kept"))
        if prompt.object_id not in self.masks and not self.scheduler.has_room(self):
            return _failed(CapacityError("no row is free: remove an object"))
        mask = self.masks[prompt.object_id] = _draw(prompt.object_id)
        return _done(PromptOutcome(frame_id=frame_id, masklet=_write_masklet(prompt.object_id, mask)))

    def pin(self, frame_id: int) -> "Future[int]":
        """See `TrackedStream.pin`."""
        found = self._find_frame(frame_id)
        if found is None:
            return _failed(FrameNotKeptError(f"frame {frame_id} is not kept"))
        self._pinned = found
        return _done(found)

    def remove_object(self, object_id: int) -> "Future[None]":
        """See `TrackedStream.remove_object`."""
        if self.masks.pop(object_id, None) is None:
            return _failed(UnknownObjectError(f"object {object_id} is not tracked"))
        return _done(None)

    def reset(self) -> "Future[None]":
        """See `TrackedStream.reset`."""
        self.masks.clear()
        return _done(None)

    def close(self) -> None:
        """See `TrackedStream.close`."""
        self.scheduler.streams.discard(self)

    def _find_frame(self, frame_id: int) -> int | None:
        if frame_id == self._pinned:
            return frame_id
        if not self._kept or frame_id < self._kept[0]:
            return None
        return min(self._kept, key=lambda kept: abs(kept - frame_id))


class LightScheduler:
    """See `trocar.tracking.Scheduler`.

    Args:
        options: how many streams and objects.
    """

    model_names = (MODEL,)
    default_model = MODEL
    default_memory = DEFAULT_MEMORY
    is_healthy = True
    busy_s = 0.0

    def __init__(self, options: EngineOptions) -> None:
        self.streams: set[LightStream] = set()
        self._max_streams, self._max_objects = options.max_streams, options.max_objects

    def has_room(self, stream: LightStream) -> bool:
        """Whether another object fits, in its stream and in all."""
        return len(stream.masks) < stream.max_objects and self._rows_in_use < self._max_objects

    def memory_rows(self) -> dict[str, MemoryRows]:
        """See `Scheduler.memory_rows`."""
        return {MODEL: MemoryRows(in_use=self._rows_in_use, total=self._max_objects)}

    def probe(self, model: str, timeout_s: float) -> None:
        """See `Scheduler.probe`."""

    def open_stream(self, *, model: str, memory: str | None, is_live: bool, max_objects: int) -> LightStream:  # noqa: ARG002
        """See `Scheduler.open_stream`."""
        self.model_card(model)
        if len(self.streams) >= self._max_streams:
            raise StreamLimitError(f"{self._max_streams} streams are open")
        stream = LightStream(self, max_objects)
        self.streams.add(stream)
        return stream

    def model_card(self, model: str) -> ModelCard:
        """See `Scheduler.model_card`."""
        if model != MODEL:
            raise UnknownModelError(f"model {model!r} is unknown: expected {MODEL}")
        return ModelCard(name=MODEL, input_size_px=INPUT_SIZE_PX, weights_hash="", runtime="none", classes=())

    def warm_up(self) -> None:
        """See `Scheduler.warm_up`."""

    def close(self) -> None:
        """See `Scheduler.close`."""

    @property
    def _rows_in_use(self) -> int:
        return sum(len(stream.masks) for stream in list(self.streams))


def _write_masklet(object_id: int, mask_logits: Float32Array) -> Masklet:
    return Masklet(
        object_id=object_id,
        state=ObjectState.VISIBLE,
        mask_logits=mask_logits,
        predicted_iou=1.0,
        presence=1.0,
        class_name="unknown",
        class_probability=0.0,
        frames_since_seen=0,
    )


def _draw(object_id: int) -> Float32Array:
    """Logits of a disc whose place follows from the object's number: float32 [S, S]."""
    row, column = np.ogrid[:INPUT_SIZE_PX, :INPUT_SIZE_PX]
    centre_y, centre_x = divmod(object_id * 389 % INPUT_SIZE_PX**2, INPUT_SIZE_PX)
    distance = np.hypot(row - centre_y, column - centre_x)
    return np.asarray(INPUT_SIZE_PX * RADIUS_SHARE - distance, np.float32)


def _done(value: T) -> "Future[T]":
    future: Future[T] = Future()
    future.set_result(value)
    return future


def _failed(error: TrocarError) -> "Future[T]":
    future: Future[T] = Future()
    future.set_exception(error)
    return future


if __name__ == "__main__":
    sys.exit(main(start_scheduler=LightScheduler))
