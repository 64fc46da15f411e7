"""LongSim keeps its promises: by its script for every clip, and on rendered pixels for the small set."""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from trocar_bench import longsim
from trocar_bench.davis import OBJECTS_FILE, ObjectFacts, find_clips
from trocar_bench.longsim import (
    DEV,
    FIRST_SEED,
    FRAME_RATE_HZ,
    FULL,
    LOOK_ALIKE_ID,
    OBJECT_ID,
    RETRACTOR_ID,
    SHORT,
    LongClip,
    Subset,
    open_scene,
    render_longsim,
    script_clips,
)
from trocar_engines.errors import TrocarError
from trocar_engines.network.config import INSTRUMENT_CLASSES
from trocar_engines.training.instruments import HELD_OUT_KIND, INSTRUMENT_KINDS
from trocar_engines.training.scenes import Scene, SceneConfig

WIDTH_PX, HEIGHT_PX = 96, 54
SHOWN_PX = 4
SETTLED_S = 1.5
"""After this long on its way in, an instrument is in view."""
TINY = Subset(name="tiny", clips=1, frames=12, absences=(0, 0), absence_s=(1.0, 1.0), first_seed=FIRST_SEED)


@pytest.fixture(params=[DEV, FULL], ids=lambda subset: subset.name)
def subset(request: pytest.FixtureRequest) -> Subset:
    assert isinstance(request.param, Subset)
    return request.param


@lru_cache
def _open(clip: LongClip) -> Scene:
    return open_scene(clip, width_px=WIDTH_PX, height_px=HEIGHT_PX)


def _areas(clip: LongClip, time_s: float) -> list[int]:
    """Pixels of the background and of each object."""
    _, labels = _open(clip).render(round(time_s * FRAME_RATE_HZ))
    return [int((labels == object_id).sum()) for object_id in range(RETRACTOR_ID + 1)]


# --- the script -----------------------------------------------------------------------------------------


def test_sets_have_the_promised_size() -> None:
    assert (FULL.clips, FULL.frames, DEV.clips, DEV.frames, FRAME_RATE_HZ) == (10, 3_000, 3, 1_000, 25)
    for subset in (FULL, DEV):
        clips = script_clips(subset)
        assert [clip.frames for clip in clips] == [subset.frames] * subset.clips


def test_short_clips_show_every_class_twice_and_no_absence() -> None:
    clips = script_clips(SHORT)
    assert sorted(clip.kind for clip in clips) == sorted(2 * INSTRUMENT_KINDS)
    for clip in clips:
        assert not clip.absences
        for time_s in (0.0, clip.duration_s / 2, clip.duration_s - 1 / FRAME_RATE_HZ):
            assert _areas(clip, time_s)[OBJECT_ID] >= SHOWN_PX


def test_every_clip_of_the_full_set_has_three_absences_of_ten_seconds() -> None:
    for clip in script_clips(FULL):
        assert len(clip.absences) >= 3
        assert min(back - left for left, back in clip.absences) >= 10


def test_every_clip_of_the_small_set_has_two_absences_long_enough_to_be_lost() -> None:
    for clip in script_clips(DEV):
        assert len(clip.absences) >= 2
        assert min(back - left for left, back in clip.absences) > 2 * 2.0  # `lost_after_s`


def test_absences_lie_apart_and_inside_the_clip(subset: Subset) -> None:
    for clip in script_clips(subset):
        edges = [0.0, *(edge for absence in clip.absences for edge in absence), clip.duration_s]
        stays = np.diff(edges)[::2]
        assert stays.min() > 4


def test_look_alike_is_in_view_whenever_the_instrument_comes_back(subset: Subset) -> None:
    for clip in script_clips(subset):
        for left, back in clip.absences:
            assert any(begin <= left and back + 2 <= end for begin, end in clip.look_alike_stays)


def test_half_of_the_look_alikes_carry_a_mark() -> None:
    assert sum(clip.is_marked for clip in script_clips(FULL)) == FULL.clips // 2
    assert {clip.is_marked for clip in script_clips(DEV)} == {True, False}


def test_full_set_shows_every_known_kind_and_both_sets_the_held_out_one() -> None:
    assert {clip.kind for clip in script_clips(FULL)} == set(INSTRUMENT_KINDS)
    for subset in (FULL, DEV):
        assert {clip.has_retractor for clip in script_clips(subset)} == {True, False}


def test_no_training_scene_shows_the_held_out_kind() -> None:
    config = SceneConfig(height_px=16, width_px=16, frames=1, frame_rate=1.0, seed=0)
    assert HELD_OUT_KIND not in config.kinds
    assert HELD_OUT_KIND not in INSTRUMENT_CLASSES


def test_seeds_are_used_once_and_lie_beyond_those_of_training() -> None:
    seeds = [clip.seed for number in range(3) for one in (FULL, DEV) for clip in script_clips(one, number)]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= FIRST_SEED >= 10**9  # training counts from 0
    assert all(_open(clip).config.held_out for clip in script_clips(DEV))  # palettes and textures


def test_scripts_repeat_by_seed(subset: Subset) -> None:
    assert script_clips(subset) == script_clips(subset)
    assert script_clips(subset, 1) != script_clips(subset)


# --- the pixels -----------------------------------------------------------------------------------------


@pytest.fixture(params=range(DEV.clips))
def clip(request: pytest.FixtureRequest) -> LongClip:
    index: int = request.param
    return script_clips(DEV)[index]


