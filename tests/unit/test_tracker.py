import dataclasses
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from networks import TINY, lively_network
from trocar_engines.errors import CapacityError, FrameNotKeptError, InvalidPromptError, UnknownObjectError
from trocar_engines.masklets import ObjectState, Picture, Prompt, PromptMode
from trocar_engines.memory.bank import BankConfig, MemoryPolicy
from trocar_engines.network.sam2s import Decoded, ImageFeatures, PromptTensors, Recognition
from trocar_engines.runtime.eager import EagerRuntime
from trocar_engines.runtime.interface import MOST_LOOKS
from trocar_engines.tracked import SOUND_IOU, UNKNOWN_CLASS, StreamState
from trocar_engines.tracker import Tracker, TrackerConfig

BANK = BankConfig(recent_slots=3, candidate_iou=0.0, candidate_interval_s=0.0)
WIDTH, HEIGHT = 160, 90


def make_tracker(rows: int = 4) -> Tracker:
    return Tracker(EagerRuntime(lively_network()), TrackerConfig(rows=rows, bank=BANK))


def picture(frame_id: int, seed: int | None = None) -> Picture:
    rng = np.random.default_rng(frame_id if seed is None else seed)
    pixels = rng.integers(0, 255, (TINY.input_size_px, TINY.input_size_px, 3), dtype=np.uint8)
    return Picture(frame_id=frame_id, pixels=pixels, width_px=WIDTH, height_px=HEIGHT, time_s=frame_id / 30)


def click(object_id: int, frame_id: int, x: float = 80, y: float = 45, **more: object) -> Prompt:
    return Prompt(object_id=object_id, frame_id=frame_id, points=((x, y),), labels=(1,), **more)  # type: ignore[arg-type]


def advance(
    tracker: Tracker, streams: list[StreamState], pictures: list[Picture]
) -> list[tuple[np.ndarray, ...]]:
    step = tracker.step(streams, pictures)
    tracker.remember(step)
    return [tuple(masklet.mask_logits for masklet in result.masklets) for result in step.results]


def test_prompted_object_is_tracked_from_the_next_frame_on() -> None:
    tracker = make_tracker()
    stream = tracker.open_stream(BANK, 2)
    assert advance(tracker, [stream], [picture(0)]) == [()]
    outcome = tracker.prompt(stream, click(7, 0))
    assert (outcome.frame_id, outcome.masklet.object_id) == (0, 7)
    result = tracker.step([stream], [picture(1)]).results[0]
    assert [masklet.object_id for masklet in result.masklets] == [7]
    assert result.masklets[0].mask_logits.std() > 0, "a constant mask would make every comparison vacuous"
    assert set(result.stage_ns) >= {"encode_image", "attend_memory", "decode_masks", "readback"}


class CountingRuntime(EagerRuntime):
    """Counts the pictures it encodes."""

    encoded = 0

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        self.encoded += len(pixels)
        return super().encode_image(pixels)


def test_shared_picture_is_encoded_once_and_tracked_by_each_stream() -> None:
    runtime = CountingRuntime(lively_network())
    tracker = Tracker(runtime, TrackerConfig(rows=4, bank=BANK))
    streams = [tracker.open_stream(BANK, 1) for _ in range(2)]
    alone = make_tracker()
    single = alone.open_stream(BANK, 1)
    shared = picture(0)
    advance(tracker, streams, [shared, shared])
    advance(alone, [single], [shared])
    for stream, x in zip(streams, (20, 120), strict=True):
        tracker.prompt(stream, click(1, 0, x=x))
    alone.prompt(single, click(1, 0, x=120))
    shared, other = picture(1), picture(1, seed=99)
    _, (mask,) = advance(tracker, streams, [shared, shared])
    ((expected,),) = advance(alone, [single], [shared])
    np.testing.assert_allclose(mask, expected, atol=1e-3)
    assert runtime.encoded == 2
    advance(tracker, streams, [shared, other])
    assert runtime.encoded == 4


class AsynchronousRuntime(CountingRuntime):
    """Says that the host may go on while the device works."""

    is_asynchronous = True


