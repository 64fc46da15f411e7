"""`bench-accuracy` on a folder of two small clips, with a tracker as good or bad as the test wants."""

import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import pytest
from PIL import Image

from trocar.cli import EngineOptions
from trocar_bench.accuracy import MOST_OUTSTANDING, PROMPTS, carry_by_flow, main
from trocar_bench.davis import find_clips
from trocar_bench.jf import score_mask
from trocar_engines.errors import InvalidPromptError
from trocar_engines.masklets import (
    BoolArray,
    Float32Array,
    FrameMasklets,
    Masklet,
    ObjectState,
    Picture,
    Prompt,
    PromptOutcome,
    UInt8Array,
)

SIZE_PX = 64
"""Of pictures, masks and the fake's logits alike: nothing is resized, so a perfect tracker is exact."""
FRAMES = 7
LATE_FRAME = 3
"""Where object 2 of the clip "two" appears."""
EMPTY = np.zeros((SIZE_PX, SIZE_PX), np.bool_)
Result = TypeVar("Result")
Track = Callable[[int, int, BoolArray], BoolArray]
"""Object, frame and its truth to what the tracker says."""


def _labels(clip: str, frame: int) -> UInt8Array:
    """Object 1 moves right a pixel a frame; in the clip "two" object 2 stands still from `LATE_FRAME` on."""
    label = np.zeros((SIZE_PX, SIZE_PX), np.uint8)
    label[10:30, 10 + frame : 30 + frame] = 1
    if clip == "two" and frame >= LATE_FRAME:
        label[40:60, 40:50] = 2
    return label


def _texture() -> UInt8Array:
    return np.random.default_rng(0).integers(0, 256, (SIZE_PX, SIZE_PX, 3), np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for clip in ("one", "two"):
        for frame in range(FRAMES):
            _write_frame(tmp_path, clip, frame, _texture())
            _write_mask(tmp_path, clip, frame, _labels(clip, frame))
    return tmp_path


def _frame_path(folder: Path, clip: str, frame: int) -> Path:
    return folder / "JPEGImages" / clip / f"{frame:05d}.jpg"


def _mask_path(folder: Path, clip: str, frame: int) -> Path:
    return folder / "Annotations" / clip / f"{frame:05d}.png"


def _write_frame(folder: Path, clip: str, frame: int, picture: UInt8Array) -> None:
    path = _frame_path(folder, clip, frame)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), picture)


def _write_mask(folder: Path, clip: str, frame: int, label: UInt8Array) -> None:
    path = _mask_path(folder, clip, frame)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label).convert("P")
    image.putpalette([value for index in range(256) for value in (index, 0, 0)])
    image.save(path)


def _to_logits(mask: BoolArray) -> Float32Array:
    return np.where(mask, np.float32(8), np.float32(-8))


class _LazyFuture(Future[Result]):
    """Runs what waits, up to its own work, when its result is asked for: a worker without a thread."""

    def __init__(self, stream: "_FakeStream", work: Callable[[], Result]) -> None:
        super().__init__()
        self._stream = stream
        self._work = work

    def run(self) -> None:
        try:
            self.set_result(self._work())
        except Exception as error:
            self.set_exception(error)

    def result(self, timeout: float | None = None) -> Result:
        while not self.done():
            self._stream.run_next()
        return super().result(timeout)


class _FakeStream:
    input_size_px = SIZE_PX

    def __init__(self, clip: str, track: Track, max_objects: int) -> None:
        self.clip = clip
        self.track = track
        self.max_objects = max_objects
        self.prompts: list[Prompt] = []
        self.seen: list[int] = []
        self.most_waiting = 0
        self.is_closed = False
        self._queue: list[_LazyFuture[Any]] = []

    def offer(self, picture: Picture) -> Future[FrameMasklets]:
        assert picture.pixels.shape == (SIZE_PX, SIZE_PX, 3)
        self.seen.append(picture.frame_id)
        known = {prompt.object_id for prompt in self.prompts}
        future = _LazyFuture(self, lambda: self._step(picture.frame_id, known))
        self._queue.append(future)
        self.most_waiting = max(self.most_waiting, len(self._queue))
        return future

    def prompt(self, prompt: Prompt) -> Future[PromptOutcome]:
        self.prompts.append(prompt)
        assert self.seen[-1] == prompt.frame_id
        masklet = self._masklet(prompt.object_id, prompt.frame_id)
        future = _LazyFuture(self, lambda: PromptOutcome(frame_id=prompt.frame_id, masklet=masklet))
        self._queue.append(future)
        return future

    def remove_object(self, object_id: int) -> Future[None]:
        raise NotImplementedError

    def reset(self) -> Future[None]:
        raise NotImplementedError

    def close(self) -> None:
        self.is_closed = True

    def run_next(self) -> None:
        self._queue.pop(0).run()

    def _step(self, frame: int, known: set[int]) -> FrameMasklets:
        return FrameMasklets(
            frame_id=frame, masklets=tuple(self._masklet(object_id, frame) for object_id in sorted(known))
        )

    def _masklet(self, object_id: int, frame: int) -> Masklet:
        mask = self.track(object_id, frame, _labels(self.clip, frame) == object_id)
        return Masklet(
            object_id=object_id,
            state=ObjectState.VISIBLE,
            mask_logits=_to_logits(mask),
            predicted_iou=1.0,
            presence=1.0,
            class_name="unknown",
            class_probability=0.0,
            frames_since_seen=0,
        )


