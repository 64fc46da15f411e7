"""`bench-accuracy` on a folder of two small clips, with a tracker as good or bad as the test wants."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from trocar.cli import EngineOptions
from trocar_bench.accuracy import carry_by_flow, main
from trocar_bench.davis import OBJECTS_FILE, find_clips
from trocar_bench.jf import score_mask
from trocar_bench.rows import PROMPTS
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
from trocar_engines.memory.bank import BankConfig, MemoryPolicy
from trocar_engines.tracked import StreamState
from trocar_engines.tracker import Step

SIZE_PX = 64
"""Of pictures, masks and the fake's logits alike: nothing is resized, so a perfect tracker is exact."""
FRAMES = 7
LATE_FRAME = 3
"""Where object 2 of the clip "two" appears."""
EMPTY = np.zeros((SIZE_PX, SIZE_PX), np.bool_)
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


class _FakeStream(StreamState):
    """What was asked of one row on one clip."""

    def __init__(self, clip: str, bank: BankConfig, most_objects: int) -> None:
        super().__init__(bank=bank, most_objects=most_objects)
        self.clip = clip
        self.prompts: list[Prompt] = []
        self.seen: list[int] = []
        self.is_closed = False


class _FakeTracker:
    def __init__(self, model: "_FakeModel", bank: BankConfig, rows: int) -> None:
        self._model, self._bank, self._rows = model, bank, rows

    def open_stream(self, bank: BankConfig, most_objects: int) -> StreamState:
        streams = self._model.streams
        assert bank.slots <= self._bank.slots
        if all(stream.is_closed for stream in streams):
            self._model.clips_begun += 1
        stream = _FakeStream(self._model.clips[self._model.clips_begun - 1], bank, most_objects)
        streams.append(stream)
        assert sum(one.most_objects for one in streams if not one.is_closed) <= self._rows
        return stream

    def close_stream(self, stream: StreamState) -> None:
        assert isinstance(stream, _FakeStream)
        stream.is_closed = True

    def step(self, streams: list[StreamState], pictures: list[Picture]) -> Step:
        assert all(picture is pictures[0] for picture in pictures), "rows share one picture"
        assert pictures[0].pixels.shape == (SIZE_PX, SIZE_PX, 3)
        self._model.times_s.append(pictures[0].time_s)
        return Step(
            results=[self._track(stream, pictures[0].frame_id) for stream in streams],
            batches=[],
            begun_ns=[0] * len(streams),
        )

    def _track(self, stream: StreamState, frame: int) -> FrameMasklets:
        assert isinstance(stream, _FakeStream)
        stream.seen.append(frame)
        known = sorted({prompt.object_id for prompt in stream.prompts})
        return FrameMasklets(
            frame_id=frame, masklets=tuple(self._masklet(stream, object_id, frame) for object_id in known)
        )

    def remember(self, step: Step) -> None:
        pass

    def prompt(self, stream: StreamState, prompt: Prompt) -> PromptOutcome:
        assert isinstance(stream, _FakeStream)
        if self._model.refusal:
            raise InvalidPromptError(self._model.refusal)
        stream.prompts.append(prompt)
        assert stream.seen[-1] == prompt.frame_id
        masklet = self._masklet(stream, prompt.object_id, prompt.frame_id)
        return PromptOutcome(frame_id=prompt.frame_id, masklet=masklet)

    def _masklet(self, stream: _FakeStream, object_id: int, frame: int) -> Masklet:
        track = self._model.tracks.get(stream.bank.policy.value, self._model.track)
        mask = track(object_id, frame, _labels(stream.clip, frame) == object_id)
        return Masklet(
            object_id=object_id,
            state=ObjectState.VISIBLE,
            mask_logits=_to_logits(mask),
            predicted_iou=1.0,
            presence=1.0,
            class_name="hook",
            class_probability=0.75,
            frames_since_seen=0,
        )


