"""The real scheduler with a network so small that a step takes milliseconds, and a view of what it does."""

import dataclasses
import threading
from collections.abc import Callable

from networks import TINY, lively_network
from trocar_engines.masklets import Picture
from trocar_engines.memory.bank import BankConfig
from trocar_engines.models import model_entry
from trocar_engines.runtime.eager import EagerRuntime
from trocar_engines.scheduler import LoadedModel, Scheduler, SchedulerConfig
from trocar_engines.tracked import StreamState
from trocar_engines.tracker import Step, Tracker, TrackerConfig

TIMEOUT_S = 10.0
ROWS = 4


class SteppedTracker(Tracker):
    """Notes what the device's thread does; while `is_held` it catches up only as often as it is let.

    Args:
        kept_frames: that a prompt may name.
    """

    def __init__(self, kept_frames: int) -> None:
        config = TrackerConfig(rows=ROWS, bank=BankConfig(), most_kept_frames=kept_frames)
        super().__init__(EagerRuntime(lively_network()), config)
        self.log: list[str] = []
        self.on_step: Callable[[], None] = lambda: None
        self.is_held = False
        self._permits = threading.Semaphore(0)

    def step(
        self,
        streams: list[StreamState],
        pictures: list[Picture],
        *,
        coming: Callable[[], list[Picture]] = list,
    ) -> Step:
        self.log.append("step")
        step = super().step(streams, pictures, coming=coming)
        self.on_step()
        return step

    def catch_up(self, streams: list[StreamState]) -> None:
        self.log.append("catch_up")
        if self.is_held:
            self._permits.acquire(timeout=TIMEOUT_S)
        super().catch_up(streams)

    def let(self, steps: int) -> None:
        self._permits.release(steps)

    def release(self) -> None:
        self.is_held = False
        self._permits.release(1_000)


class FailingTracker(SteppedTracker):
    """Cannot write memory."""

    def remember(self, step: Step) -> None:
        raise RuntimeError("the device is gone")


def stepped_scheduler(
    *, kept_frames: int = 75, kind: type[SteppedTracker] = SteppedTracker
) -> tuple[Scheduler, SteppedTracker]:
    """A scheduler whose default model is tiny, and its tracker."""
    tracker = kind(kept_frames)
    entry = dataclasses.replace(model_entry("sam2s-nano"), config=TINY)
    model = LoadedModel(entry=entry, tracker=tracker)
    config = SchedulerConfig(runtime="eager", max_objects=ROWS)
    return Scheduler(config, load=lambda *_: model), tracker
