"""A camera and its client: one live stream on an absolute schedule, for as long as a bench wants it."""

import threading
import time
from array import array
from collections.abc import Callable

from trocar.client import Stream
from trocar.client_core import Event, Frame, PromptAccepted, PromptRejected, Result
from trocar_bench.footage import Footage, spread_clicks
from trocar_bench.pacing import OpenLoop
from trocar_bench.service_lane import TIME_BASE
from trocar_engines.errors import TrocarError
from trocar_engines.masklets import Prompt

PATIENCE_S = 30.0


class LiveStream:
    """Shows the footage to and fro, a keyframe every second, and prompts its objects once.

    Args:
        stream: fresh; closed by us.
        footage: what the camera sees.
        fps: of the camera.
        objects: prompted by one click each on frame 0.
        take: gets each event and the monotonic time, s; called in a thread of ours, one event after another.
    """

    def __init__(
        self,
        stream: Stream,
        footage: Footage,
        *,
        fps: float,
        objects: int,
        take: Callable[[Event, float], None],
    ) -> None:
        self.stream = stream
        self.due_ns = array("q")
        """When each frame was due, on the monotonic clock; its index is the frame's id."""
        self._footage = footage
        self._fps = fps
        self._objects = objects
        self._take = take
        self._packets = footage.encode(keyframe_interval=round(fps))
        self._pacing = OpenLoop(fps)
        self._changed = threading.Condition()
        self._has_result = False
        self._accepted = 0
        self._failure: BaseException | None = None
        self._is_over = False
        self._receiver = threading.Thread(target=self._receive, name="bench-receiver")
        self._sender = threading.Thread(target=self._send, name="bench-camera")

    @property
    def is_over(self) -> bool:
        """Whether the call has ended."""
        return self._is_over

    @property
    def failure(self) -> BaseException | None:
        """What ended it; None while it goes on, or when its server closed it."""
        return self._failure

    def start(self) -> None:
        """Start the camera, prompt, and wait until all objects are tracked.

        Raises:
            TrocarError: they are not, in time.
        """
        self._receiver.start()
        self._pacing.start(time.perf_counter_ns())
        self._sender.start()
        self.wait_for(lambda: self._has_result)
        for object_id, click in enumerate(spread_clicks(self._footage.labels, self._objects), 1):
            self.stream.send(Prompt(object_id=object_id, frame_id=0, points=(click,), labels=(1,)))
        self.wait_for(lambda: self._accepted == self._objects)

    def wait_for(self, is_met: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
        """Wait for something that `take` notes.

        Raises:
            TrocarError: the stream is over, or time is up.
        """
        with self._changed:
            self._changed.wait_for(lambda: is_met() or self._is_over, timeout_s)
        if not is_met():
            raise TrocarError(f"the stream did not go on: {self._failure or 'nothing came'}")

    def close(self) -> None:
        """Stop the camera and hang up."""
        self._pacing.stop()
        self.stream.close()
        for thread in (self._sender, self._receiver):
            if thread.ident is not None:
                thread.join()

    def _send(self) -> None:
        while (due_ns := self._pacing.wait()) is not None and not self._is_over:
            frame_id = len(self.due_ns)
            self.due_ns.append(due_ns)
            payload = self._packets[frame_id % len(self._packets)]
            pts = round(frame_id / self._fps / TIME_BASE)
            self.stream.send(Frame(payload=payload, frame_id=frame_id, pts=pts))

    def _receive(self) -> None:
        try:
            for event in self.stream:
                with self._changed:
                    self._note(event)
                    self._take(event, time.perf_counter())
                    self._changed.notify_all()
        except TrocarError as failure:
            self._failure = failure
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

    def _note(self, event: Event) -> None:
        match event:
            case Result():
                self._has_result = True
            case PromptAccepted():
                self._accepted += 1
            case PromptRejected():
                raise TrocarError(f"object {event.prompt.object_id}: prompt refused: {event.message}")
            case _:
                return