class _FakeCard:
    name = "fake-nano"
    input_size_px = SIZE_PX
    weights_hash = "0" * 16
    runtime = "fake"
    classes = ("hook", "grasper")
    policies = ("vanilla", "fifo")


class _FakeModel:
    """Hands out a tracker that knows the clips.

    Args:
        track: what it says of an object.
        clips: in the order in which they come.
        tracks: what it says under a policy, where that differs.
        refusal: why it refuses every prompt.
    """

    default_policy = "fifo"
    most_recent_slots = 6

    def __init__(
        self,
        track: Track,
        clips: tuple[str, ...] = ("one", "two"),
        tracks: dict[str, Track] | None = None,
        refusal: str = "",
    ) -> None:
        self.track, self.clips, self.tracks, self.refusal = track, clips, tracks or {}, refusal
        self.streams: list[_FakeStream] = []
        self.clips_begun = 0
        self.times_s: list[float] = []
        self.options = EngineOptions()
        self.card = _FakeCard()

    def __call__(self, options: EngineOptions) -> "_FakeModel":
        self.options = options
        return self

    def bank(self, policy: str) -> BankConfig:
        return BankConfig(policy=MemoryPolicy(policy))

    def open_tracker(self, bank: BankConfig, rows: int, streams: int) -> _FakeTracker:
        return _FakeTracker(self, bank, rows)


def _know_everything(object_id: int, frame: int, truth: BoolArray) -> BoolArray:
    return truth


def _see_nothing(object_id: int, frame: int, truth: BoolArray) -> BoolArray:
    return EMPTY


def _run(capsys: pytest.CaptureFixture[str], model: _FakeModel, *arguments: object) -> dict[str, Any]:
    assert main([str(argument) for argument in arguments], open_model=model) == 0
    summary: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return summary


