"""A stream of pictures straight into the scheduler: the tracker without video, coding of masks or network."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

from trocar.tracking import TrackedStream
from trocar_bench.footage import Footage, spread_clicks
from trocar_bench.frame_log import FrameLog
from trocar_bench.pacing import Pacing
from trocar_bench.speed_run import RunPlan
from trocar_engines.masklets import FrameMasklets, ObjectState, Picture, Prompt, UInt8Array
from trocar_engines.scheduler import QUEUE_CAPACITY


class EngineLane:
    """See `speed_run.Lane`.

    Args:
        stream: fresh; closed by us.
        plan: of the run.
        footage: what it shows.
        inputs: its pictures at the model's input size, uint8 [S, S, 3].
    """

    def __init__(
        self, stream: TrackedStream, plan: RunPlan, footage: Footage, inputs: Sequence[UInt8Array]
    ) -> None:
        self.log: FrameLog = plan.make_log()
        self.pacing: Pacing = plan.make_pacing(QUEUE_CAPACITY)
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
        clicks = spread_clicks(self._footage.labels, self._plan.objects)
        for object_id, click in enumerate(clicks, 1):
            prompt = Prompt(object_id=object_id, frame_id=0, points=(click,), labels=(1,))
            self._stream.prompt(prompt).result()

    def send(self, frame_id: int) -> None:
        """See `Lane.send`."""
        future = self._stream.offer(self._read_picture(frame_id))
        future.add_done_callback(partial(self._settle, frame_id))

    def finish(self) -> None:
        """See `Lane.finish`."""
        self._is_done.wait()
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

    def _end(self) -> None:
        self.pacing.stop()
        self._is_done.set()
