import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from networks import lively_network
from trocar_engines.errors import CheckpointError, FrameNotKeptError, StreamLimitError, UnknownModelError
from trocar_engines.masklets import Picture, Prompt
from trocar_engines.network.config import NANO
from trocar_engines.network.weights import save_weights
from trocar_engines.scheduler import QUEUE_CAPACITY, Scheduler, SchedulerConfig, TrackedStream

TIMEOUT_S = 20


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "nano.safetensors"
    save_weights(path, lively_network(NANO).state_dict(), "sam2s-nano")
    return path


@pytest.fixture(scope="module")
def scheduler(weights: Path) -> Iterator[Scheduler]:
    scheduler = Scheduler(SchedulerConfig(runtime="eager", weights=weights, max_streams=2, max_objects=3))
    yield scheduler
    scheduler.close()


@pytest.fixture
def open_stream(scheduler: Scheduler) -> Iterator[Callable[..., TrackedStream]]:
    opened: list[TrackedStream] = []

    def make(*, is_live: bool = False) -> TrackedStream:
        opened.append(scheduler.open_stream(is_live=is_live, max_objects=2))
        return opened[-1]

    yield make
    for stream in opened:
        stream.close()


def picture(frame_id: int) -> Picture:
    size = NANO.input_size_px
    pixels = np.full((size, size, 3), frame_id % 255, dtype=np.uint8)
    return Picture(frame_id=frame_id, pixels=pixels, width_px=640, height_px=360, time_s=frame_id / 30)


def click(frame_id: int, object_id: int = 1) -> Prompt:
    return Prompt(object_id=object_id, frame_id=frame_id, points=((320.0, 180.0),), labels=(1,))


def test_pictures_and_prompts_take_effect_in_the_order_of_the_calls(
    open_stream: Callable[..., TrackedStream],
) -> None:
    stream = open_stream()
    futures = [stream.offer(picture(0))]
    prompted = stream.prompt(click(0))
    futures.append(stream.offer(picture(1)))
    removed = stream.remove_object(1)
    futures.append(stream.offer(picture(2)))
    results = [future.result(TIMEOUT_S) for future in futures]
    assert [len(result.masklets) for result in results] == [0, 1, 0]
    assert prompted.result(TIMEOUT_S).frame_id == 0
    assert removed.result(TIMEOUT_S) is None
    assert all("queue" in result.stage_ns for result in results)


def test_live_stream_drops_all_but_the_latest_picture(open_stream: Callable[..., TrackedStream]) -> None:
    stream = open_stream(is_live=True)
    results = [future.result(TIMEOUT_S) for future in [stream.offer(picture(index)) for index in range(12)]]
    dropped = [result.frame_id for result in results if result.is_dropped]
    assert 0 < len(dropped) < 12
    assert not results[-1].is_dropped
    assert [result.frame_id for result in results] == list(range(12))


def test_picture_that_a_prompt_waits_for_is_not_dropped(open_stream: Callable[..., TrackedStream]) -> None:
    stream = open_stream(is_live=True)
    for frame in range(0, 30, 3):
        waiting = [stream.offer(picture(frame)), stream.offer(picture(frame + 1))]
        prompted = stream.prompt(click(frame + 1))
        waiting.append(stream.offer(picture(frame + 2)))
        assert prompted.result(TIMEOUT_S).frame_id == frame + 1
        assert not waiting[1].result(TIMEOUT_S).is_dropped
        assert not waiting[2].result(TIMEOUT_S).is_dropped


def test_prompt_before_any_picture_is_refused(open_stream: Callable[..., TrackedStream]) -> None:
    with pytest.raises(FrameNotKeptError, match="no frame has been tracked yet"):
        open_stream().prompt(click(0)).result(TIMEOUT_S)


def test_file_stream_refuses_more_pictures_than_its_queue(open_stream: Callable[..., TrackedStream]) -> None:
    stream = open_stream()
    with pytest.raises(ValueError, match="await their results"):
        [stream.offer(picture(index)) for index in range(QUEUE_CAPACITY + 20)]


def test_stream_that_closes_makes_room_at_once_and_frees_its_rows(
    scheduler: Scheduler, open_stream: Callable[..., TrackedStream]
) -> None:
    first, second = open_stream(), open_stream()
    with pytest.raises(StreamLimitError, match="all 2 streams"):
        open_stream()
    for stream in (first, second):
        stream.offer(picture(0))
        stream.prompt(click(0)).result(TIMEOUT_S)
    assert first.model.tracker.pool.rows_in_use == 2
    waiting = first.offer(picture(1))
    first.close()
    third = open_stream()
    third.offer(picture(0)).result(TIMEOUT_S)
    assert third.model.tracker.pool.rows_in_use == 1
    assert waiting.done()
    assert first.offer(picture(2)).cancelled()


def test_warm_up_leaves_no_stream_behind(scheduler: Scheduler) -> None:
    scheduler.warm_up()
    deadline = time.monotonic() + TIMEOUT_S
    tracker = scheduler._model(scheduler.default_model).tracker
    while tracker.pool.rows_in_use and time.monotonic() < deadline:
        time.sleep(0.01)
    assert tracker.pool.rows_in_use == 0


def test_a_fault_of_the_tracker_makes_the_scheduler_unhealthy(weights: Path) -> None:
    scheduler = Scheduler(SchedulerConfig(runtime="eager", weights=weights))
    stream = scheduler.open_stream(is_live=False, max_objects=1)
    broken = Picture(frame_id=0, pixels=np.zeros((8, 8), np.uint8), width_px=8, height_px=8, time_s=0.0)
    with pytest.raises(RuntimeError):
        stream.offer(broken).result(TIMEOUT_S)
    assert not scheduler.is_healthy
    scheduler.close()


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"model": "sam3"}, UnknownModelError, "expected one of sam2s-nano"),
        ({"model": "sam2.1-hiera-tiny"}, CheckpointError, "no weights are installed"),
        ({"runtime": "magic"}, UnknownModelError, "expected one of auto, onnx, eager"),
        ({"weights": Path("missing.safetensors")}, CheckpointError, "no such file"),
    ],
)
def test_what_cannot_be_loaded_is_said_with_the_remedy(
    settings: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        Scheduler(SchedulerConfig(**settings))  # type: ignore[arg-type]