@pytest.mark.parametrize("prompt", PROMPTS)
def test_perfect_tracker_scores_100(folder: Path, capsys: pytest.CaptureFixture[str], prompt: str) -> None:
    model = _FakeModel(_know_everything)
    summary = _run(capsys, model, folder, "--prompt", prompt)
    assert summary.pop("fps") > 0
    (row,) = summary.pop("rows")
    assert summary == {
        "jf": 100.0,
        "jf_visible": 100.0,
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
    assert (row["presence_precision"], row["presence_recall"], row["switches"]) == (100, 100, 0)
    assert row["jf_interval"] == [100, 100]
    assert row["by_object"]["two/2"]["presence_recall"] == 100
    assert all(stream.is_closed for stream in model.streams)


def test_tracker_that_sees_nothing_scores_what_is_absent(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Object 1 of "one" is absent on two of its six scored frames: an empty mask is right there.
    for frame in (4, 5):
        _write_mask(folder, "one", frame, np.zeros((SIZE_PX, SIZE_PX), np.uint8))
    summary = _run(capsys, _FakeModel(_see_nothing), folder, "--prompt", "mask")
    assert summary["clips"] == {"one": pytest.approx(100 * 2 / 6, abs=0.01), "two": 0.0}
    assert summary["jf"] == pytest.approx(100 * 2 / 6 / 3, abs=0.01)


def test_figures_are_means_over_objects(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def know_first(object_id: int, frame: int, truth: BoolArray) -> BoolArray:
        return truth if object_id == 1 else EMPTY

    summary = _run(capsys, _FakeModel(know_first), folder, "--prompt", "mask")
    assert summary["clips"] == {"one": 100.0, "two": 50.0}
    assert summary["jf"] == pytest.approx(100 * 2 / 3, abs=0.01)


def test_object_is_prompted_where_it_appears(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = _FakeModel(_know_everything)
    _run(capsys, model, folder, "--prompt", "mask")
    prompts = [(prompt.object_id, prompt.frame_id) for prompt in model.streams[1].prompts]
    assert prompts == [(1, 0), (2, LATE_FRAME)]
    assert model.streams[1].most_objects == 2
    mask = model.streams[1].prompts[1].mask
    assert mask is not None
    assert np.array_equal(mask, _labels("two", LATE_FRAME) == 2)


def test_box_surrounds_the_object(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = _FakeModel(_know_everything)
    _run(capsys, model, folder, "--prompt", "box", "--clips", "one")
    assert model.streams[0].prompts[0].box == (10, 10, 30, 30)


def test_click_lies_farthest_from_the_edge(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = _FakeModel(_know_everything)
    _run(capsys, model, folder, "--prompt", "click1", "--clips", "one")
    (prompt,) = model.streams[0].prompts
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

    model = _FakeModel(improve)
    _run(capsys, model, folder, "--prompt", "click3", "--clips", "one")
    prompts = model.streams[0].prompts
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
    model = _FakeModel(fail_on_odd_frames)
    summary = _run(capsys, model, folder, "--prompt", "mask", "--clips", "one")
    assert summary["jf"] == 100
    assert model.streams[0].seen == list(range(FRAMES))


def test_object_of_the_last_mask_is_named_and_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label = _labels("one", FRAMES - 1)
    label[50:, 50:] = 7
    _write_mask(folder, "one", FRAMES - 1, label)
    model = _FakeModel(_know_everything)
    assert main([str(folder), "--prompt", "mask", "--clips", "one"], open_model=model) == 0
    output = capsys.readouterr()
    assert json.loads(output.out.splitlines()[-1])["objects"] == 1
    assert "object 7 appears on the last mask only" in output.err


def test_pixel_belongs_to_one_object(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Object 1 claims the whole picture with the same logit as object 2: the first keeps it.
    def claim_all(object_id: int, frame: int, truth: BoolArray) -> BoolArray:
        return ~EMPTY if object_id == 1 else truth

    summary = _run(capsys, _FakeModel(claim_all, ("two",)), folder, "--prompt", "mask", "--clips", "two")
    # Object 2 of 200 pixels gets none.
    assert summary["f"] == 0
    assert summary["j"] == pytest.approx(100 * 400 / SIZE_PX**2 / 2, abs=0.01)


def test_options_reach_the_tracker(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = _FakeModel(_know_everything)
    arguments = ("--model", "m", "--memory", "vanilla", "--runtime", "eager")
    _run(capsys, model, folder, "--prompt", "mask", *arguments)
    assert (model.options.model, model.options.memory, model.options.runtime) == arguments[1::2]


def test_floor_is_reported_beside_the_tracker(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The pictures never change, so flow leaves every mask where it was: right for object 2 of "two" only.
    summary = _run(capsys, _FakeModel(_know_everything), folder, "--prompt", "mask", "--floor")
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


def _number_beyond_255(folder: Path) -> Path:
    path = _mask_path(folder, "two", 4)
    Image.fromarray(_labels("two", 4).astype(np.uint16) * 257).save(path)  # wraps to ids 1 and 2
    return path


@pytest.mark.parametrize(
    "damage",
    [
        _number_beyond_255,
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
    model = _FakeModel(_know_everything)
    assert main([str(folder), "--prompt", "mask"], open_model=model) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith(f"bench-accuracy: {culprit}")
    assert output.out == ""
    assert not model.streams


def test_unknown_clip_is_told_with_those_there_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folder), "--prompt", "mask", "--clips", "one,three"]
    assert main(arguments, open_model=_FakeModel(_know_everything)) == 2
    assert "holds no clip three; it holds one, two" in capsys.readouterr().err


def test_refused_prompt_names_its_mask(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = _FakeModel(_know_everything, refusal="not today")
    assert main([str(folder), "--prompt", "mask"], open_model=model) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"bench-accuracy: tracking one, {FRAMES} frames",
        f"bench-accuracy: {_mask_path(folder, 'one', 0)}: object 1: not today",
    ]
    assert model.streams[0].is_closed


# --- rows of one pass -----------------------------------------------------------------------------------


def test_every_policy_of_the_engine_and_every_prompt_is_a_row(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = _FakeModel(_know_everything)
    summary = _run(capsys, model, folder, "--prompt", "all", "--policies", "all", "--clips", "one")
    rows = [(row["policy"], row["prompt"]) for row in summary["rows"]]
    assert rows == [(policy.value, prompt) for policy in MemoryPolicy for prompt in PROMPTS]
    # Every picture was shown once, to all rows together.
    assert len(model.times_s) == FRAMES
    assert [len(stream.prompts) for stream in model.streams[: len(PROMPTS)]] == [1, 3, 5, 1, 1]


def test_ablation_is_one_more_row_with_its_setting(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = _FakeModel(_know_everything)
    ablations = ("--ablate", "long_term_slots=0", "--ablate", "candidate_interval_s=1.5,candidate_run=2")
    summary = _run(capsys, model, folder, "--prompt", "box", "--clips", "one", *ablations)
    assert [row["ablation"] for row in summary["rows"]] == ["", *ablations[1::2]]
    plain, first, second = (stream.bank for stream in model.streams)
    assert plain == BankConfig()
    assert first == BankConfig(long_term_slots=0)
    assert second == BankConfig(candidate_interval_s=1.5, candidate_run=2)


def test_ablation_that_changes_nothing_is_no_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ablation = f"candidate_run={BankConfig().candidate_run}"
    arguments = ("--prompt", "box", "--clips", "one", "--ablate", ablation)
    assert len(_run(capsys, _FakeModel(_know_everything), folder, *arguments)["rows"]) == 1


@pytest.mark.parametrize(
    ("ablation", "message"),
    [
        ("forgetting=1", "expected FIELD=VALUE with a FIELD of recent_slots"),
        ("long_term_slots=many", "'many' is no int"),
        ("recent_slots=0", "expected 1 to 6"),
        ("recent_slots=7", "expected 1 to 6"),
        ("long_term_slots=-1", "must not be negative"),
    ],
)
def test_impossible_ablation_is_told_in_a_line(
    folder: Path, capsys: pytest.CaptureFixture[str], ablation: str, message: str
) -> None:
    model = _FakeModel(_know_everything)
    assert main([str(folder), "--ablate", ablation], open_model=model) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not model.streams


def test_gain_is_told_over_vanilla_with_an_interval(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def know_half(object_id: int, frame: int, truth: BoolArray) -> BoolArray:
        return truth if frame % 2 else EMPTY

    model = _FakeModel(_know_everything, tracks={"vanilla": know_half})
    summary = _run(capsys, model, folder, "--prompt", "mask", "--policies", "fifo,vanilla")
    fifo, vanilla = summary["rows"]
    assert fifo["jf"] == summary["jf"] == 100
    assert vanilla["jf"] < 60
    assert "gain" not in vanilla
    assert fifo["gain"]["over"] == "vanilla mask"
    assert fifo["gain"]["jf_visible"] == pytest.approx(100 - vanilla["jf_visible"], abs=0.02)
    low, high = fifo["gain"]["interval"]
    assert 0 < low <= fifo["gain"]["jf_visible"] <= high


def test_neither_folder_nor_longsim_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], open_model=_FakeModel(_know_everything)) == 2
    assert "expected either FOLDER or --longsim" in capsys.readouterr().err


def test_unknown_policy_is_told_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["folder", "--policies", "fifo,none"])
    assert stop.value.code == 2
    assert "expected some of vanilla, fifo" in capsys.readouterr().err


def test_row_of_the_shipped_model_scores_the_same_in_company_and_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> dict[str, Any]:
        options = [str(folder), "--clips", "one", "--runtime", "eager", "--prompt", "mask", *arguments]
        assert main(options) == 0
        summary: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return summary

    vanilla, fifo = run("--policies", "vanilla,fifo")["rows"]
    alone = run("--memory", "fifo")
    assert 0 < alone["jf"] < 100
    # Batches of other sizes round differently.
    assert fifo["jf"] == pytest.approx(alone["jf"], abs=0.5)
    assert (vanilla["policy"], fifo["policy"], alone["memory"]) == ("vanilla", "fifo", "fifo")


# --- facts beside the masks -----------------------------------------------------------------------------


def _write_facts(folder: Path, objects: dict[int, dict[str, object]]) -> None:
    facts = {"clips": {"two": {"frame_rate_hz": 2.0, "objects": objects}}}
    (folder / OBJECTS_FILE).write_text(json.dumps(facts))


def test_facts_say_whom_to_prompt_and_how_fast_the_clip_is(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_facts(folder, {2: {"is_prompted": False}})
    model = _FakeModel(_know_everything, ("two",))
    summary = _run(capsys, model, folder, "--prompt", "mask", "--clips", "two")
    assert summary["objects"] == 1
    assert [prompt.object_id for prompt in model.streams[0].prompts] == [1]
    assert model.times_s[:3] == [0, 0.5, 1.0]


def test_known_class_is_scored_with_its_calibration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The tracker calls everything a hook with probability 0.75 and is right on one object of two.
    _write_facts(folder, {1: {"class_name": "hook"}, 2: {"class_name": "grasper"}})
    summary = _run(
        capsys, _FakeModel(_know_everything, ("two",)), folder, "--prompt", "mask", "--clips", "two"
    )
    (row,) = summary["rows"]
    assert row["class_accuracy"] == 50
    right = (FRAMES - 1) / (FRAMES - 1 + FRAMES - 1 - LATE_FRAME)
    assert row["class_calibration_error"] == pytest.approx(abs(0.75 - right), abs=0.01)


def test_object_apart_stays_out_of_the_means(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def know_first(object_id: int, frame: int, truth: BoolArray) -> BoolArray:
        return truth if object_id == 1 else EMPTY

    _write_facts(folder, {2: {"class_name": "fan_retractor", "is_apart": True}})
    summary = _run(capsys, _FakeModel(know_first, ("two",)), folder, "--prompt", "mask", "--clips", "two")
    (row,) = summary["rows"]
    assert (summary["jf"], summary["objects"]) == (100, 1)
    assert (row["apart"]["jf"], row["apart"]["objects"]) == (0, 1)


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        '{"clips": {"two": {"frame_rate_hz": 2, "objects": {"2": {"colour": "red"}}}}}',
        '{"clips": {"two": {"frame_rate_hz": 0, "objects": {}}}}',
        "[]",
    ],
)
def test_unreadable_facts_are_told_in_a_line(
    folder: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (folder / OBJECTS_FILE).write_text(text)
    assert main([str(folder)], open_model=_FakeModel(_know_everything)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bench-accuracy: {folder / OBJECTS_FILE}: cannot be read as facts")


# --- the plot -------------------------------------------------------------------------------------------


def test_plot_shows_the_drop_of_a_tracker_that_fails(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "j.png"
    arguments = ("--prompt", "mask", "--plot", path)
    _run(capsys, _FakeModel(_know_everything), folder, *arguments)
    perfect = np.asarray(Image.open(path))
    _run(capsys, _FakeModel(_see_nothing), folder, *arguments)
    nothing = np.asarray(Image.open(path))
    assert perfect.shape == nothing.shape
    assert min(perfect.shape[:2]) > 200
    assert not np.array_equal(perfect, nothing)


@pytest.mark.parametrize("name", ["j.svg", "nowhere/j.png"])
def test_impossible_plot_is_told_before_any_work(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    model = _FakeModel(_know_everything)
    assert main([str(folder), "--plot", str(folder / name)], open_model=model) == 2
    assert "--plot" in capsys.readouterr().err
    assert not model.streams


def test_plot_without_matplotlib_names_the_install_command(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(folder), "--plot", str(folder / "j.png")], open_model=_FakeModel(_know_everything)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'matplotlib>=3.10,<4'" in line