class _FakeCard:
    name = "fake-nano"
    input_size_px = SIZE_PX
    weights_hash = "0" * 16
    runtime = "fake"
    classes = ()
    policies = ("vanilla", "fifo")


class _FakeScheduler:
    """Opens a stream for each clip in turn.

    Args:
        track: what it says of an object.
        clips: in the order in which they come.
    """

    model_names = ("fake-nano",)
    default_model = "fake-nano"
    default_memory = "fifo"
    is_healthy = True

    def __init__(self, track: Track, clips: tuple[str, ...] = ("one", "two")) -> None:
        self.streams: list[_FakeStream] = []
        self.options = EngineOptions()
        self.is_closed = False
        self._track = track
        self._clips = clips

    def __call__(self, options: EngineOptions) -> "_FakeScheduler":
        self.options = options
        return self

    def open_stream(self, *, model: str, memory: str | None, is_live: bool, max_objects: int) -> _FakeStream:
        assert not is_live
        stream = _FakeStream(self._clips[len(self.streams)], self._track, max_objects)
        self.streams.append(stream)
        return stream

    def model_card(self, model: str) -> _FakeCard:
        return _FakeCard()

    def warm_up(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


def _know_everything(object_id: int, frame: int, truth: BoolArray) -> BoolArray:
    return truth


def _see_nothing(object_id: int, frame: int, truth: BoolArray) -> BoolArray:
    return EMPTY


def _run(capsys: pytest.CaptureFixture[str], scheduler: _FakeScheduler, *arguments: object) -> dict[str, Any]:
    assert main([str(argument) for argument in arguments], start_scheduler=scheduler) == 0
    summary: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return summary


@pytest.mark.parametrize("prompt", PROMPTS)
def test_perfect_tracker_scores_100(folder: Path, capsys: pytest.CaptureFixture[str], prompt: str) -> None:
    scheduler = _FakeScheduler(_know_everything)
    summary = _run(capsys, scheduler, folder, "--prompt", prompt)
    assert summary.pop("fps") > 0
    assert summary == {
        "jf": 100.0,
        "j": 100.0,
        "f": 100.0,
        "objects": 3,
        "clips": {"one": 100.0, "two": 100.0},
        "prompt": prompt,
        "model": "fake-nano",
        "weights_hash": "0" * 16,
        "memory": "fifo",
        "runtime": "fake",
        "frames": 2 * FRAMES,
    }
    assert scheduler.is_closed
    assert all(stream.is_closed for stream in scheduler.streams)


def test_tracker_that_sees_nothing_scores_what_is_absent(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Object 1 of "one" is absent on two of its six scored frames: an empty mask is right there.
    for frame in (4, 5):
        _write_mask(folder, "one", frame, np.zeros((SIZE_PX, SIZE_PX), np.uint8))
    summary = _run(capsys, _FakeScheduler(_see_nothing), folder, "--prompt", "mask")
    assert summary["clips"] == {"one": pytest.approx(100 * 2 / 6, abs=0.01), "two": 0.0}
    assert summary["jf"] == pytest.approx(100 * 2 / 6 / 3, abs=0.01)


def test_figures_are_means_over_objects(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def know_first(object_id: int, frame: int, truth: BoolArray) -> BoolArray:
        return truth if object_id == 1 else EMPTY

    summary = _run(capsys, _FakeScheduler(know_first), folder, "--prompt", "mask")
    assert summary["clips"] == {"one": 100.0, "two": 50.0}
    assert summary["jf"] == pytest.approx(100 * 2 / 3, abs=0.01)


def test_object_is_prompted_where_it_appears(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scheduler = _FakeScheduler(_know_everything)
    _run(capsys, scheduler, folder, "--prompt", "mask")
    prompts = [(prompt.object_id, prompt.frame_id) for prompt in scheduler.streams[1].prompts]
    assert prompts == [(1, 0), (2, LATE_FRAME)]
    assert scheduler.streams[1].max_objects == 2
    mask = scheduler.streams[1].prompts[1].mask
    assert mask is not None
    assert np.array_equal(mask, _labels("two", LATE_FRAME) == 2)


def test_box_surrounds_the_object(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scheduler = _FakeScheduler(_know_everything)
    _run(capsys, scheduler, folder, "--prompt", "box", "--clips", "one")
    assert scheduler.streams[0].prompts[0].box == (10, 10, 30, 30)


def test_click_lies_farthest_from_the_edge(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scheduler = _FakeScheduler(_know_everything)
    _run(capsys, scheduler, folder, "--prompt", "click1", "--clips", "one")
    (prompt,) = scheduler.streams[0].prompts
    (point,) = prompt.points
    assert prompt.labels == (1,)
    assert all(coordinate in {19, 20} for coordinate in point)


def test_further_clicks_lie_where_the_prediction_is_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter(
        [
            _labels("one", 0) * (np.arange(SIZE_PX) < 15) == 1,  # misses columns 15 to 29
            _labels("one", 0) + np.pad(np.ones((9, 9), np.uint8), ((50, 5), (50, 5))) > 0,  # has too much
            _labels("one", 0) == 1,
        ]
    )

    def improve(object_id: int, frame: int, truth: BoolArray) -> BoolArray:
        return next(answers) if frame == 0 else truth

    scheduler = _FakeScheduler(improve)
    _run(capsys, scheduler, folder, "--prompt", "click3", "--clips", "one")
    prompts = scheduler.streams[0].prompts
    assert [prompt.labels for prompt in prompts] == [(1,), (1,), (0,)]
    assert 15 <= prompts[1].points[0][0] < 30
    assert prompts[2].points[0] == (54, 54)


def test_frames_without_mask_are_tracked_but_not_scored(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_on_odd_frames(object_id: int, frame: int, truth: BoolArray) -> BoolArray:
        return EMPTY if frame % 2 else truth

    for frame in range(1, FRAMES, 2):
        _mask_path(folder, "one", frame).unlink()
    scheduler = _FakeScheduler(fail_on_odd_frames)
    summary = _run(capsys, scheduler, folder, "--prompt", "mask", "--clips", "one")
    assert summary["jf"] == 100
    assert scheduler.streams[0].seen == list(range(FRAMES))


def test_object_of_the_last_mask_is_named_and_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label = _labels("one", FRAMES - 1)
    label[50:, 50:] = 7
    _write_mask(folder, "one", FRAMES - 1, label)
    scheduler = _FakeScheduler(_know_everything)
    assert main([str(folder), "--prompt", "mask", "--clips", "one"], start_scheduler=scheduler) == 0
    output = capsys.readouterr()
    assert json.loads(output.out.splitlines()[-1])["objects"] == 1
    assert "object 7 appears on the last mask only" in output.err


def test_few_pictures_are_outstanding(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scheduler = _FakeScheduler(_know_everything)
    _run(capsys, scheduler, folder, "--prompt", "mask")
    assert 1 < max(stream.most_waiting for stream in scheduler.streams) <= MOST_OUTSTANDING


def test_pixel_belongs_to_one_object(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Object 1 claims the whole picture with the same logit as object 2: the first keeps it.
    def claim_all(object_id: int, frame: int, truth: BoolArray) -> BoolArray:
        return ~EMPTY if object_id == 1 else truth

    summary = _run(capsys, _FakeScheduler(claim_all, ("two",)), folder, "--prompt", "mask", "--clips", "two")
    # Object 2 of 200 pixels gets none.
    assert summary["f"] == 0
    assert summary["j"] == pytest.approx(100 * 400 / SIZE_PX**2 / 2, abs=0.01)


def test_options_reach_the_tracker(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scheduler = _FakeScheduler(_know_everything)
    arguments = ("--model", "m", "--memory", "vanilla", "--runtime", "eager")
    _run(capsys, scheduler, folder, "--prompt", "mask", *arguments)
    assert (scheduler.options.model, scheduler.options.memory, scheduler.options.runtime) == arguments[1::2]


def test_floor_is_reported_beside_the_tracker(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The pictures never change, so flow leaves every mask where it was: right for object 2 of "two" only.
    summary = _run(capsys, _FakeScheduler(_know_everything), folder, "--prompt", "mask", "--floor")
    first, second = summary["floor_clips"]["one"], summary["floor_clips"]["two"]
    assert summary["jf"] == 100
    assert 0 < first < 100
    assert second == pytest.approx((first + 100) / 2, abs=0.01)
    assert summary["floor_jf"] == pytest.approx((2 * first + 100) / 3, abs=0.01)


def test_flow_carries_a_mask_along(folder: Path) -> None:
    # Texture and object move right together, a pixel a frame.
    texture = cv2.GaussianBlur(_texture(), (0, 0), 2).astype(np.uint8)
    for frame in range(FRAMES):
        moved = np.roll(texture, frame, axis=1)
        _write_frame(folder, "one", frame, moved)
    (clip,) = find_clips(folder, ["one"], lambda: None)
    carried = list(carry_by_flow(clip))
    assert carried[0] == {}  # what the prompt shows is not carried yet
    last = score_mask(carried[-1][1], _labels("one", FRAMES - 1) == 1)
    stuck = score_mask(_labels("one", 0) == 1, _labels("one", FRAMES - 1) == 1)
    assert last.region_similarity > 0.9 > stuck.region_similarity


def _remove_masks(folder: Path) -> Path:
    for path in (folder / "Annotations" / "one").iterdir():
        path.unlink()
    return folder / "Annotations" / "one"


def _remove_annotations(folder: Path) -> Path:
    (folder / "Annotations").rename(folder / "Masks")
    return folder


def _remove_frame(folder: Path) -> Path:
    _frame_path(folder, "one", 2).unlink()
    return _mask_path(folder, "one", 2)


def _remove_frames(folder: Path) -> Path:
    (folder / "JPEGImages" / "two").rename(folder / "two")
    return folder / "Annotations" / "two"


def _shrink_mask(folder: Path) -> Path:
    _write_mask(folder, "two", 4, _labels("two", 4)[::2])
    return _mask_path(folder, "two", 4)


def _shrink_frame(folder: Path) -> Path:
    _write_frame(folder, "two", 4, np.zeros((SIZE_PX, 32, 3), np.uint8))
    return _frame_path(folder, "two", 4)


def _keep_one_frame(folder: Path) -> Path:
    for frame in range(1, FRAMES):
        _frame_path(folder, "one", frame).unlink()
        _mask_path(folder, "one", frame).unlink()
    return folder / "JPEGImages" / "one"


def _keep_one_mask(folder: Path) -> Path:
    for frame in range(1, FRAMES):
        _mask_path(folder, "one", frame).unlink()
    return _mask_path(folder, "one", 0)


def _empty_masks(folder: Path) -> Path:
    for frame in range(FRAMES):
        _write_mask(folder, "one", frame, np.zeros((SIZE_PX, SIZE_PX), np.uint8))
    return folder / "Annotations" / "one"


def _break_mask(folder: Path) -> Path:
    _mask_path(folder, "one", 2).write_text("no picture")
    return _mask_path(folder, "one", 2)


def _break_frame(folder: Path) -> Path:
    _frame_path(folder, "one", 2).write_text("no picture")
    return _frame_path(folder, "one", 2)


@pytest.mark.parametrize(
    "damage",
    [
        _remove_annotations,
        _remove_masks,
        _remove_frame,
        _remove_frames,
        _shrink_mask,
        _shrink_frame,
        _keep_one_frame,
        _keep_one_mask,
        _empty_masks,
        _break_mask,
        _break_frame,
    ],
)
def test_unusable_folder_is_told_in_a_line(
    folder: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], Path]
) -> None:
    culprit = damage(folder)
    scheduler = _FakeScheduler(_know_everything)
    assert main([str(folder), "--prompt", "mask"], start_scheduler=scheduler) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith(f"bench-accuracy: {culprit}")
    assert output.out == ""
    assert not scheduler.streams


def test_unknown_clip_is_told_with_those_there_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folder), "--prompt", "mask", "--clips", "one,three"]
    assert main(arguments, start_scheduler=_FakeScheduler(_know_everything)) == 2
    assert "holds no clip three; it holds one, two" in capsys.readouterr().err


def test_refused_prompt_names_its_mask(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Refusing(_FakeStream):
        def prompt(self, prompt: Prompt) -> Future[PromptOutcome]:
            future: Future[PromptOutcome] = Future()
            future.set_exception(InvalidPromptError("not today"))
            return future

    class RefusingScheduler(_FakeScheduler):
        def open_stream(
            self, *, model: str, memory: str | None, is_live: bool, max_objects: int
        ) -> _FakeStream:
            self.streams.append(Refusing("one", self._track, max_objects))
            return self.streams[-1]

    scheduler = RefusingScheduler(_know_everything)
    assert main([str(folder), "--prompt", "mask"], start_scheduler=scheduler) == 2
    assert capsys.readouterr().err == (
        f"bench-accuracy: {_mask_path(folder, 'one', 0)}: object 1: not today\n"
    )
    assert scheduler.streams[0].is_closed
    assert scheduler.is_closed