def test_instrument_is_seen_at_work_and_never_while_absent(clip: LongClip) -> None:
    for left, back in clip.absences:
        for time_s in np.linspace(left + 0.02, back - 0.02, 8):
            assert _areas(clip, time_s)[OBJECT_ID] == 0
    seen = [
        _areas(clip, time_s)[OBJECT_ID] >= SHOWN_PX
        for begin, end in clip.stays
        for time_s in np.linspace(max(begin + SETTLED_S, 0), min(end - SETTLED_S, clip.duration_s - 0.1), 5)
    ]
    assert all(seen)


def test_look_alike_shows_on_the_first_frames_of_every_return(clip: LongClip) -> None:
    for left, back in clip.absences:
        assert _areas(clip, (left + back) / 2)[LOOK_ALIKE_ID] >= SHOWN_PX
        times = np.arange(back, back + SETTLED_S, 1 / FRAME_RATE_HZ)
        first = next(time_s for time_s in times if _areas(clip, time_s)[OBJECT_ID] >= SHOWN_PX)
        assert _areas(clip, first)[LOOK_ALIKE_ID] >= SHOWN_PX


def test_instrument_and_held_out_one_can_be_prompted_on_the_first_frame(subset: Subset) -> None:
    for clip in script_clips(subset)[:4]:
        areas = _areas(clip, 0.0)
        assert areas[OBJECT_ID] > 10 * SHOWN_PX
        assert (areas[RETRACTOR_ID] > 10 * SHOWN_PX) is clip.has_retractor


def test_look_alike_is_of_the_same_class(clip: LongClip) -> None:
    classes = _open(clip).classes
    assert classes[:2] == (clip.kind, clip.kind)
    assert classes[2:] == ((HELD_OUT_KIND,) if clip.has_retractor else ())


def test_camera_zooms_and_turns(clip: LongClip) -> None:
    # Whatever the draw: the range over the clip is set.
    camera = longsim.draw_cast(clip, np.random.default_rng(0), _open(clip).config).camera
    times = np.arange(0, clip.duration_s, 0.5).tolist()
    scales = [camera.scale(time_s) for time_s in times]
    turns = [camera.turn_amplitude * camera.turn(time_s) for time_s in times]
    assert max(scales) / min(scales) > 1.5
    assert max(turns) - min(turns) > 0.45


def test_mark_changes_the_look_alike_and_nothing_else(clip: LongClip) -> None:
    left, back = clip.absences[0]
    frame = round((left + back) / 2 * FRAME_RATE_HZ)
    (marked, labels), (plain, plain_labels) = (
        open_scene(replace(clip, is_marked=is_marked), width_px=WIDTH_PX, height_px=HEIGHT_PX).render(frame)
        for is_marked in (True, False)
    )
    difference = (marked.int() - plain.int()).abs().amax(dim=-1)
    is_look_alike = _widen(labels == LOOK_ALIKE_ID) | _widen(plain_labels == LOOK_ALIKE_ID)
    assert int((difference[is_look_alike] > 40).sum()) > 2 * SHOWN_PX
    assert int(difference[~is_look_alike].max()) <= 8  # exposure and bloom may carry a little


def _widen(mask: Tensor) -> Tensor:
    """By the soft edge that belongs to neither side."""
    return torch.from_numpy(cv2.dilate(mask.numpy().astype(np.uint8), np.ones((7, 7), np.uint8)) > 0)


def test_clips_repeat_by_seed() -> None:
    first, second = script_clips(DEV)[0], script_clips(DEV, 1)[0]
    pixels = [
        open_scene(one, width_px=WIDTH_PX, height_px=HEIGHT_PX).render(300)[0]
        for one in (first, first, second)
    ]
    assert torch.equal(pixels[0], pixels[1])
    assert not torch.equal(pixels[0], pixels[2])


# --- on disk --------------------------------------------------------------------------------------------


def _render(folder: Path, seed: int = 0) -> int:
    rendered: list[int] = []
    render_longsim(folder, TINY, seed, workers=1, on_frames=rendered.append)
    return sum(rendered)


def test_rendered_set_is_a_davis_folder_with_facts(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    assert _render(folder) == TINY.frames
    (clip,) = find_clips(folder, [], lambda: None)
    assert (clip.width_px, clip.height_px, clip.frame_rate_hz) == (480, 270, FRAME_RATE_HZ)
    assert len(clip.frames) == len(clip.masks) == TINY.frames
    kind = script_clips(TINY)[0].kind
    assert clip.objects[OBJECT_ID] == ObjectFacts(class_name=kind)
    assert clip.objects[LOOK_ALIKE_ID] == ObjectFacts(class_name=kind, is_prompted=False)
    assert clip.objects[RETRACTOR_ID] == ObjectFacts(class_name=HELD_OUT_KIND, is_apart=True)
    assert set(clip.prompted_frames) == {OBJECT_ID, RETRACTOR_ID}


def test_complete_set_is_taken_as_it_is_and_a_broken_off_one_completed(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    _render(folder)
    masks = sorted((folder / "Annotations").rglob("*.png"))
    written = masks[0].stat().st_mtime_ns
    assert _render(folder) == 0
    (folder / OBJECTS_FILE).rename(folder / f"{OBJECTS_FILE}.part")
    expected = masks[-1].read_bytes()
    masks[-1].unlink()
    assert _render(folder) == TINY.frames
    assert masks[-1].read_bytes() == expected
    assert masks[0].stat().st_mtime_ns == written


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    _render(folder)
    with pytest.raises(TrocarError, match="choose another folder"):
        _render(folder, seed=1)
    described = json.loads((folder / OBJECTS_FILE).read_text())
    assert described["longsim"]["seed"] == 0
    (tmp_path / "note").touch()
    with pytest.raises(TrocarError, match="holds other files"):
        _render(tmp_path)
