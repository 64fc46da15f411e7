import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from networks import TINY, lively_network
from stepping import FailingTracker, SteppedTracker, stepped_scheduler
from trocar_engines.errors import (
    CheckpointError,
    DeviceFaultError,
    FrameNotKeptError,
    RuntimeUnavailableError,
    StreamLimitError,
    UnknownModelError,
)
from trocar_engines.masklets import FrameMasklets, Picture, Prompt
from trocar_engines.network.config import NANO
from trocar_engines.network.sam2s import SAM2S, Decoded
from trocar_engines.network.weights import save_weights
from trocar_engines.runtime.eager import EagerRuntime
from trocar_engines.scheduler import QUEUE_CAPACITY, Scheduler, SchedulerConfig, TrackedStream
from trocar_engines.tracked import StreamState
from trocar_engines.tracker import Step

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


class FaultyRuntime(EagerRuntime):
    """Fails one of its stages, as a GPU does that vanished."""

    def __init__(self, network: SAM2S, stage: str) -> None:
        super().__init__(network)
        self._stage = stage

    def decode_prompt(self, *arguments: Any) -> Decoded:
        self._maybe_fail("decode_prompt")
        return super().decode_prompt(*arguments)

    def encode_memory(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        self._maybe_fail("encode_memory")
        return super().encode_memory(*arguments)

    def track_masks(self, *arguments: Any) -> Decoded:
        self._maybe_fail("track_masks")
        return super().track_masks(*arguments)

    def _maybe_fail(self, stage: str) -> None:
        if stage == self._stage:
            raise torch.OutOfMemoryError("no memory left on the device")


@pytest.mark.parametrize("stage", ["track_masks", "encode_memory", "decode_prompt"])
def test_no_mask_comes_after_a_device_fault(weights: Path, stage: str) -> None:
    scheduler = Scheduler(SchedulerConfig(runtime="eager", weights=weights))
    stream = scheduler.open_stream(is_live=False, max_objects=2)
    stream.offer(picture(0)).result(TIMEOUT_S)
    stream.prompt(click(0)).result(TIMEOUT_S)
    stream.model.tracker.runtime = FaultyRuntime(lively_network(NANO), stage)
    if stage == "decode_prompt":
        with pytest.raises(DeviceFaultError, match="connect again"):
            stream.prompt(click(0, object_id=2)).result(TIMEOUT_S)
    elif stage == "encode_memory":
        # The fault comes after the reply, and must not take the thread along.
        assert stream.offer(picture(1)).result(TIMEOUT_S).masklets
    for frame_id in (2, 3):
        with pytest.raises(DeviceFaultError, match="connect again"):
            stream.offer(picture(frame_id)).result(TIMEOUT_S)
    with pytest.raises(DeviceFaultError, match="connect again"):
        stream.prompt(click(1)).result(TIMEOUT_S)
    assert not scheduler.is_healthy
    scheduler.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("runtime", ["cuda", "tensorrt"])
def test_runtime_that_this_machine_lacks_is_refused_with_a_remedy(weights: Path, runtime: str) -> None:
    with pytest.raises(RuntimeUnavailableError, match="--runtime onnx"):
        Scheduler(SchedulerConfig(runtime=runtime, weights=weights))


@pytest.mark.parametrize(("has_bfloat16", "runtime"), [(True, "openvino"), (False, "onnx")])
def test_pictures_are_encoded_in_bfloat16_where_the_cpu_can(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool, runtime: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("trocar_engines.runtime.openvino._has_bfloat16", lambda library: has_bfloat16)
    config = SchedulerConfig(weights=weights, cache=tmp_path, max_objects=2)
    with closing(Scheduler(config)) as scheduler:
        assert scheduler.model_card(scheduler.default_model).runtime == runtime


def test_openvino_without_bfloat16_is_refused_with_a_remedy(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trocar_engines.runtime.openvino._has_bfloat16", lambda library: False)
    with pytest.raises(RuntimeUnavailableError, match=r"no bfloat16 on this CPU.*--runtime onnx"):
        Scheduler(SchedulerConfig(runtime="openvino", weights=weights))


def test_without_openvino_the_default_is_onnx_and_openvino_is_refused_with_a_remedy(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(RuntimeUnavailableError, match=r"OpenVINO cannot be loaded.*--runtime onnx"):
        Scheduler(SchedulerConfig(runtime="openvino", weights=weights))
    with closing(Scheduler(SchedulerConfig(weights=weights, cache=tmp_path, max_objects=2))) as scheduler:
        assert scheduler.model_card(scheduler.default_model).runtime == "onnx"


def test_card_names_the_runtime_that_runs(scheduler: Scheduler) -> None:
    assert scheduler.model_card(scheduler.default_model).runtime == "eager"


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"model": "sam3"}, UnknownModelError, "expected one of sam2s-nano"),
        ({"model": "sam2.1-hiera-tiny"}, CheckpointError, "no weights are installed"),
        ({"runtime": "magic"}, UnknownModelError, "expected one of auto, openvino, onnx, eager"),
        ({"weights": Path("missing.safetensors")}, CheckpointError, "no such file"),
    ],
)
def test_what_cannot_be_loaded_is_said_with_the_remedy(
    settings: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        Scheduler(SchedulerConfig(**settings))  # type: ignore[arg-type]


@pytest.fixture
def stepped() -> Iterator[tuple[Scheduler, SteppedTracker]]:
    scheduler, tracker = stepped_scheduler()
    yield scheduler, tracker
    tracker.release()
    scheduler.close()


def show(stream: TrackedStream, frames: range) -> None:
    for frame in frames:
        stream.offer(tiny_picture(frame)).result(TIMEOUT_S)


def tiny_picture(frame_id: int) -> Picture:
    pixels = np.random.default_rng(frame_id).integers(0, 255, (TINY.input_size_px,) * 2 + (3,), np.uint8)
    return Picture(frame_id=frame_id, pixels=pixels, width_px=640, height_px=360, time_s=frame_id / 60)


def test_an_object_prompted_late_is_there_before_the_next_picture_where_nothing_is_dropped(
    stepped: tuple[Scheduler, SteppedTracker],
) -> None:
    scheduler, tracker = stepped
    stream = scheduler.open_stream(is_live=False, max_objects=2)
    show(stream, range(20))
    tracker.log.clear()
    prompted = stream.prompt(click(2))
    result = stream.offer(tiny_picture(20)).result(TIMEOUT_S)
    assert prompted.result(TIMEOUT_S).frame_id == 2
    assert [masklet.object_id for masklet in result.masklets] == [1]
    assert tracker.log == [*["catch_up"] * 8, "step"]


def test_a_live_stream_under_load_catches_up_in_its_ticks_and_after_them_and_loses_none(
    stepped: tuple[Scheduler, SteppedTracker],
) -> None:
    scheduler, tracker = stepped
    stream = scheduler.open_stream(is_live=True, max_objects=2)
    show(stream, range(1))
    stream.prompt(click(0, object_id=2)).result(TIMEOUT_S)
    show(stream, range(1, 20))
    futures: list[Future[FrameMasklets]] = []

    def offer_next() -> None:
        if len(futures) < 20:
            futures.append(stream.offer(tiny_picture(20 + len(futures))))

    tracker.on_step = offer_next  # from now on a picture always waits
    tracker.log.clear()
    offer_next()
    stream.prompt(click(2)).result(TIMEOUT_S)
    deadline = time.monotonic() + TIMEOUT_S
    while len(futures) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    results = [future.result(TIMEOUT_S) for future in futures]
    assert tracker.log.count("step") == 20
    way = tracker.log[tracker.log.index("catch_up") - 1 :]
    assert way[:8] == ["step", "catch_up"] * 4, "eight stops: a row of each tick, a step after it"
    assert "catch_up" not in way[8:]
    numbers = [[masklet.object_id for masklet in result.masklets] for result in results]
    assert all(2 in ids for ids in numbers), "the other object is on every frame"
    first = next(index for index, ids in enumerate(numbers) if 1 in ids)
    assert first <= 5
    assert all(1 in ids for ids in numbers[first:])


def test_live_pictures_wait_for_one_step_of_another_streams_way_at_most(
    stepped: tuple[Scheduler, SteppedTracker],
) -> None:
    scheduler, tracker = stepped
    recorded = scheduler.open_stream(is_live=False, max_objects=2)
    live = scheduler.open_stream(is_live=True, max_objects=2)
    show(recorded, range(20))
    show(live, range(1))
    futures: list[Future[FrameMasklets]] = []

    def offer_next() -> None:
        if len(futures) < 12:
            futures.append(live.offer(tiny_picture(1 + len(futures))))

    tracker.on_step = offer_next
    tracker.log.clear()
    recorded.prompt(click(2))
    offer_next()
    deadline = time.monotonic() + TIMEOUT_S
    while (len(futures) < 12 or tracker.log.count("catch_up") < 8) and time.monotonic() < deadline:
        time.sleep(0.01)
    tracker.on_step = lambda: None
    assert tracker.log.count("catch_up") == 8
    offered = tracker.log[tracker.log.index("step") :][:8]
    assert "catch_up, catch_up" not in ", ".join(offered)


class AnnouncedTracker(SteppedTracker):
    """Asks what is coming in every step, as on a GPU, and notes the numbers of the frames."""

    def __init__(self, kept_frames: int) -> None:
        super().__init__(kept_frames)
        self.announced: list[list[int]] = []
        self.tracked: list[list[int]] = []
        self.before_asking: Callable[[], None] = lambda: None

    def step(
        self,
        streams: list[StreamState],
        pictures: list[Picture],
        *,
        coming: Callable[[], list[Picture]] = list,
    ) -> Step:
        self.before_asking()
        self.announced.append([picture.frame_id for picture in coming()])
        self.tracked.append([picture.frame_id for picture in pictures])
        return super().step(streams, pictures)


@pytest.fixture
def announced() -> Iterator[tuple[Scheduler, AnnouncedTracker]]:
    scheduler, tracker = stepped_scheduler(kind=AnnouncedTracker)
    assert isinstance(tracker, AnnouncedTracker)
    yield scheduler, tracker
    scheduler.close()


def test_next_pictures_are_announced_once_every_stream_of_the_tick_has_one_and_are_then_not_replaced(
    announced: tuple[Scheduler, AnnouncedTracker],
) -> None:
    scheduler, tracker = announced
    streams = [scheduler.open_stream(is_live=True, max_objects=1) for _ in range(2)]
    late: list[Future[FrameMasklets]] = []
    asking: list[Callable[[], None]] = [
        lambda: late.append(streams[0].offer(tiny_picture(1))),
        lambda: late.extend(
            [*(stream.offer(tiny_picture(2)) for stream in streams), streams[1].offer(tiny_picture(3))]
        ),
    ]
    tracker.before_asking = lambda: asking.pop(0)() if asking else None
    tracker.on_step = lambda: (
        late.append(streams[0].offer(tiny_picture(4))) if len(tracker.announced) == 2 else None
    )
    with scheduler._wake:  # both in one tick
        first = [stream.offer(tiny_picture(0)) for stream in streams]
    for future in first:
        future.result(TIMEOUT_S)
    deadline = time.monotonic() + TIMEOUT_S
    while len(tracker.tracked) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert tracker.tracked == [[0, 0], [1], [2, 3], [4]]
    assert tracker.announced[0] == [], "the other stream has none yet"
    assert tracker.announced[1] == [2]
    results = [future.result(TIMEOUT_S) for future in late]
    assert [(result.frame_id, result.is_dropped) for result in results] == [
        (1, False),
        (2, False),
        (2, True),
        (3, False),
        (4, False),
    ], "only what had not begun was replaced"


def test_a_prompt_before_the_next_picture_keeps_it_from_being_announced(
    announced: tuple[Scheduler, AnnouncedTracker],
) -> None:
    scheduler, tracker = announced
    stream = scheduler.open_stream(is_live=True, max_objects=1)
    later: list[Future[FrameMasklets]] = []

    def prompt_and_offer() -> None:
        if not later:
            stream.prompt(click(0))
            later.append(stream.offer(tiny_picture(1)))

    tracker.before_asking = prompt_and_offer
    stream.offer(tiny_picture(0)).result(TIMEOUT_S)
    assert [one.object_id for one in later[0].result(TIMEOUT_S).masklets] == [1]
    assert tracker.announced == [[], []]


def test_a_stream_that_closes_after_its_next_picture_was_announced_holds_nobody_up(
    announced: tuple[Scheduler, AnnouncedTracker],
) -> None:
    scheduler, tracker = announced
    closing, other = (scheduler.open_stream(is_live=True, max_objects=1) for _ in range(2))
    waiting: list[Future[FrameMasklets]] = []
    tracker.before_asking = lambda: waiting.append(closing.offer(tiny_picture(1))) if not waiting else None
    tracker.on_step = closing.close
    closing.offer(tiny_picture(0)).result(TIMEOUT_S)
    assert tracker.announced[0] == [1]
    assert waiting[0].cancelled()
    assert not other.offer(tiny_picture(5)).result(TIMEOUT_S).is_dropped
    assert scheduler.is_healthy


def test_what_fails_while_the_next_pictures_are_asked_for_is_a_fault_and_leaves_nobody_waiting(
    announced: tuple[Scheduler, AnnouncedTracker],
) -> None:
    scheduler, tracker = announced
    stream = scheduler.open_stream(is_live=False, max_objects=1)

    def fail() -> None:
        raise torch.AcceleratorError("the device is gone")

    tracker.before_asking = fail
    futures = [stream.offer(tiny_picture(index)) for index in range(3)]
    for future in futures:
        with pytest.raises(DeviceFaultError):
            future.result(TIMEOUT_S)
    assert not scheduler.is_healthy


@pytest.mark.parametrize("is_live", [False, True])
def test_closing_a_stream_while_an_object_catches_up_frees_its_row(
    stepped: tuple[Scheduler, SteppedTracker], is_live: bool
) -> None:
    scheduler, tracker = stepped
    stream, other = (scheduler.open_stream(is_live=is_live, max_objects=2) for _ in range(2))
    show(stream, range(20))
    tracker.is_held = True
    stream.prompt(click(2)).result(TIMEOUT_S)
    waiting = stream.offer(tiny_picture(20))
    stream.close()
    tracker.release()
    show(other, range(2))
    assert waiting.done()
    assert tracker.pool.rows_in_use == 0
    assert scheduler.is_healthy


def test_a_tracker_that_cannot_write_memory_makes_the_scheduler_unhealthy_and_leaves_nobody_waiting() -> None:
    scheduler, _ = stepped_scheduler(kind=FailingTracker)
    stream = scheduler.open_stream(is_live=False, max_objects=1)
    assert not stream.offer(tiny_picture(0)).result(TIMEOUT_S).is_dropped
    with pytest.raises(DeviceFaultError, match="connect again"):
        stream.offer(tiny_picture(1)).result(TIMEOUT_S)
    scheduler.close()
    assert not scheduler.is_healthy
