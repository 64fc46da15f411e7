"""The window through which the semantic head looks at an object."""

import pytest
import torch
from torch import Tensor

from trocar_engines.network.semantic import WIDEST, WINDOW, view_of_object

SIDE = 64


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
    assert seen.shape == (1, 4, *WINDOW)
    torch.testing.assert_close(seen, upright, atol=1e-3, rtol=0)
    torch.testing.assert_close(turned_shape, shape)
    assert turned_shape[0, 0].item() * WIDEST == pytest.approx(7, abs=0.5)
    assert turned_shape[0, 1].item() * SIDE == pytest.approx(40, abs=2)
    bright = seen[0, 1] > 0.5
    assert bright[29:34].any(dim=1).all(), "the tip lies at the far end of the window"
    assert not bright[:26].any()


def test_an_object_deep_in_the_picture_keeps_its_place() -> None:
    logits, picture = torch.full((1, 128, 128), -10.0), torch.zeros(1, 3, 128, 128)
    logits[0, 62:66, 55:75] = 10.0
    _, shape = view_of_object(logits, picture)
    assert shape[0, 1] * 128 < 25, "its length is its own, not its distance from a corner of the picture"


def test_an_empty_mask_gives_numbers() -> None:
    seen, shape = view_of_object(torch.full((2, SIDE, SIDE), -10.0), torch.rand(2, 3, SIDE, SIDE))
    assert seen.isfinite().all()
    assert shape.isfinite().all()
