"""A stream of pictures straight into the scheduler: the tracker without video, coding of masks or network."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial

from trocar.tracking import TrackedStream
from trocar_bench.footage import Footage, spread_clicks
from trocar_bench.frame_log import FrameLog
from trocar_bench.mask_comparison import Masks
from trocar_bench.pacing import Pacing
from trocar_bench.speed_run import RunPlan
from trocar_engines.masklets import FrameMasklets, Masklet, ObjectState, Picture, Prompt, UInt8Array
from trocar_engines.scheduler import QUEUE_CAPACITY

NOBODY = 0
"""An object_id that no client can use."""


class EngineLane:
    """See `speed_run.Lane` and `speed_run.BlockLane`.

    Args:
        stream: fresh; closed by us.
        plan: of the run.
        footage: what it shows.
        inputs: its pictures at the model's input size, uint8 [S, S, 3].
        window: pictures on their way at most, where nothing is dropped.
        on_masks: called with a frame's number and its masks, on the device's thread.
    """

    def __init__(
        self,
        stream: TrackedStream,
        plan: RunPlan,
        footage: Footage,
        inputs: Sequence[UInt8Array],
        *,
        window: int = QUEUE_CAPACITY,
        on_masks: Callable[[int, Masks], None] = lambda *_: None,
    ) -> None:
        self.log: FrameLog = plan.make_log()
        self.pacing: Pacing = plan.make_pacing(window)
        self._on_masks = on_masks
        self._stream = stream
        self._plan = plan
        self._footage = footage
        self._inputs = inputs
        self._is_done = threading.Event()
        self._failure: BaseException | None = None

    def begin(self) -> None:
        """See `Lane.begin`."""
        result = self._stream.offer(self._read_picture(0)).result()
        self._note(result, time.perf_counter_ns())
        masklets = []
        clicks = spread_clicks(self._footage.labels, self._plan.objects)
        for object_id, click in enumerate(clicks, 1):
            prompt = Prompt(object_id=object_id, frame_id=0, points=(click,), labels=(1,))
            masklets.append(self._stream.prompt(prompt).result().masklet)
        self._on_masks(0, _read_masks(masklets))

    def send(self, frame_id: int) -> None:
        """See `Lane.send`."""
        future = self._stream.offer(self._read_picture(frame_id))
        future.add_done_callback(partial(self._settle, frame_id))

    def finish(self) -> None:
        """See `Lane.finish`."""
        self._is_done.wait()
        if self._failure is not None:
            raise self._failure

    def drain(self) -> None:
        """See `BlockLane.drain`."""
        # What is asked of a stream takes effect in order, between ticks: when this is refused, the last
        # picture has been tracked and written to memory.
        wait([self._stream.remove_object(NOBODY)])
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """See `Lane.close`."""
        self._stream.close()
        self._end()

    def _read_picture(self, frame_id: int) -> Picture:
        places = self._footage.places
        return Picture(
            frame_id=frame_id,
            pixels=self._inputs[places[frame_id % len(places)]],
            width_px=self._footage.width_px,
            height_px=self._footage.height_px,
            time_s=frame_id / self._plan.rate_hz,
        )

    def _settle(self, frame_id: int, future: Future[FrameMasklets]) -> None:
        """Runs on the device's thread, which must not be held up."""
        received_ns = time.perf_counter_ns()
        if future.cancelled() or future.exception() is not None:
            self._failure = None if future.cancelled() else future.exception()
            self._end()
            return
        self._note(future.result(), received_ns)
        self.pacing.settle()
        if frame_id == self._plan.frame_ids[-1]:
            self._is_done.set()

    def _note(self, result: FrameMasklets, received_ns: int) -> None:
        if result.is_dropped:
            self.log.note_dropped([result.frame_id])
            return
        self.log.note_result(
            result.frame_id,
            received_ns,
            result.stage_ns,
            masklets=len(result.masklets),
            visible_masklets=sum(one.state is ObjectState.VISIBLE for one in result.masklets),
        )
        if result.frame_id:
            self._on_masks(result.frame_id, _read_masks(result.masklets))

    def _end(self) -> None:
        self.pacing.stop()
        self._is_done.set()


def _read_masks(masklets: Sequence[Masklet]) -> Masks:
    return {one.object_id: one.mask_logits if one.state is ObjectState.VISIBLE else None for one in masklets}
