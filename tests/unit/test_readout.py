"""The affinity readout on pictures whose keys are set by hand."""

import pytest
import torch
from torch import Tensor

from trocar_engines.network.readout import READOUT_SLOTS, AffinityReadout

SIZE = 16
"""Side of the stride-8 map; a picture of 128 pixels."""
DIM = 4


def make_readout() -> AffinityReadout:
    return AffinityReadout(features=8, dim=DIM, size=SIZE).requires_grad_(False)


def keys_with(square: tuple[int, int, int, int], *, of_object: int = 0, of_others: int = 1) -> Tensor:
    """Unit keys [1, DIM, SIZE, SIZE]: one direction inside the square (x0, y0, x1, y1), another outside."""
    keys = torch.zeros(1, DIM, SIZE, SIZE)
    keys[:, of_others] = 1.0
    x0, y0, x1, y1 = square
    keys[:, of_others, y0:y1, x0:x1] = 0.0
    keys[:, of_object, y0:y1, x0:x1] = 1.0
    return keys


def mask_of(square: tuple[int, int, int, int]) -> Tensor:
    """Mask logits [1, 2·SIZE, 2·SIZE] of the square."""
    x0, y0, x1, y1 = (2 * side for side in square)
    logits = torch.full((1, 2 * SIZE, 2 * SIZE), -10.0)
    logits[:, y0:y1, x0:x1] = 10.0
    return logits


def overlap(logits: Tensor, square: tuple[int, int, int, int]) -> float:
    found = logits[0, 0] > 0
    truth = mask_of(square)[0, ::2, ::2] > 0
    return float((found & truth).sum() / (found | truth).sum())


@pytest.mark.parametrize("square", [(4, 5, 9, 12), (0, 0, 6, 6), (8, 2, 16, 16), (0, 0, 16, 8)])
def test_box_is_read_as_what_differs_from_its_surroundings(
    square: tuple[int, int, int, int],
) -> None:
    x0, y0, x1, y1 = square
    corners = torch.tensor([[[8.0 * x0, 8.0 * y0], [8.0 * x1, 8.0 * y1]]])
    logits = make_readout().from_points(keys_with(square), corners, torch.tensor([[2, 3]]))
    assert overlap(logits, square) == 1.0


def test_nothing_far_outside_a_box_is_the_object_even_if_it_looks_alike() -> None:
    keys = keys_with((2, 2, 6, 6))
    keys[:, :, 10:14, 10:14] = keys[:, :, 2:6, 2:6]
    corners = torch.tensor([[[16.0, 16.0], [48.0, 48.0]]])
    readout = make_readout()
    logits = readout.from_points(keys, corners, torch.tensor([[2, 3]]))
    assert overlap(logits, (2, 2, 6, 6)) == 1.0
    readout.box_slope.zero_()
    readout.point_locality.zero_()
    logits = readout.from_points(keys, corners, torch.tensor([[2, 3]]))
    assert logits[0, 0, 11, 11] > 0, "without them the twin is taken too"


def test_clicks_and_boxes_share_a_batch_and_padding_says_nothing() -> None:
    readout, square = make_readout(), (4, 4, 10, 10)
    keys = keys_with(square)
    click, box = [[56.0, 56.0], [0.0, 0.0]], [[32.0, 32.0], [80.0, 80.0]]
    points, labels = torch.tensor([click, box, click]), torch.tensor([[1, -1], [2, 3], [-1, -1]])
    logits = readout.from_points(keys.repeat(3, 1, 1, 1), points, labels)
    alone = readout.from_points(keys, points[:1, :1], labels[:1, :1])
    assert torch.allclose(logits[0], alone[0], atol=1e-5)
    assert overlap(logits[1:2], square) == 1.0
    assert not logits[2].any()


@pytest.mark.parametrize("slot", range(READOUT_SLOTS))
def test_every_remembered_picture_is_read(slot: int) -> None:
    """The object looks here as it did in one of the pictures only; the others show it otherwise."""
    readout, square = make_readout(), (4, 4, 8, 8)
    known = readout.prototypes(keys_with(square), mask_of(square))
    other = readout.prototypes(keys_with(square, of_object=2), mask_of(square))
    memory = torch.stack([known if index == slot else other for index in range(READOUT_SLOTS)], dim=1)
    logits, support = readout(keys_with(square), memory)
    assert overlap(logits, square) == 1.0
    _, unlike = readout(keys_with(square), torch.stack([other] * READOUT_SLOTS, dim=1))
    assert (support > unlike + 5).all()


def test_the_prompted_picture_is_believed_before_the_latest_one() -> None:
    readout, square = make_readout(), (4, 4, 8, 8)
    readout.locality.data.zero_()
    keys = keys_with(square)
    told, guessed = (readout.prototypes(keys, mask_of(where)) for where in (square, (0, 0, 0, 0)))
    memory = torch.stack([told, guessed], dim=1)
    assert overlap(readout(keys, memory)[0], square) == 1.0
    readout.log_trust.data.zero_()
    assert overlap(readout(keys, memory)[0], square) < 1.0, "as equals they contradict each other"
