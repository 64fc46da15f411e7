"""Synthetic clips keep the promises that training and the demo build on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from trocar_engines.network.config import INSTRUMENT_CLASSES
from trocar_engines.training.clip import Clip
from trocar_engines.training.instruments import HELD_OUT_KIND, INSTRUMENT_KINDS, draw_instrument, draw_style
from trocar_engines.training.scenes import Scene, SceneConfig, demo_scene, render_clip
from trocar_engines.training.tissue import TISSUE_CLASS
from trocar_engines.training.worlds import MOST_OBJECTS, render_world

# Low, so that the whole file runs in seconds.
SIZE_PX = 64
DEMO_RATE = 5.0


def _config(seed: int, size_px: int = SIZE_PX, *, held_out: bool = False) -> SceneConfig:
    return SceneConfig(
        height_px=size_px, width_px=size_px, frames=3, frame_rate=5.0, seed=seed, held_out=held_out
    )


def _iou(first: Tensor, second: Tensor) -> float:
    union = (first | second).sum().item()
    return (first & second).sum().item() / union if union else 1.0


def _longest_run(values: list[bool]) -> int:
    longest = run = 0
    for value in values:
        run = run + 1 if value else 0
        longest = max(longest, run)
    return longest


def test_equal_seeds_render_equal_pixels() -> None:
    first, second = render_clip(Scene(_config(3))), render_clip(Scene(_config(3)))
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)


def test_different_seeds_and_families_differ() -> None:
    images = render_clip(Scene(_config(3))).images
    assert not torch.equal(images, render_clip(Scene(_config(4))).images)
    assert not torch.equal(images, render_clip(Scene(_config(3, held_out=True))).images)


@pytest.mark.parametrize("seed", range(6))
def test_labels_name_a_class_each(seed: int) -> None:
    clip = render_clip(Scene(_config(seed)))
    assert int(clip.labels.max()) <= len(clip.classes)
    assert set(clip.classes) <= set(INSTRUMENT_CLASSES)
    assert clip.labels[0].any()


def test_scenes_know_the_classes_the_network_tells_apart() -> None:
    assert (*INSTRUMENT_KINDS, TISSUE_CLASS) == INSTRUMENT_CLASSES
    assert TISSUE_CLASS == "tissue"


def test_scenes_show_only_the_kinds_asked_for() -> None:
    shown = {
        kind
        for seed in range(8)
        for kind in Scene(replace(_config(seed, 16), kinds=("hook", HELD_OUT_KIND))).classes
    }
    assert shown == {"hook", HELD_OUT_KIND, TISSUE_CLASS}


@pytest.mark.parametrize("kind", [*INSTRUMENT_KINDS, HELD_OUT_KIND])
def test_every_kind_of_instrument_has_a_tip(kind: str) -> None:
    rng = np.random.default_rng(0)
    style = draw_style(rng, kind)
    instrument = draw_instrument(rng, kind, style=style, entry_angle=0.0, home=(0.0, 0.0), aspect=1.0)
    shaft_collar_knuckle = 3
    assert len(instrument.parts(0.0)) > shaft_collar_knuckle


def test_one_scene_at_two_resolutions_agrees() -> None:
    small, large = render_clip(Scene(_config(11))), render_clip(Scene(_config(11, 2 * SIZE_PX)))
    assert small.classes == large.classes
    # Thin tips fall between the pixels of the smaller picture.
    assert _iou(small.labels > 0, large.labels[:, ::2, ::2] > 0) > 0.85


def test_frames_render_in_any_order() -> None:
    scene = demo_scene(height_px=36, width_px=64, frames=60, frame_rate=DEMO_RATE)
    late, _ = scene.render(40)
    scene.render(3)
    assert torch.equal(scene.render(40)[0], late)


def test_demo_keeps_its_promises() -> None:
    scene = demo_scene(height_px=72, width_px=128, frames=75, frame_rate=DEMO_RATE)
    labels = torch.stack([scene.render(t)[1] for t in range(75)])
    areas = [[int((frame == object_id).sum()) for frame in labels] for object_id in (1, 2)]
    assert len(set(scene.classes)) == 2
    assert set(scene.classes) <= set(INSTRUMENT_KINDS)
    assert min(areas[0]) > 40
    assert areas[1][0] > 40
    assert areas[1][-1] > 40
    assert _longest_run([area == 0 for area in areas[1]]) >= 3.5 * DEMO_RATE
    for object_id, (x, y) in enumerate(scene.first_clicks(), 1):
        assert labels[0, y, x] == object_id


def test_demo_too_short_to_leave_and_return_is_refused() -> None:
    with pytest.raises(ValueError, match="at least"):
        demo_scene(frames=30)


def test_worlds_repeat_by_seed() -> None:
    first, second = render_world(SIZE_PX, SIZE_PX, 3, 5), render_world(SIZE_PX, SIZE_PX, 3, 5)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)
    assert not torch.equal(first.images, render_world(SIZE_PX, SIZE_PX, 3, 6).images)


@pytest.mark.parametrize("seed", range(6))
def test_worlds_open_with_an_object(seed: int) -> None:
    clip = render_world(SIZE_PX, SIZE_PX, 2, seed)
    assert clip.labels[0].any()
    assert int(clip.labels.max()) <= len(clip.classes) <= MOST_OBJECTS
    assert set(clip.classes) == {""}


def test_clip_of_disagreeing_shapes_is_refused() -> None:
    images, labels = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="labels"):
        Clip(images=images, labels=labels, classes=())
    with pytest.raises(ValueError, match="uint8"):
        Clip(images=images.float(), labels=labels, classes=())
