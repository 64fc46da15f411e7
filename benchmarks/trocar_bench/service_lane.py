"""A stream of H.264 through the Python client: what a video pipeline gets from the service."""

import threading
import time
from collections.abc import Callable
from fractions import Fraction

from trocar.client import Client
from trocar.client_core import (
    EVERY_WINDOW_FRAMES,
    Event,
    Frame,
    Notice,
    PromptAccepted,
    PromptRejected,
    Result,
    StreamOptions,
)
from trocar.decode import Codec
from trocar_bench.footage import Footage, spread_clicks
from trocar_bench.frame_log import FrameLog
from trocar_bench.pacing import Pacing
from trocar_bench.speed_run import RunPlan
from trocar_engines.errors import TrocarError
from trocar_engines.masklets import ObjectState, Prompt

TIME_BASE = Fraction(1, 90_000)


class ServiceLane:
    """See `speed_run.Lane`.

    Args:
        client: a connection.
        plan: of the run.
        footage: what it shows.
    """

    def __init__(self, client: Client, plan: RunPlan, footage: Footage) -> None:
        self.log: FrameLog = plan.make_log()
        self.pacing: Pacing = plan.make_pacing(EVERY_WINDOW_FRAMES)
        self._plan = plan
        self._footage = footage
        options = StreamOptions(
            codec=Codec.H264,
            is_live=plan.is_live,
            time_base=TIME_BASE,
            max_objects=plan.objects,
        )
        self._stream = client.open_stream(options)
        self._changed = threading.Condition()
        self._accepted = 0
        self._is_over = False
        self._failure: TrocarError | None = None
        self._receiver = threading.Thread(target=self._receive, name="bench-receiver")
        self._receiver.start()

    def begin(self) -> None:
        """See `Lane.begin`."""
        self._stream.send(self._read_frame(0))
        self._wait_for(lambda: self.log.settled > 0)
        clicks = spread_clicks(self._footage.labels, self._plan.objects)
        for object_id, click in enumerate(clicks, 1):
            self._stream.send(Prompt(object_id=object_id, frame_id=0, points=(click,), labels=(1,)))
        self._wait_for(lambda: self._accepted == len(clicks))

    def send(self, frame_id: int) -> None:
        """See `Lane.send`."""
        if not self._stream.send(self._read_frame(frame_id)):
            # A client gives up on a live frame when the server owes a second of them.
            self.log.note_dropped([frame_id])

    def finish(self) -> None:
        """See `Lane.finish`."""
        self._stream.finish()
        self._receiver.join()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """See `Lane.close`."""
        self.pacing.stop()
        self._stream.close()
        self._receiver.join()

    def _read_frame(self, frame_id: int) -> Frame:
        packets = self._footage.packets
        return Frame(
            payload=packets[frame_id % len(packets)],
            frame_id=frame_id,
            pts=round(frame_id / self._plan.rate_hz / TIME_BASE),
        )

    def _receive(self) -> None:
        try:
            for event in self._stream:
                self._take(event, time.perf_counter_ns())
        except TrocarError as failure:
            self._failure = self._failure or failure
        finally:
            self.pacing.stop()
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

    def _take(self, event: Event, received_ns: int) -> None:
        match event:
            case Result():
                self._take_result(event, received_ns)
                self._note_dropped(event.dropped_frame_ids)
            case Notice():
                self._note_dropped(event.lost_frame_ids)
            case PromptAccepted():
                self._accepted += 1
            case PromptRejected():
                raise TrocarError(f"object {event.prompt.object_id}: prompt refused: {event.message}")
            case _:
                return
        with self._changed:
            self._changed.notify_all()

    def _take_result(self, result: Result, received_ns: int) -> None:
        self.log.note_result(
            result.frame_id,
            received_ns,
            result.stage_ns,
            masklets=len(result.objects),
            visible_masklets=sum(one.state is ObjectState.VISIBLE for one in result.objects),
            service_ns=result.service_latency_ns,
        )
        if result.frame_id:
            self.pacing.settle()

    def _note_dropped(self, frame_ids: tuple[int, ...]) -> None:
        self.log.note_dropped(frame_ids)
        for _ in frame_ids:
            self.pacing.settle()

    def _wait_for(self, is_met: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: is_met() or self._is_over)
        if not is_met():
            raise self._failure or TrocarError("the server ended the stream")
