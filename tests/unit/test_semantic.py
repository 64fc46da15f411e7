"""The window through which the semantic head looks at an object."""

import pytest
import torch
from torch import Tensor

from trocar_engines.network.semantic import TIP, view_of_object
from trocar_engines.network.window import WIDEST

SIDE = 64
TIP_ROW = round(TIP.along * TIP.behind / (TIP.behind + TIP.beyond))
"""Of the window, where the mask ends."""


def bar(turns: int) -> tuple[Tensor, Tensor]:
    """A bar, seven points wide and forty long, that comes in from one side; its end is bright and pointed."""
    logits, picture = torch.full((1, SIDE, SIDE), -10.0), torch.zeros(1, 3, SIDE, SIDE)
    logits[0, 29:36, :40] = 10.0
    logits[0, 32, 40:42] = 10.0
    picture[0, :, 29:36, 34:42] = 1.0
    return logits.rot90(turns, (1, 2)), picture.rot90(turns, (2, 3))


@pytest.mark.parametrize("turns", range(4))
def test_window_turns_with_the_object(turns: int) -> None:
    upright, shape = view_of_object(*bar(0))
    seen, turned_shape = view_of_object(*bar(turns))
    assert seen.shape == (1, 4, TIP.along, TIP.across)
    torch.testing.assert_close(seen, upright, atol=1e-3, rtol=0)
    torch.testing.assert_close(turned_shape, shape)
    assert turned_shape[0, 0].item() * WIDEST == pytest.approx(7, abs=0.5)
    assert turned_shape[0, 1].item() * SIDE == pytest.approx(40, abs=2)
    bright = seen[0, 1] > 0.5
    assert bright[TIP_ROW - 5 : TIP_ROW].any(dim=1).all(), "the tip lies near the far end of the window"
    assert not bright[: TIP_ROW - 9].any()
    assert not bright[TIP_ROW + 3 :].any()


def test_an_object_deep_in_the_picture_keeps_its_place() -> None:
    logits, picture = torch.full((1, 128, 128), -10.0), torch.zeros(1, 3, 128, 128)
    logits[0, 62:66, 55:75] = 10.0
    _, shape = view_of_object(logits, picture)
    assert shape[0, 1] * 128 < 25, "its length is its own, not its distance from a corner of the picture"


def test_object_from_border_to_border_has_its_length_and_its_tip_at_the_slim_end() -> None:
    logits, picture = torch.full((1, SIDE, SIDE), -10.0), torch.zeros(1, 3, SIDE, SIDE)
    logits[0, 27:37, :40] = 10.0
    logits[0, 30:34, 40:] = 10.0
    picture[0, :, 30:34, 52:] = 1.0
    seen, shape = view_of_object(logits, picture)
    assert shape[0, 1].item() * SIDE == pytest.approx(SIDE, abs=3)
    assert seen[0, 1, TIP_ROW - 3 : TIP_ROW].amax() > 0.5


def test_diagonal_object_is_as_wide_as_it_is() -> None:
    """Its entry is no one side of the picture: measured from there it was half as long and twice as wide."""
    ticks = torch.arange(SIDE)
    across = (ticks[None] - ticks[:, None]).abs() / 2**0.5
    logits = torch.where((across < 4) & (ticks[None] + ticks[:, None] < 100), 10.0, -10.0)[None]
    _, shape = view_of_object(logits, torch.zeros(1, 3, SIDE, SIDE))
    assert shape[0, 0].item() * WIDEST == pytest.approx(8, abs=1)
    assert shape[0, 1].item() * SIDE == pytest.approx(100 / 2**0.5, abs=3)


def test_tip_of_open_jaws_lies_between_them() -> None:
    logits, picture = torch.full((1, SIDE, SIDE), -10.0), torch.zeros(1, 3, SIDE, SIDE)
    logits[0, 29:36, :30] = 10.0
    for step in range(12):
        logits[0, [29 - step // 2, 35 + step // 2], 30 + step] = 10.0
    seen, _ = view_of_object(logits, picture)
    torch.testing.assert_close(seen[0, 0], seen[0, 0].flip(1), atol=0.05, rtol=0)


def test_an_empty_mask_gives_numbers() -> None:
    seen, shape = view_of_object(torch.full((2, SIDE, SIDE), -10.0), torch.rand(2, 3, SIDE, SIDE))
    assert seen.isfinite().all()
    assert shape.isfinite().all()
