import numpy as np
import pytest

from networks import TINY, lively_network
from trocar_engines.errors import CapacityError, InvalidPromptError, UnknownObjectError
from trocar_engines.masklets import ObjectState, Picture, Prompt, PromptMode
from trocar_engines.memory.bank import BankConfig
from trocar_engines.runtime.eager import EagerRuntime
from trocar_engines.tracker import StreamState, Tracker, TrackerConfig

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
    tracker = Tracker(EagerRuntime(network), TrackerConfig(rows=1, bank=BANK, lost_after_s=1.0))
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
    assert stream.objects[1].bank.corrections.written == 1
