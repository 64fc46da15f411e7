"""Windows on objects: a part of the picture that is turned and scaled with the object's mask.

An instrument is long and comes in from the border; its tip is what it works with. A window is a grid
of points in the object's own frame: the origin at the tip, lengths in widths of the object.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

NARROWEST, WIDEST = 1.0, 16.0
"""Limits of an object's width, in points at stride 4."""
INSIDE = 2.5
"""An end of an object so many points from the picture's border lies in the picture."""
END_DEPTH = 2.0
"""So many points along an object count as its end."""
EPSILON = 1e-6


class Window(NamedTuple):
    """A grid of points in an object's frame.

    Args:
        along: points along the object, from behind its tip to beyond it.
        across: points from side to side.
        behind: reach back along the object from its tip, in widths.
        beyond: reach beyond the tip.
        aside: reach to each side.
    """

    along: int
    across: int
    behind: float
    beyond: float
    aside: float


class Pose(NamedTuple):
    """Where objects lie, in points at stride 4; each [B].

    Args:
        tip_x: the tip, and `tip_y`.
        ahead_x: unit vector from the other end to the tip, and `ahead_y`.
        width: of the object, from `NARROWEST` to `WIDEST`.
        length: from end to end.
    """

    tip_x: Tensor
    tip_y: Tensor
    ahead_x: Tensor
    ahead_y: Tensor
    width: Tensor
    length: Tensor


def find_pose(mask_logits: Tensor) -> Pose:
    """Where each object lies, from its mask.

    Of the two ends of the mask's longest axis the tip is the one further from the picture's border or, where
    the object reaches from border to border, the slimmer one; the width is the area over the distance between
    them.

    Args:
        mask_logits: [B, 4h, 4w].
    """
    mask_logits = mask_logits.float()
    side = mask_logits.shape[-1]
    ticks = torch.arange(side, device=mask_logits.device).float() + 0.5
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    is_on = (mask_logits > 0).to(x.dtype)
    area = is_on.sum((1, 2)).clamp(min=1.0)  # less only of an empty mask
    end_x, end_y = _find_ends(is_on, x, y, area)
    length = ((end_x[:, 0] - end_x[:, 1]).square() + (end_y[:, 0] - end_y[:, 1]).square()).sqrt()
    length = length.clamp(min=2 * NARROWEST)
    width = (area / length).clamp(NARROWEST, WIDEST)
    inside = torch.minimum(torch.minimum(end_x, side - end_x), torch.minimum(end_y, side - end_y))
    apart = (x - end_x.view(-1, 2, 1, 1)).square() + (y - end_y.view(-1, 2, 1, 1)).square()
    fullness = ((apart <= width.square().view(-1, 1, 1, 1)) * is_on.unsqueeze(1)).sum((2, 3))
    is_crossing = inside.amax(1) < INSIDE
    is_slimmer, is_further_in = fullness[:, 1] < fullness[:, 0], inside[:, 1] > inside[:, 0]
    is_last = (is_crossing & is_slimmer) | (~is_crossing & is_further_in)
    tip_x, tip_y = (torch.where(is_last, of_end[:, 1], of_end[:, 0]) for of_end in (end_x, end_y))
    from_x, from_y = (torch.where(is_last, of_end[:, 0], of_end[:, 1]) for of_end in (end_x, end_y))
    return Pose(tip_x, tip_y, (tip_x - from_x) / length, (tip_y - from_y) / length, width, length)


def look_through(window: Window, pose: Pose, maps: Tensor, *, side: int) -> Tensor:
    """Sample maps at the window's points; zero outside the picture.

    Args:
        window: what to see.
        pose: of B objects.
        maps: [B, C, S, S] of any size.
        side: of the masks that the pose was found on.

    Returns:
        [B, C, along, across].
    """
    steps = [
        (torch.arange(count, device=maps.device).float() + 0.5) / count
        for count in (window.along, window.across)
    ]
    along, across = torch.meshgrid(
        steps[0] * (window.behind + window.beyond) - window.behind,
        (2 * steps[1] - 1) * window.aside,
        indexing="ij",
    )
    tip_x, tip_y, ahead_x, ahead_y, width = (of_each.view(-1, 1, 1) for of_each in pose[:5])
    points = torch.stack(
        [
            tip_x + width * (along * ahead_x - across * ahead_y),
            tip_y + width * (along * ahead_y + across * ahead_x),
        ],
        dim=3,
    )
    return nn.functional.grid_sample(
        maps, 2 * points / side - 1, mode="bilinear", padding_mode="zeros", align_corners=False
    )


def _find_ends(is_on: Tensor, x: Tensor, y: Tensor, area: Tensor) -> tuple[Tensor, Tensor]:
    """The two ends of each mask along its longest axis, x [B, 2] and y [B, 2].

    Args:
        is_on: [B, H, W], 1 on the mask and 0 elsewhere.
        x: [H, W], and `y`, where the points lie.
        area: [B], of the mask.
    """

    def mean(values: Tensor) -> Tensor:
        return ((is_on * values).sum((1, 2)) / area).view(-1, 1, 1)

    from_x, from_y = x - mean(x), y - mean(y)
    spread_x, spread_y, both = mean(from_x.square()), mean(from_y.square()), mean(from_x * from_y)
    difference = spread_x - spread_y
    double_cos = difference / (difference.square() + 4 * both.square()).sqrt().clamp(min=EPSILON)
    cos, sin = ((1 + double_cos).clamp(min=0) / 2).sqrt(), ((1 - double_cos).clamp(min=0) / 2).sqrt()
    along = cos * from_x + torch.where(both < 0, -sin, sin) * from_y
    ends = []
    for sign in (-1.0, 1.0):
        reach = torch.where(is_on > 0, sign * along, -torch.inf).amax((1, 2), keepdim=True)
        # Where the outermost points lie on the whole: of two jaws, between them.
        is_end = is_on * (sign * along >= reach - END_DEPTH)
        count = is_end.sum((1, 2)).clamp(min=1.0)
        ends.append([(is_end * axis).sum((1, 2)) / count for axis in (x, y)])
    end_x, end_y = (torch.stack(of_both, dim=1) for of_both in zip(*ends, strict=True))
    return end_x, end_y