def test_pictures_encoded_ahead_are_encoded_once_and_change_no_mask() -> None:
    ahead, plain = AsynchronousRuntime(lively_network()), CountingRuntime(lively_network())
    masks = []
    for runtime in (ahead, plain):
        tracker = Tracker(runtime, TrackerConfig(rows=4, bank=BANK))
        streams = [tracker.open_stream(BANK, 1) for _ in range(2)]
        ticks = [[picture(frame), picture(frame, seed=99 + frame)] for frame in range(8)]
        coming = iter(ticks[1:])
        for frame, pictures in enumerate(ticks[:6]):
            # Before the fifth tick other pictures come than were announced.
            began_ns = time.perf_counter_ns()
            step = tracker.step(streams, ticks[7] if frame == 4 else pictures, coming=partial(next, coming))
            assert all(result.stage_ns["encode_image"] > 0 for result in step.results)
            # Before the tick itself began only where these very pictures were announced.
            is_early = [begun < began_ns for begun in step.begun_ns]
            assert is_early == [runtime is ahead and frame not in (0, 4)] * 2
            tracker.remember(step)
            if frame == 0:
                for stream in streams:
                    tracker.prompt(stream, click(1, 0))
            masks += [result.masklets[0].mask_logits for result in step.results if result.masklets]
        assert len(list(coming)) == (1 if runtime is ahead else 7), "asked on every tick, or never"
    np.testing.assert_array_equal(masks[: len(masks) // 2], masks[len(masks) // 2 :])
    assert plain.encoded == 2 * 6
    assert ahead.encoded == 2 * (1 + 6 + 1), "the first, six ahead, and the one that nobody announced"


def test_closing_a_stream_lets_go_of_its_picture_that_was_encoded_ahead() -> None:
    tracker = Tracker(AsynchronousRuntime(lively_network()), TrackerConfig(rows=1, bank=BANK))
    stream = tracker.open_stream(BANK, 1)
    coming = [picture(1)]
    tracker.remember(tracker.step([stream], [picture(0)], coming=lambda: coming))
    assert tracker._ahead is not None
    tracker.close_stream(stream)
    assert tracker._ahead is None


def test_batching_objects_and_streams_changes_no_mask() -> None:
    together, alone = make_tracker(), make_tracker()
    streams = [together.open_stream(BANK, 2), together.open_stream(BANK, 2)]
    singles = [alone.open_stream(BANK, 2) for _ in range(3)]
    owner = {0: (0, 1), 1: (0, 2), 2: (1, 1)}
    advance(together, streams, [picture(0), picture(0, seed=99)])
    for index, (stream, object_id) in owner.items():
        prompt = click(object_id, 0, x=30 + 40 * index)
        together.prompt(streams[stream], prompt)
        advance(alone, [singles[index]], [picture(0, seed=99 if stream else 0)])
        alone.prompt(singles[index], prompt)
    for frame in range(1, 8):
        batched = advance(together, streams, [picture(frame), picture(frame, seed=99 + frame)])
        flat = [mask for masks in batched for mask in masks]
        for index, (stream, _) in owner.items():
            seed = 99 + frame if stream else frame
            (single,) = advance(alone, [singles[index]], [picture(frame, seed=seed)])[0]
            np.testing.assert_allclose(flat[index], single, atol=1e-4)


def test_a_reused_row_shows_nothing_of_its_former_owner() -> None:
    masks = []
    for poison in (False, True):
        tracker = make_tracker(rows=1)
        stream = tracker.open_stream(BANK, 1)
        if poison:
            for values in (tracker.pool.spatial, tracker.pool.prototypes, tracker.pool.pointers):
                values.fill_(1e4)
        advance(tracker, [stream], [picture(0)])
        tracker.prompt(stream, click(1, 0))
        masks.append([advance(tracker, [stream], [picture(frame)])[0][0] for frame in range(1, 6)])
    np.testing.assert_array_equal(masks[0], masks[1])


def test_removed_object_gives_its_row_back() -> None:
    tracker = make_tracker(rows=1)
    stream = tracker.open_stream(BANK, 5)
    advance(tracker, [stream], [picture(0)])
    tracker.prompt(stream, click(1, 0))
    with pytest.raises(CapacityError, match="memory rows"):
        tracker.prompt(stream, click(2, 0))
    tracker.remove(stream, 1)
    tracker.prompt(stream, click(2, 0))
    with pytest.raises(UnknownObjectError, match="object 1 is not tracked; this stream tracks 2"):
        tracker.remove(stream, 1)
    tracker.close_stream(stream)
    assert tracker.pool.rows_in_use == 0


def test_stream_limit_is_its_own() -> None:
    tracker = make_tracker()
    stream = tracker.open_stream(BANK, 1)
    advance(tracker, [stream], [picture(0)])
    tracker.prompt(stream, click(1, 0))
    with pytest.raises(CapacityError, match="already tracks 1 objects"):
        tracker.prompt(stream, click(2, 0))


def test_prompts_on_the_same_frame_add_up_and_replace_starts_anew() -> None:
    tracker = make_tracker()
    stream = tracker.open_stream(BANK, 1)
    advance(tracker, [stream], [picture(0)])
    first = tracker.prompt(stream, click(1, 0)).masklet.mask_logits
    tracker.prompt(stream, click(1, 0, x=10))
    assert len(stream.objects[1].points) == 2
    again = tracker.prompt(stream, click(1, 0, mode=PromptMode.REPLACE)).masklet.mask_logits
    assert len(stream.objects[1].points) == 1
    np.testing.assert_array_equal(first, again)


def test_mask_prompt_is_its_own_mask() -> None:
    tracker = make_tracker()
    stream = tracker.open_stream(BANK, 1)
    advance(tracker, [stream], [picture(0)])
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[30:60, 40:120] = True
    logits = tracker.prompt(stream, Prompt(object_id=1, frame_id=0, mask=mask)).masklet.mask_logits
    size = TINY.mask_size
    assert ((logits > 0).mean() - mask.mean()) ** 2 < 1e-3
    assert logits[size // 2, size // 2] > 0 > logits[0, 0]


def test_prompt_takes_the_nearest_kept_frame_and_refuses_older_ones() -> None:
    tracker = Tracker(EagerRuntime(lively_network()), TrackerConfig(rows=2, bank=BANK, most_kept_frames=3))
    stream = tracker.open_stream(BANK, 2)
    with pytest.raises(InvalidPromptError, match="no frame has been tracked yet"):
        tracker.prompt(stream, click(1, 0))
    for frame in (0, 2, 4, 6, 8):
        advance(tracker, [stream], [picture(frame)])
    assert tracker.prompt(stream, click(1, 5)).frame_id in (4, 6)
    with pytest.raises(InvalidPromptError, match="frames 4 to 8"):
        tracker.prompt(stream, click(2, 3))
    assert len(stream.kept) == 3


def test_absent_object_has_an_empty_mask_and_is_lost_after_a_while() -> None:
    network = lively_network()
    network.semantic_head.vectors.zero_()  # every class is as likely: semantics have no say
    config = TrackerConfig(rows=1, bank=BANK, lost_after_s=1.0, return_iou=0.0)
    tracker = Tracker(EagerRuntime(network), config)
    stream = tracker.open_stream(BANK, 1)
    advance(tracker, [stream], [picture(0)])
    tracker.prompt(stream, click(1, 0))
    network.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(-50.0)
    states = []
    for frame in range(1, 61):
        step = tracker.step([stream], [picture(frame)])
        tracker.remember(step)
        (masklet,) = step.results[0].masklets
        assert not (masklet.mask_logits > 0).any()
        assert masklet.frames_since_seen == frame
        states.append(masklet.state)
    assert states[:30] == [ObjectState.OCCLUDED] * 30
    assert states[-1] is ObjectState.LOST
    network.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(50.0)
    (masklet,) = tracker.step([stream], [picture(61)]).results[0].masklets
    assert (masklet.state, masklet.frames_since_seen, masklet.object_id) == (ObjectState.VISIBLE, 0, 1)


def test_untrusted_frame_leaves_memory_as_it_was() -> None:
    tracker = make_tracker(rows=1)
    stream = tracker.open_stream(BANK, 1)
    advance(tracker, [stream], [picture(0)])
    tracker.prompt(stream, click(1, 0))
    before = tracker.pool.spatial.clone(), tracker.pool.pointers.clone()
    bad = picture(1)
    untrusted = Picture(
        frame_id=1, pixels=bad.pixels, width_px=WIDTH, height_px=HEIGHT, time_s=bad.time_s, is_trusted=False
    )
    step = tracker.step([stream], [untrusted])
    tracker.remember(step)
    assert not step.results[0].is_trusted
    assert before[0].equal(tracker.pool.spatial)
    assert before[1].equal(tracker.pool.pointers)


def test_correcting_the_conditioning_frame_rewrites_its_slot() -> None:
    tracker = make_tracker(rows=1)
    stream = tracker.open_stream(BANK, 1)
    advance(tracker, [stream], [picture(0)])
    tracker.prompt(stream, click(1, 0))
    before = tracker.pool.spatial[0, 0].clone()
    tracker.prompt(stream, Prompt(object_id=1, frame_id=0, points=((10, 10),), labels=(0,)))
    assert not before.equal(tracker.pool.spatial[0, 0])
    assert stream.objects[1].bank.reads().slots == [0]
    advance(tracker, [stream], [picture(1)])
    tracker.prompt(stream, click(1, 1))
    assert stream.objects[1].bank.corrections.filled() == [8]


def follow(tracker: Tracker, stream: StreamState, frames: range) -> None:
    for frame in frames:
        advance(tracker, [stream], [picture(frame, seed=frame // 4)])


def test_an_object_prompted_in_the_past_reaches_the_present() -> None:
    late, timely = make_tracker(), make_tracker()
    streams = late.open_stream(BANK, 2), timely.open_stream(BANK, 2)
    follow(timely, streams[1], range(1))
    timely.prompt(streams[1], click(1, 0))
    follow(timely, streams[1], range(1, 8))
    follow(late, streams[0], range(8))
    late.prompt(streams[0], click(1, 0))
    steps = 0
    while streams[0].is_behind:
        late.catch_up([streams[0]])
        steps += 1
    assert steps == 7
    expected = advance(timely, [streams[1]], [picture(8)])
    np.testing.assert_allclose(advance(late, [streams[0]], [picture(8)])[0][0], expected[0][0], atol=1e-5)


def test_catching_up_takes_at_most_eight_steps_and_counts_every_frame() -> None:
    tracker = make_tracker()
    stream = tracker.open_stream(BANK, 2)
    follow(tracker, stream, range(41))
    tracker.prompt(stream, click(1, 10))
    stops = [frame.frame_id for frame, _ in stream.objects[1].behind]
    assert stops == [14, 18, 21, 25, 29, 32, 36, 40]
    tracker.catch_up([stream])
    assert advance(tracker, [stream], [picture(41)]) == [()], "no masklet before the object is here"
    while stream.is_behind:
        tracker.catch_up([stream])
    assert len(advance(tracker, [stream], [picture(42)])[0]) == 1
    assert stream.objects[1].bank.frame == 42 - 10


def test_a_correction_in_the_past_takes_back_what_was_remembered_since() -> None:
    tracker = make_tracker()
    stream = tracker.open_stream(BANK, 2)
    follow(tracker, stream, range(1))
    tracker.prompt(stream, click(1, 0))
    follow(tracker, stream, range(1, 20))
    bank = stream.objects[1].bank
    earlier = stream.objects[1].past[10].mask_logits
    outcome = tracker.prompt(stream, click(1, 10, x=20))
    assert not np.array_equal(outcome.masklet.mask_logits, earlier)
    assert bank.corrections.filled() == [bank.latest_slot]
    remembered = [*bank.recent.times.values(), *bank.long_term.times.values()]
    assert max(remembered, default=0) < 10 / 30
    assert bank.frame == 10
    while stream.is_behind:
        tracker.catch_up([stream])
    assert bank.frame == 19


def test_a_pinned_frame_takes_prompts_long_after_its_neighbours_are_gone() -> None:
    tracker = Tracker(EagerRuntime(lively_network()), TrackerConfig(rows=2, bank=BANK, most_kept_frames=3))
    stream = tracker.open_stream(BANK, 2)
    follow(tracker, stream, range(4))
    tracker.prompt(stream, click(1, 3))
    assert tracker.pin(stream, 3) == 3
    follow(tracker, stream, range(4, 12))
    assert set(stream.objects[1].past) == {3, 9, 10, 11}
    outcome = tracker.prompt(stream, click(1, 3, x=20))
    assert outcome.frame_id == 3
    assert len(stream.objects[1].points) == 2, "clicks on the pinned frame add up"
    assert [frame.frame_id for frame, _ in stream.objects[1].behind] == [9, 10, 11]
    tracker.pin(stream, 11)
    with pytest.raises(InvalidPromptError, match="no longer kept"):
        tracker.prompt(stream, click(2, 3))


def test_untrusted_frames_are_not_remembered_while_catching_up() -> None:
    tracker = make_tracker()
    stream = tracker.open_stream(BANK, 2)
    follow(tracker, stream, range(1))
    for frame in range(1, 6):
        gap = dataclasses.replace(picture(frame), is_trusted=False)
        advance(tracker, [stream], [gap])
    tracker.prompt(stream, click(1, 0))
    while stream.is_behind:
        tracker.catch_up([stream])
    assert stream.objects[1].bank.recent.filled() == []


def test_a_mask_that_vanishes_at_the_input_size_is_refused_and_takes_no_row() -> None:
    tracker = make_tracker(rows=1)
    stream = tracker.open_stream(BANK, 1)
    advance(tracker, [stream], [picture(0)])
    speck = np.zeros((HEIGHT * 8, WIDTH * 8), dtype=bool)
    speck[100, 200] = True
    with pytest.raises(InvalidPromptError, match="vanishes at the model's input size, 64x64"):
        tracker.prompt(stream, Prompt(object_id=1, frame_id=0, mask=speck))
    assert tracker.pool.rows_in_use == 0
    whole = np.ones((HEIGHT, WIDTH), dtype=bool)
    assert (tracker.prompt(stream, Prompt(object_id=1, frame_id=0, mask=whole)).masklet.mask_logits > 0).all()


class LoudRuntime(EagerRuntime):
    """Mask logits far beyond what a prompt may hold; keeps the masks it is prompted with."""

    def __init__(self) -> None:
        super().__init__(lively_network())
        self.prompted: list[torch.Tensor] = []

    def decode_prompt(
        self,
        conditioned: torch.Tensor,
        features: ImageFeatures,
        prompt: PromptTensors,
        is_multimask: torch.Tensor,
    ) -> Decoded:
        self.prompted.append(prompt.mask)
        decoded = super().decode_prompt(conditioned, features, prompt, is_multimask)
        return decoded._replace(mask_logits=decoded.mask_logits * 1e4)


def test_mask_so_far_prompts_again_clamped_as_in_sam2() -> None:
    runtime = LoudRuntime()
    tracker = Tracker(runtime, TrackerConfig(rows=1, bank=BANK))
    stream = tracker.open_stream(BANK, 1)
    advance(tracker, [stream], [picture(0)])
    outcomes = [tracker.prompt(stream, click(1, 0)) for _ in range(2)]
    assert np.abs(outcomes[0].masklet.mask_logits).max() > 32
    assert [mask.abs().max().item() for mask in runtime.prompted] == [0, 32]


class TellingRuntime(EagerRuntime):
    """Says of every tracked frame what it is told to."""

    def __init__(self) -> None:
        super().__init__(lively_network())
        self.presence, self.iou, self.instrument, self.appearance = 5.0, 0.9, 0, 0
        self.columns: slice = slice(None)
        self.looks: list[int] = []

    def track_masks(self, conditioned: Tensor, features: ImageFeatures, prototypes: Tensor) -> Decoded:
        decoded = super().track_masks(conditioned, features, prototypes)
        everywhere = decoded.mask_logits.abs() + 0.1
        mask_logits = -everywhere
        mask_logits[..., self.columns] = everywhere[..., self.columns]
        return decoded._replace(
            mask_logits=mask_logits,
            predicted_iou=torch.full_like(decoded.predicted_iou, self.iou),
            presence_logit=torch.full_like(decoded.presence_logit, self.presence),
        )

    def recognise(self, class_token: Tensor, pixels: Tensor, mask_logits: Tensor) -> Recognition:
        self.looks.append(len(class_token))
        logits, descriptor = super().recognise(class_token, pixels, mask_logits)
        logits, descriptor = torch.full_like(logits, -5.0), torch.zeros_like(descriptor)
        logits[:, self.instrument] = 5.0
        descriptor[:, self.appearance] = 1.0
        return Recognition(logits, descriptor)


def begin(runtime: TellingRuntime, frames: int, *, lost_after_s: float = 2.0) -> tuple[Tracker, StreamState]:
    """A tracker that has followed one object, prompted on frame 0, up to frame `frames`."""
    tracker = Tracker(runtime, TrackerConfig(rows=1, bank=BANK, lost_after_s=lost_after_s))
    stream = tracker.open_stream(BANK, 1)
    follow(tracker, stream, range(1))
    tracker.prompt(stream, click(1, 0))
    follow(tracker, stream, range(1, frames))
    return tracker, stream


@pytest.mark.parametrize(
    ("iou", "policy", "state"),
    [
        (0.9, MemoryPolicy.FIFO, ObjectState.VISIBLE),
        (0.3, MemoryPolicy.FIFO, ObjectState.LOST),
        (0.3, MemoryPolicy.VANILLA, ObjectState.VISIBLE),
    ],
)
def test_a_lost_object_comes_back_only_with_a_sound_mask(
    iou: float, policy: MemoryPolicy, state: ObjectState
) -> None:
    runtime, bank = TellingRuntime(), dataclasses.replace(BANK, policy=policy)
    tracker = Tracker(runtime, TrackerConfig(rows=1, bank=bank, lost_after_s=1.0))
    stream = tracker.open_stream(bank, 1)
    lose(tracker, stream, runtime, 60)
    runtime.presence, runtime.iou = 5.0, iou
    remembered = stream.objects[1].bank.recent.filled()
    follow(tracker, stream, range(60, 61))
    (masklet,) = tracker.step([stream], [picture(61)]).results[0].masklets
    assert masklet.state is state
    assert bool((masklet.mask_logits > 0).any()) == (state is ObjectState.VISIBLE)
    follow(tracker, stream, range(62, 64))
    if state is ObjectState.LOST:
        assert stream.objects[1].bank.recent.filled() == remembered, "a look-alike is not remembered"
    outcome = tracker.prompt(stream, click(1, 63))
    assert outcome.masklet.state is ObjectState.VISIBLE, "a surgeon who points is believed"


@pytest.mark.parametrize(
    ("columns", "appearance", "last"),
    [
        (slice(8, None), 0, ObjectState.VISIBLE),
        (slice(8, None), 1, ObjectState.OCCLUDED),
        (slice(4, 8), 1, ObjectState.VISIBLE),
    ],
    ids=["itself elsewhere", "another elsewhere", "beside where it was"],
)
def test_what_lies_elsewhere_all_at_once_must_look_like_the_object(
    columns: slice, appearance: int, last: ObjectState
) -> None:
    runtime = TellingRuntime()
    runtime.columns = slice(0, 4)
    tracker, stream = begin(runtime, 60)
    runtime.columns, runtime.appearance = columns, appearance
    states = watch(tracker, stream, range(60, 75))
    is_jump = columns.start == 8
    assert (states[0] is ObjectState.VISIBLE) != is_jump, "looked at after the reply"
    assert states[-1] is last
    assert stream.objects[1].is_doubted == (last is not ObjectState.VISIBLE)


def watch(tracker: Tracker, stream: StreamState, frames: range) -> list[ObjectState]:
    """The first object's state on each frame."""
    states = []
    for frame in frames:
        step = tracker.step([stream], [picture(frame)])
        tracker.remember(step)
        states.append(step.results[0].masklets[0].state)
    return states


def lose(tracker: Tracker, stream: StreamState, runtime: TellingRuntime, last: int) -> None:
    """An object that was looked at, and then was away for so long that it is lost."""
    follow(tracker, stream, range(1))
    tracker.prompt(stream, click(1, 0))
    follow(tracker, stream, range(1, 10))
    runtime.presence = -5.0
    follow(tracker, stream, range(10, last))


@pytest.mark.parametrize("is_back", [True, False])
def test_a_lost_object_comes_back_only_if_it_looks_like_itself(is_back: bool) -> None:
    runtime = TellingRuntime()
    tracker, stream = begin(runtime, 60, lost_after_s=1.0)
    runtime.presence = -5.0
    follow(tracker, stream, range(60, 120))
    runtime.presence, runtime.appearance = 5.0, 0 if is_back else 1
    states = watch(tracker, stream, range(120, 150))
    assert states[0] is ObjectState.LOST, "looked at after the reply"
    assert set(states[1:]) == {ObjectState.VISIBLE if is_back else ObjectState.LOST}
    runtime.appearance = 0
    assert watch(tracker, stream, range(150, 180))[-1] is ObjectState.VISIBLE


def test_what_no_longer_looks_like_the_object_is_hidden_and_forgotten() -> None:
    """A look-alike that takes the object's place without a gap."""
    runtime = TellingRuntime()
    tracker, stream = begin(runtime, 60)
    runtime.appearance, runtime.iou = 1, SOUND_IOU - 0.1
    states = watch(tracker, stream, range(60, 90))
    refuted = states.index(ObjectState.OCCLUDED)
    assert refuted < 15, "half a second"
    assert ObjectState.VISIBLE not in states[refuted:]
    assert max(stream.objects[1].bank.recent.times.values()) > 85 / 30, "looks may yet speak for it"
    assert watch(tracker, stream, range(90, 150))[-1] is ObjectState.LOST
    bank = stream.objects[1].bank
    learnt_s = [*bank.recent.times.values(), *bank.long_term.times.values()]
    assert all(time_s < 60 / 30 for time_s in learnt_s), "what was learnt of the other is forgotten"
    assert bank.long_term.times, "what was learnt of the object is not"
    assert tracker.prompt(stream, click(1, 149)).masklet.state is ObjectState.VISIBLE
    assert set(watch(tracker, stream, range(150, 200))) == {ObjectState.VISIBLE}, "who points is believed"


def test_a_flicker_does_not_end_a_doubt() -> None:
    runtime = TellingRuntime()
    tracker, stream = begin(runtime, 60)
    runtime.appearance, runtime.iou = 1, SOUND_IOU - 0.1
    assert watch(tracker, stream, range(60, 80))[-1] is ObjectState.OCCLUDED
    runtime.iou = SOUND_IOU + 0.1
    for frame in range(80, 160):
        runtime.presence = -5.0 if frame % 4 == 0 else 5.0
        assert watch(tracker, stream, range(frame, frame + 1)) != [ObjectState.VISIBLE]
    bank = stream.objects[1].bank
    learnt = [time_s for slot, time_s in bank.recent.times.items() if slot != bank.absent_slot]
    assert all(time_s < 60 / 30 for time_s in learnt), "but that it is away nothing was learnt"


def test_a_tap_on_what_is_doubted_is_believed_whatever_it_looked_like() -> None:
    """After a return the tracker slid onto another instrument; a surgeon points at the right one."""
    runtime = TellingRuntime()
    tracker, stream = begin(runtime, 30)
    tracked = stream.objects[1]
    tracked.was_away = True
    runtime.appearance = 1
    assert runtime.iou >= SOUND_IOU
    assert watch(tracker, stream, range(30, 60))[-1] is ObjectState.OCCLUDED
    assert tracked.likeness is not None
    assert tracked.likeness < 0.5
    runtime.iou = SOUND_IOU - 0.1
    assert tracker.prompt(stream, click(1, 59)).masklet.state is ObjectState.VISIBLE
    assert set(watch(tracker, stream, range(60, 150))) == {ObjectState.VISIBLE}


def test_what_is_doubted_before_its_looks_are_known_does_not_become_its_looks() -> None:
    runtime = TellingRuntime()
    tracker = Tracker(runtime, TrackerConfig(rows=1, bank=BANK, lost_after_s=1.0))
    stream = tracker.open_stream(BANK, 1)
    lose(tracker, stream, runtime, 60)
    views = len(stream.objects[1].gallery.views)
    runtime.presence, runtime.instrument, runtime.appearance = 5.0, 1, 1
    assert set(watch(tracker, stream, range(60, 120))) == {ObjectState.LOST}
    assert len(stream.objects[1].gallery.views) == views


def test_a_lost_object_returns_at_a_frame_a_second() -> None:
    runtime = TellingRuntime()
    tracker = Tracker(runtime, TrackerConfig(rows=1, bank=BANK))
    stream = tracker.open_stream(BANK, 1)

    def watch_slowly(frames: range) -> list[ObjectState]:
        states = []
        for frame in frames:
            step = tracker.step([stream], [dataclasses.replace(picture(frame), time_s=float(frame))])
            tracker.remember(step)
            states += [masklet.state for masklet in step.results[0].masklets]
        return states

    watch_slowly(range(1))
    tracker.prompt(stream, click(1, 0))
    watch_slowly(range(1, 10))
    runtime.presence = -5.0
    assert watch_slowly(range(10, 20))[-1] is ObjectState.LOST
    runtime.presence = 5.0
    assert watch_slowly(range(20, 24))[1:] == [ObjectState.VISIBLE] * 3


def test_a_sound_mask_that_is_followed_without_a_break_is_believed() -> None:
    """It bleeds, smokes, turns round: the object changes its looks in view."""
    runtime = TellingRuntime()
    tracker, stream = begin(runtime, 60)
    runtime.appearance = 1
    assert set(watch(tracker, stream, range(60, 120))) == {ObjectState.VISIBLE}
    runtime.iou = SOUND_IOU - 0.1
    assert set(watch(tracker, stream, range(120, 150))) == {ObjectState.VISIBLE}, "its looks were learnt"


def test_vanilla_memory_believes_whatever_it_looks_like() -> None:
    runtime, bank = TellingRuntime(), dataclasses.replace(BANK, policy=MemoryPolicy.VANILLA)
    tracker = Tracker(runtime, TrackerConfig(rows=1, bank=bank))
    stream = tracker.open_stream(bank, 1)
    follow(tracker, stream, range(1))
    tracker.prompt(stream, click(1, 0))
    follow(tracker, stream, range(1, 60))
    runtime.appearance, runtime.iou = 1, SOUND_IOU - 0.1
    assert set(watch(tracker, stream, range(60, 120))) == {ObjectState.VISIBLE}


def test_a_return_that_flickers_is_recognised() -> None:
    runtime = TellingRuntime()
    tracker, stream = begin(runtime, 60, lost_after_s=1.0)
    runtime.presence = -5.0
    follow(tracker, stream, range(60, 120))
    states = []
    for frame in range(120, 126):
        runtime.presence = 5.0 if frame % 2 else -5.0
        states += watch(tracker, stream, range(frame, frame + 1))
    lost, seen = ObjectState.LOST, ObjectState.VISIBLE
    assert states[:4] == [lost, lost, lost, seen], "looked at on the second, recognised on the fourth"


def test_a_clock_that_begins_anew_stops_no_look() -> None:
    runtime = TellingRuntime()
    tracker = Tracker(runtime, TrackerConfig(rows=1, bank=BANK))
    stream = tracker.open_stream(BANK, 1)
    follow(tracker, stream, range(3000, 3001))
    tracker.prompt(stream, click(1, 3000))
    follow(tracker, stream, range(3001, 3010))
    before = len(runtime.looks)
    for frame in range(3010, 3040):
        late = dataclasses.replace(picture(frame), time_s=(frame - 3010) / 30)
        tracker.remember(tracker.step([stream], [late]))
    assert len(runtime.looks) >= before + 4


def test_a_lost_object_that_catches_up_waits_for_no_class() -> None:
    """Frames of the past are kept as features; their pictures are gone and cannot be looked at."""
    runtime = TellingRuntime()
    tracker, stream = begin(runtime, 40, lost_after_s=0.1)
    assert stream.objects[1].class_probabilities is not None
    tracker.prompt(stream, click(1, 20))
    stream.objects[1].seen_at_s -= 1.0
    catch_up(tracker, stream)
    assert stream.objects[1].bank.recent.filled(), "what it passed on its way is remembered"
    assert not stream.objects[1].is_doubted


def test_objects_are_looked_at_in_turn_and_not_on_every_frame() -> None:
    runtime = TellingRuntime()
    tracker = Tracker(runtime, TrackerConfig(rows=5, bank=BANK, look_interval_s=0.2))
    stream = tracker.open_stream(BANK, 5)
    follow(tracker, stream, range(1))
    for object_id in range(1, 6):
        tracker.prompt(stream, click(object_id, 0))
    (step,) = tracker.step([stream], [picture(1)]).results
    assert {masklet.class_name for masklet in step.masklets} == {UNKNOWN_CLASS}
    follow(tracker, stream, range(2, 32))  # a second
    assert max(runtime.looks) == MOST_LOOKS
    assert sum(runtime.looks) == pytest.approx(5 * 5, abs=5)
    known = {tracked.class_probabilities is not None for tracked in stream.objects.values()}
    assert known == {True}


@pytest.mark.parametrize(("iou", "is_hidden"), [(SOUND_IOU - 0.1, True), (SOUND_IOU + 0.1, False)])
def test_a_sudden_change_is_doubted_at_its_first_look(iou: float, is_hidden: bool) -> None:
    """A mask that slips onto a neighbour; a sound one is believed for longer."""
    runtime, frames = TellingRuntime(), 120
    tracker, stream = begin(runtime, frames)
    runtime.appearance, runtime.iou = 1, iou
    states = watch(tracker, stream, range(frames, frames + 9))
    assert (ObjectState.OCCLUDED in states) is is_hidden
    runtime.appearance = 0
    again = watch(tracker, stream, range(frames + 9, frames + 24))
    assert again[-1] is ObjectState.VISIBLE, "what looks like the object again is the object"
    assert not stream.objects[1].has_changed


def test_streams_with_looks_of_their_own_do_not_wait_for_each_other() -> None:
    looked_at = []
    for count in (1, 3):
        config = TrackerConfig(rows=4 * count, bank=BANK, most_looks=count * MOST_LOOKS)
        tracker = Tracker(TellingRuntime(), config)
        streams = [tracker.open_stream(BANK, 4) for _ in range(count)]
        for index in range(12):
            tracker.remember(tracker.step(streams, [picture(index)] * count))
            for stream in streams if index == 0 else ():
                for object_id in range(1, 5):
                    tracker.prompt(stream, click(object_id, 0))
        looked_at.append([[tracked.looked_at_s for tracked in stream.objects.values()] for stream in streams])
    (alone,), together = looked_at
    assert together == [alone] * 3
    assert len(set(alone)) > 1, "of four objects two wait"


def catch_up(tracker: Tracker, stream: StreamState) -> None:
    while stream.is_behind:
        tracker.catch_up([stream])


def test_what_is_known_of_a_frame_that_left_while_the_object_caught_up_is_let_go() -> None:
    tracker = Tracker(EagerRuntime(lively_network()), TrackerConfig(rows=1, bank=BANK, most_kept_frames=5))
    stream = tracker.open_stream(BANK, 1)
    follow(tracker, stream, range(5))
    tracker.prompt(stream, click(1, 0))
    follow(tracker, stream, range(5, 12))
    assert not stream.is_behind, "every picture brings the object one frame nearer"
    assert min(stream.objects[1].past) >= 7


def test_two_objects_catch_up_at_once_as_each_would_alone() -> None:
    masks = []
    for prompted in ((1, 2), (1,), (2,)):
        tracker = make_tracker()
        stream = tracker.open_stream(BANK, 2)
        follow(tracker, stream, range(8))
        for object_id in prompted:
            tracker.prompt(stream, click(object_id, 2 * object_id, x=50 * object_id))
        catch_up(tracker, stream)
        masks.append(advance(tracker, [stream], [picture(8)])[0])
    together, *alone = masks
    np.testing.assert_allclose(together[0], alone[0][0], atol=1e-4)
    np.testing.assert_allclose(together[1], alone[1][0], atol=1e-4)


def test_a_correction_while_the_object_catches_up_starts_its_way_anew() -> None:
    tracker = make_tracker()
    stream = tracker.open_stream(BANK, 1)
    follow(tracker, stream, range(41))
    tracker.prompt(stream, click(1, 0))
    tracker.catch_up([stream])
    tracker.catch_up([stream])
    outcome = tracker.prompt(stream, click(1, 7, x=20))
    tracked = stream.objects[1]
    assert outcome.frame_id == 7, "a frame that the object has skipped on its way"
    assert min(frame.frame_id for frame, _ in tracked.behind) > 7
    assert max(tracked.bank.recent.times.values()) < 7 / 30
    assert tracked.bank.corrections.filled() == [tracked.bank.latest_slot]
    catch_up(tracker, stream)
    (mask,) = advance(tracker, [stream], [picture(41)])[0]
    assert mask.std() > 0
    reads = tracked.bank.reads()
    assert min(reads.pointer_ages) >= 0
    assert len(set(reads.pointers)) == len(reads.pointers)


def test_a_correction_on_a_frame_that_was_skipped_takes_back_every_later_pointer() -> None:
    tracker = make_tracker()
    stream = tracker.open_stream(BANK, 1)
    follow(tracker, stream, range(41))
    tracker.prompt(stream, click(1, 0))
    catch_up(tracker, stream)
    bank = stream.objects[1].bank
    assert 7 not in stream.objects[1].past
    before = bank.reads().pointers
    tracker.prompt(stream, click(1, 7, x=20))
    assert len(before) == 1 + 8
    assert len(bank.reads().pointers) == 1 + 1 + 1, "of the conditioning frame, frame 5 and the correction"


def test_replacing_in_the_past_forgets_everything_of_the_object_but_its_number() -> None:
    tracker = make_tracker()
    stream, other = tracker.open_stream(BANK, 1), tracker.open_stream(BANK, 1)
    for lane, prompted in ((stream, True), (other, False)):
        follow(tracker, lane, range(1))
        if prompted:
            tracker.prompt(lane, click(1, 0))
        follow(tracker, lane, range(1, 12))
    tracker.prompt(stream, click(1, 6, x=20, mode=PromptMode.REPLACE))
    assert set(stream.objects[1].past) == {6}, "masks of what the number stood for before prompt nothing"
    tracker.prompt(other, click(1, 6, x=20))
    for lane in (stream, other):
        catch_up(tracker, lane)
    replaced, fresh = advance(tracker, [stream, other], [picture(12), picture(12)])
    np.testing.assert_allclose(replaced[0], fresh[0], atol=1e-4)


def test_a_prompt_before_the_objects_first_frame_begins_it_there() -> None:
    tracker = make_tracker()
    stream = tracker.open_stream(BANK, 1)
    follow(tracker, stream, range(6))
    tracker.prompt(stream, click(1, 5))
    follow(tracker, stream, range(6, 10))
    assert tracker.prompt(stream, click(1, 2, x=20)).frame_id == 2
    tracked = stream.objects[1]
    assert tracked.conditioning_frame == 2
    assert tracked.points == [(20, 45)]
    assert tracked.bank.reads().slots == [0]
    assert [frame.frame_id for frame, _ in tracked.behind] == [3, 4, 5, 6, 7, 8, 9]


def test_an_object_removed_or_reset_while_it_catches_up_leaves_nothing_behind() -> None:
    tracker = make_tracker(rows=2)
    stream = tracker.open_stream(BANK, 2)
    follow(tracker, stream, range(20))
    for forget in (partial(tracker.remove, object_id=1), tracker.reset):
        tracker.prompt(stream, click(1, 3))
        tracker.catch_up([stream])
        forget(stream)
        assert not stream.is_behind
        assert tracker.pool.rows_in_use == 0
        tracker.catch_up([stream])
    assert advance(tracker, [stream], [picture(20)]) == [()]
    tracker.prompt(stream, click(1, 3))
    tracker.close_stream(stream)
    assert tracker.pool.rows_in_use == 0


def test_a_dropped_frame_that_was_pinned_takes_prompts_under_its_own_number() -> None:
    tracker = Tracker(EagerRuntime(lively_network()), TrackerConfig(rows=2, bank=BANK, most_kept_frames=3))
    stream = tracker.open_stream(BANK, 2)
    for frame in (0, 2, 4):
        advance(tracker, [stream], [picture(frame)])
    stood_in = tracker.pin(stream, 3)
    assert stood_in in (2, 4)
    follow(tracker, stream, range(5, 12))
    assert tracker.prompt(stream, click(1, 3)).frame_id == stood_in
    assert tracker.prompt(stream, click(1, stood_in)).frame_id == stood_in
    with pytest.raises(FrameNotKeptError, match="no longer kept"):
        tracker.prompt(stream, click(2, 1))


def test_an_untrusted_frame_is_remembered_only_where_a_person_vouches_for_it() -> None:
    tracker = make_tracker(rows=1)
    stream = tracker.open_stream(BANK, 1)
    advance(tracker, [stream], [dataclasses.replace(picture(0), is_trusted=False)])
    tracker.prompt(stream, click(1, 0))
    before = tracker.pool.spatial.clone()
    for frame in range(1, 4):
        advance(tracker, [stream], [dataclasses.replace(picture(frame), is_trusted=False)])
    assert before.equal(tracker.pool.spatial)
    advance(tracker, [stream], [picture(4)])
    assert not before.equal(tracker.pool.spatial)


def test_objects_that_come_and_go_leave_nothing_to_those_after_them() -> None:
    """A row is poisoned whenever its object goes; the last object must track as in a fresh tracker."""
    used, fresh = make_tracker(rows=3), make_tracker(rows=3)
    stream, alone = used.open_stream(BANK, 3), fresh.open_stream(BANK, 3)
    rng = np.random.default_rng(0)
    for frame in range(40):
        advance(used, [stream], [picture(frame)])
        if len(stream.objects) == 3:
            gone = int(rng.choice(list(stream.objects)))
            row = stream.objects[gone].bank.row
            used.remove(stream, gone)
            for values in (used.pool.spatial, used.pool.prototypes, used.pool.pointers):
                values[row] = 1e4
        used.prompt(stream, click(100 + frame, max(0, frame - frame % 4), x=float(rng.uniform(0, WIDTH))))
    for object_id in list(stream.objects)[:2]:
        used.remove(stream, object_id)
    for values in (used.pool.spatial, used.pool.prototypes, used.pool.pointers):
        values[used.pool._free] = 1e4
    for tracker, lane in ((used, stream), (fresh, alone)):
        for frame in range(40, 43):
            advance(tracker, [lane], [picture(frame)])
        tracker.prompt(lane, click(7, 42))
    for frame in range(43, 50):
        here = used.step([stream], [picture(frame)])
        used.remember(here)
        mask = next(one.mask_logits for one in here.results[0].masklets if one.object_id == 7)
        ((expected,),) = advance(fresh, [alone], [picture(frame)])
        np.testing.assert_allclose(mask, expected, atol=1e-4)
    assert used.pool.rows_in_use == 2


class BandRuntime(TellingRuntime):
    """Finds each row's object as a band over all lines; the bands of neighbours overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.tracked, self.objects = 0, 2
        self.stray: slice | None = None

    def track_masks(self, conditioned: Tensor, features: ImageFeatures, prototypes: Tensor) -> Decoded:
        decoded = super().track_masks(conditioned, features, prototypes)
        side = decoded.mask_logits.shape[-1]
        # Objects keep their places, be they tracked together or one by one.
        numbers = self.tracked + torch.arange(len(conditioned))
        self.tracked = (self.tracked + len(conditioned)) % self.objects
        middles = side * (0.3 + 0.2 * numbers).view(-1, 1, 1)
        bands = 0.2 * side - (torch.arange(side) - middles).abs()
        mask_logits = bands.expand(-1, side, -1).contiguous()
        if self.stray is not None:
            mask_logits[:, self.stray, self.stray] = 3.0
        return decoded._replace(mask_logits=mask_logits)

    def recognise(self, class_token: Tensor, pixels: Tensor, mask_logits: Tensor) -> Recognition:
        self.seen += mask_logits.clone()
        return super().recognise(class_token, pixels, mask_logits)


@pytest.mark.parametrize(
    ("policy", "streams", "doubt", "overlaps"),
    [
        (MemoryPolicy.FIFO, 1, "", False),
        (MemoryPolicy.VANILLA, 1, "", True),
        (MemoryPolicy.FIFO, 2, "", True),
        (MemoryPolicy.FIFO, 1, "is_doubted", True),
        (MemoryPolicy.FIFO, 1, "is_lost", True),
        (MemoryPolicy.FIFO, 1, "has_changed", True),
    ],
    ids=["one-stream", "as-sam2", "two-streams", "doubted", "lost", "changed"],
)
@pytest.mark.parametrize("largest_batch", [32, 1])
def test_objects_of_a_stream_share_no_point_and_what_is_not_certain_takes_none(
    policy: MemoryPolicy,
    streams: int,
    doubt: str,
    overlaps: bool,
    largest_batch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trocar_engines.tracker.LARGEST_BATCH", largest_batch)
    bank = dataclasses.replace(BANK, policy=policy)
    tracker = Tracker(BandRuntime(), TrackerConfig(rows=2, bank=bank))
    opened = [tracker.open_stream(bank, 2) for _ in range(streams)]
    shown = [picture(0)] * streams
    advance(tracker, opened, shown)
    for index in range(2):
        tracker.prompt(opened[index % streams], click(1 + index, 0))
    if doubt:
        setattr(opened[0].objects[1], doubt, True)
    step = tracker.step(opened, [picture(1)] * streams)
    reads = [row.read for batch in step.batches for row in batch.rows]
    first, second = (read.mask_logits > 0 for read in reads if read is not None)
    assert (first & second).any() == overlaps
    side = first.shape[1]
    free = [(abs(np.arange(side) - side * middle) < 0.2 * side) for middle in (0.3, 0.5)]
    if doubt:
        np.testing.assert_array_equal(second[0], free[1])
        assert (first[0] & free[1]).sum() < (free[0] & free[1]).sum(), "and yields where it is less sure"
    elif not overlaps:
        np.testing.assert_array_equal(first[0] | second[0], free[0] | free[1])
    tracker.remember(step)


def test_what_lies_apart_is_not_looked_at() -> None:
    runtime = BandRuntime()
    runtime.stray, runtime.objects = slice(-3, None), 1
    tracker = Tracker(runtime, TrackerConfig(rows=1, bank=BANK))
    stream = tracker.open_stream(BANK, 1)
    advance(tracker, [stream], [picture(0)])
    tracker.prompt(stream, click(1, 0))
    ((mask,),) = advance(tracker, [stream], [picture(1)])
    (seen,) = runtime.seen
    assert mask[-1, -1] > 0, "it is shown"
    assert seen[-1, -1] < 0
    inside = slice(0, mask.shape[1] // 2)
    np.testing.assert_array_equal(seen[:, inside], mask[:, inside])


class ElsewhereRuntime(TellingRuntime):
    """Follows what its memory was told last; a click finds the few columns around it.

    `home` is where the object is, None while it is away; `looks_right` is how what a glance finds there goes
    on to look, once it is followed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.home: slice | None = slice(0, 4)
        self.looks_right = True
        self.glances = 0

    def decode_prompt(
        self, conditioned: Tensor, features: ImageFeatures, prompt: PromptTensors, is_multimask: Tensor
    ) -> Decoded:
        decoded = super().decode_prompt(conditioned, features, prompt, is_multimask)
        self.glances += 1
        side = decoded.mask_logits.shape[-1]
        column = int(prompt.points[0, 0, 0]) * side // TINY.input_size_px // 4 * 4
        mask_logits = torch.full_like(decoded.mask_logits, -5.0)
        mask_logits[..., column : column + 4] = 5.0
        return decoded._replace(
            mask_logits=mask_logits,
            predicted_iou=torch.full_like(decoded.predicted_iou, 0.9),
            presence_logit=torch.full_like(decoded.presence_logit, 5.0),
        )

    def encode_memory(
        self, features: ImageFeatures, mask_logits: Tensor, presence_logit: Tensor, is_prompted: Tensor
    ) -> tuple[Tensor, Tensor]:
        if presence_logit[0] > 0:
            columns = (mask_logits[0, 0] > 0).nonzero()
            self.columns, self.presence = slice(int(columns[0]), int(columns[-1]) + 1), 5.0
        return super().encode_memory(features, mask_logits, presence_logit, is_prompted)

    def track_masks(self, conditioned: Tensor, features: ImageFeatures, prototypes: Tensor) -> Decoded:
        if self.home != self.columns and self.looks_right:
            self.presence = -5.0
        return super().track_masks(conditioned, features, prototypes)

    def recognise(self, class_token: Tensor, pixels: Tensor, mask_logits: Tensor) -> Recognition:
        columns = (mask_logits[0, 0] > 0).nonzero()
        is_home = self.home is not None and int(columns[0]) == self.home.start
        is_followed = self.presence > 0
        self.appearance = 0 if is_home and (self.looks_right or not is_followed) else 1
        return super().recognise(class_token, pixels, mask_logits)


def leave(
    runtime: ElsewhereRuntime, policy: MemoryPolicy = MemoryPolicy.FIFO, *, away: int = 60
) -> tuple[Tracker, StreamState]:
    """An object that was followed at the left border for two seconds and then was away for some frames."""
    bank = dataclasses.replace(BANK, policy=policy)
    tracker = Tracker(runtime, TrackerConfig(rows=1, bank=bank, lost_after_s=1.0))
    stream = tracker.open_stream(bank, 1)
    follow(tracker, stream, range(1))
    tracker.prompt(stream, click(1, 0, x=10))
    assert set(watch(tracker, stream, range(1, 60))) == {ObjectState.VISIBLE}
    assert runtime.glances == 1, "the prompt"
    runtime.home = None
    assert watch(tracker, stream, range(60, 60 + away))[-1] is not ObjectState.VISIBLE
    return tracker, stream


def test_an_object_that_comes_back_where_its_memory_finds_nothing_is_searched_for() -> None:
    runtime = ElsewhereRuntime()
    tracker, stream = leave(runtime)
    assert runtime.glances > 5, "while it was away"
    assert stream.objects[1].bank.told_slot == 0, "what is unlike it is not followed"
    runtime.home = slice(12, 16)
    states = watch(tracker, stream, range(120, 180))
    returned = states.index(ObjectState.VISIBLE)
    assert returned < 60
    assert set(states[returned:]) == {ObjectState.VISIBLE}
    glances = runtime.glances
    (masklet,) = tracker.step([stream], [picture(180)]).results[0].masklets
    np.testing.assert_array_equal((masklet.mask_logits > 0)[0].nonzero()[0], range(12, 16))
    assert runtime.glances == glances, "nobody searches for what is there"


def find_elsewhere(
    runtime: ElsewhereRuntime, tracker: Tracker, stream: StreamState, frame: int, *, looks_right: bool
) -> int:
    """The next frame once a glance has found something on the right."""
    runtime.home, runtime.looks_right = slice(12, 16), looks_right
    while stream.objects[1].search.trial is None:
        assert watch(tracker, stream, range(frame, frame + 1)) != [ObjectState.VISIBLE]
        frame += 1
    return frame


def test_what_a_glance_found_is_forgotten_if_looks_at_it_do_not_agree() -> None:
    runtime = ElsewhereRuntime()
    tracker, stream = leave(runtime)
    bank = stream.objects[1].bank
    frame = find_elsewhere(runtime, tracker, stream, 120, looks_right=False)
    remembered, absent_slot = dict(bank.recent.times), bank.absent_slot
    assert absent_slot in remembered
    assert bank.told_slot == bank.config.trial_slot
    while stream.objects[1].search.trial is not None:
        assert watch(tracker, stream, range(frame, frame + 1)) == [ObjectState.LOST]
        frame += 1
    assert bank.told_slot == 0
    assert (bank.recent.times, bank.absent_slot) == (remembered, absent_slot), "nothing of it was remembered"
    glances = runtime.glances
    runtime.home = None
    assert set(watch(tracker, stream, range(frame, frame + 30))) == {ObjectState.LOST}
    assert runtime.glances > glances, "it looks elsewhere"


def test_a_tap_ends_what_is_on_trial() -> None:
    runtime = ElsewhereRuntime()
    tracker, stream = leave(runtime)
    frame = find_elsewhere(runtime, tracker, stream, 120, looks_right=False)
    runtime.looks_right, runtime.home = True, slice(4, 8)
    assert tracker.prompt(stream, click(1, frame - 1, x=60)).masklet.state is ObjectState.VISIBLE
    bank = stream.objects[1].bank
    assert (bank.trial, stream.objects[1].search.trial) == (None, None)
    assert set(watch(tracker, stream, range(frame, frame + 60))) == {ObjectState.VISIBLE}


def test_a_trial_that_fails_leaves_an_object_that_was_only_out_of_view_undoubted() -> None:
    runtime = ElsewhereRuntime()
    tracker, stream = leave(runtime, away=25)
    frame = find_elsewhere(runtime, tracker, stream, 85, looks_right=False)
    tracked = stream.objects[1]
    assert not tracked.is_doubted
    while tracked.search.trial is not None:
        watch(tracker, stream, range(frame, frame + 1))
        frame += 1
    assert not tracked.is_doubted


def test_an_object_is_found_elsewhere_at_a_frame_a_second() -> None:
    runtime = ElsewhereRuntime()
    tracker, stream = leave(runtime)
    runtime.home = slice(12, 16)
    states = []
    for second in range(5, 25):
        step = tracker.step([stream], [dataclasses.replace(picture(1000 + second), time_s=float(second))])
        tracker.remember(step)
        states.append(step.results[0].masklets[0].state)
    assert states[-1] is ObjectState.VISIBLE


def test_a_glance_takes_no_other_object_that_is_there() -> None:
    class TwinRuntime(ElsewhereRuntime):
        """The second of two objects, the first's twin, is where it was; a click finds nothing else."""

        is_away = False

        def decode_prompt(self, *arguments: Any) -> Decoded:
            decoded = super().decode_prompt(*arguments)
            if self.is_away:
                decoded.mask_logits[:] = -5.0
                decoded.mask_logits[..., 8:12] = 5.0
            return decoded

        def track_masks(self, conditioned: Tensor, features: ImageFeatures, prototypes: Tensor) -> Decoded:
            decoded = super().track_masks(conditioned, features, prototypes)
            decoded.mask_logits[:] = -5.0
            for row, columns in enumerate((slice(0, 4), slice(8, 12))[: len(conditioned)]):
                decoded.mask_logits[row, :, columns] = 5.0
            decoded.presence_logit[:] = 5.0
            decoded.presence_logit[0] = -5.0 if self.is_away else 5.0
            return decoded

        def recognise(self, class_token: Tensor, pixels: Tensor, mask_logits: Tensor) -> Recognition:
            seen = super().recognise(class_token, pixels, mask_logits)
            return seen._replace(
                descriptor=torch.eye(seen.descriptor.shape[1])[:1].expand_as(seen.descriptor)
            )

    runtime = TwinRuntime()
    tracker = Tracker(runtime, TrackerConfig(rows=2, bank=BANK))
    stream = tracker.open_stream(BANK, 2)
    follow(tracker, stream, range(1))
    for object_id, x in ((1, 10), (2, 90)):
        tracker.prompt(stream, click(object_id, 0, x=x))
    follow(tracker, stream, range(1, 60))
    runtime.is_away, glances = True, runtime.glances
    states = watch(tracker, stream, range(60, 180))
    assert runtime.glances > glances
    assert states[-1] is ObjectState.LOST
    assert stream.objects[1].search.trial is None


def test_vanilla_memory_searches_for_nothing() -> None:
    runtime = ElsewhereRuntime()
    leave(runtime, MemoryPolicy.VANILLA)
    assert runtime.glances == 1
