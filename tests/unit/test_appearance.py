"""The window along an object's shaft, and what tells two views of one object from views of two."""

import numpy as np
import pytest
import torch
from torch import Tensor

from trocar_engines.network.appearance import SHAFT, AppearanceHead, shaft_of_object
from trocar_engines.training.appearance import (
    NOTHING,
    Views,
    ViewSamples,
    appearance_loss,
    clip_views,
    collate_views,
    draw_views,
)
from trocar_engines.training.store import NO_CLASS, StoredClip

SIDE = 64


def taped_bar(turns: int) -> tuple[Tensor, Tensor]:
    """A bar, six points wide, that comes in from one side; tape lies three to five widths from its tip."""
    logits, picture = torch.full((1, SIDE, SIDE), -10.0), torch.zeros(1, 3, SIDE, SIDE)
    logits[0, 29:35, :50] = 10.0
    picture[0, 0, 29:35, :50] = 1.0
    picture[0, 1, 29:35, 20:32] = 1.0
    return logits.rot90(turns, (1, 2)), picture.rot90(turns, (2, 3))


@pytest.mark.parametrize("turns", range(4))
def test_view_turns_with_the_object_and_reaches_its_marks(turns: int) -> None:
    seen = shaft_of_object(*taped_bar(turns))
    assert seen.shape == (1, 5, SHAFT.along, SHAFT.across)
    torch.testing.assert_close(seen, shaft_of_object(*taped_bar(0)), atol=1e-3, rtol=0)
    middle = seen[0, :, :, SHAFT.across // 2]
    step = (SHAFT.behind + SHAFT.beyond) / SHAFT.along
    from_tip = SHAFT.behind - step * (torch.arange(SHAFT.along) + 0.5)
    is_tape = middle[3] > 0.5
    assert from_tip[is_tape].min() == pytest.approx(3, abs=0.7)
    assert from_tip[is_tape].max() == pytest.approx(5, abs=0.7)
    assert (middle[1, from_tip > 9] == 0).all(), "beyond the picture's border nothing is known"
    assert (middle[1, from_tip < 7] > 0.99).all()


def test_descriptors_are_unit_vectors() -> None:
    head = AppearanceHead().eval()
    descriptor = head(taped_bar(0)[1], taped_bar(0)[0])
    torch.testing.assert_close(descriptor.norm(dim=1), torch.ones(1))


def test_loss_rewards_views_of_one_object_that_agree_and_others_that_differ() -> None:
    objects, grounds = torch.tensor([0, 0, 1, 1, NOTHING]), torch.zeros(5, dtype=torch.int64)
    views = Views(torch.zeros(5, 1), objects, grounds)
    axes = torch.eye(3)
    right = appearance_loss(axes[[0, 0, 1, 1, 2]], views)
    confused = appearance_loss(axes[[0, 0, 0, 0, 2]], views)
    scattered = appearance_loss(axes[[0, 1, 1, 2, 2]], views)
    assert right < 0.01
    assert confused > right + 0.3
    assert scattered > right + 0.3
    apart = Views(views.seen, objects, torch.tensor([0, 0, 1, 1, 0]))
    same_place = appearance_loss(axes[[0, 0, 0, 0, 2]], apart)
    assert right < same_place < confused, "looks that two operations share cost less"


def test_a_ground_shows_objects_often_some_alike_but_for_their_tape() -> None:
    views = draw_views(128, 0)
    numbers = torch.bincount(views.objects[views.objects != NOTHING])
    assert (numbers > 1).sum() >= 3
    assert (views.objects == NOTHING).any()
    again = draw_views(128, 0)
    torch.testing.assert_close(again.seen, views.seen, atol=0, rtol=0)


def test_samples_keep_what_belongs_together() -> None:
    grounds = [draw_views(128, seed) for seed in (0, 1)]
    samples = ViewSamples(grounds=grounds, clips=[], count=4, seed=3)
    batch = collate_views([samples[index] for index in range(4)])
    assert sorted(set(batch.grounds.tolist())) == list(range(4))
    assert batch.seen.isfinite().all()
    torch.testing.assert_close(samples[2].seen, samples[2].seen, atol=0, rtol=0)
    outside = batch.seen[:, 1:2] == 0
    assert (batch.seen[:, 2:].masked_select(outside) == 0).all(), "no colour where there is no picture"


def test_clips_join_the_grounds_and_twins_stay_out() -> None:
    pixels = np.zeros((3, 128, 128, 4), np.uint8)
    for label, (top, grey) in enumerate(((8, 60), (50, 120), (92, 180)), 1):
        pixels[:, top : top + 24, :90, :3] = grey
        pixels[:, top : top + 24, :90, 3] = label
    clip = StoredClip(pixels, (0, 0, NO_CLASS), is_dense=False)
    views = clip_views(np.random.default_rng(0), clip, 7)
    assert set(views.objects.tolist()) - {NOTHING} == {0, 2}
    assert set(views.grounds.tolist()) == {7}
    samples = ViewSamples(grounds=[draw_views(128, 0)], clips=[clip], count=20, seed=0)
    sizes = {len(samples[index].objects) for index in range(12)}
    assert len(sizes) > 1, "some samples are the clip's"


def test_a_picture_without_objects_has_no_views() -> None:
    clip = StoredClip(np.zeros((2, 64, 64, 4), np.uint8), (), is_dense=False)
    assert not len(clip_views(np.random.default_rng(0), clip, 0).objects)
    samples = ViewSamples(grounds=[draw_views(128, 0)], clips=[clip], count=20, seed=0)
    assert min(len(samples[index].objects) for index in range(12)) == 0
