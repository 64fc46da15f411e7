import numpy as np
import torch

from trocar_engines.masks import main_parts, settle_overlaps


def bump(*, x: float, height: float, width: float = 6.0, side: int = 32) -> torch.Tensor:
    """Logits [side, side] of a band round column x that fall off to both sides."""
    columns = torch.arange(side).float() + 0.5
    return (height * (1 - (columns - x).abs() / width)).expand(side, -1).contiguous()


def rivals(count: int) -> torch.Tensor:
    return ~torch.eye(count, dtype=torch.bool)


def test_rivals_share_no_point_and_each_keeps_where_it_is_surer() -> None:
    logits = torch.stack([bump(x=12, height=6), bump(x=18, height=3)])
    assert ((logits > 0).sum(0) > 1).any()
    settled = settle_overlaps(logits, rivals(2))
    claimed = logits.amax(0) > 0
    assert ((settled > 0).sum(0) <= 1).all()
    assert (settled.argmax(0) == logits.argmax(0))[claimed].all()
    apart = (logits > 0).sum(0) < 2
    assert torch.equal((settled > 0)[:, apart], (logits > 0)[:, apart])


def test_border_lies_where_two_are_equally_sure_between_points_too() -> None:
    left, right = bump(x=12, height=6), bump(x=19, height=6)
    settled = settle_overlaps(torch.stack([left, right]), rivals(2))[0, 0]
    # Halfway between 12 and 19 neither wins: the logit passes through 0 there, without a jump.
    points = np.arange(32) + 0.5
    assert abs(np.interp(15.5, points, settled.numpy())) < 1e-5
    assert settled.diff().abs().max() < 2.1


def test_what_is_no_rival_or_the_same_thing_stays_as_it_is() -> None:
    logits = torch.stack([bump(x=12, height=6), bump(x=18, height=3), bump(x=12, height=5)])
    assert torch.equal(settle_overlaps(logits, torch.zeros(3, 3, dtype=torch.bool)), logits)
    twice = settle_overlaps(logits[[0, 2]], rivals(2))
    assert torch.equal(twice, logits[[0, 2]]), "prompted twice"
    one_way = torch.tensor([[False, False], [True, False]])
    settled = settle_overlaps(logits[:2], one_way)
    assert torch.equal(settled[0], logits[0])
    assert not torch.equal(settled[1], logits[1])


def test_a_part_of_another_object_keeps_its_points() -> None:
    whole, part = bump(x=16, height=6, width=10), bump(x=18, height=2, width=2)
    settled = settle_overlaps(torch.stack([whole, part]), rivals(2))
    assert torch.equal(settled[1], part)
    assert torch.equal(settled[0] > 0, whole > part.clamp(min=0))


def test_absent_masks_take_nothing() -> None:
    logits = torch.stack([bump(x=12, height=6), torch.full((32, 32), -1024.0)])
    settled = settle_overlaps(logits, rivals(2))
    assert torch.equal(settled[0], logits[0])
    assert (settled[1] < 0).all()


def boxes(*places: tuple[int, int, int, int]) -> np.ndarray:
    logits = np.full((64, 64), -3.0, dtype=np.float32)
    for top, left, height, width in places:
        logits[top : top + height, left : left + width] = 4.0
    return logits


def test_stray_parts_are_taken_off_with_their_surroundings() -> None:
    logits = boxes((30, 10, 6, 40), (2, 2, 3, 3))
    kept = main_parts(logits)
    np.testing.assert_array_equal(kept > 0, boxes((30, 10, 6, 40)) > 0)
    assert (kept[1:6, 1:6] < -5).all()
    np.testing.assert_array_equal(kept[20:], logits[20:])
    assert kept.dtype == np.float32


def test_halves_of_what_is_crossed_stay() -> None:
    logits = boxes((30, 10, 6, 20), (30, 34, 6, 12))
    np.testing.assert_array_equal(main_parts(logits), logits)
    np.testing.assert_array_equal(main_parts(boxes()), boxes())


def test_a_stray_part_beside_the_object_takes_nothing_from_it() -> None:
    logits = boxes((30, 10, 6, 40), (37, 10, 2, 2))
    np.testing.assert_array_equal(main_parts(logits) > 0, boxes((30, 10, 6, 40)) > 0)
