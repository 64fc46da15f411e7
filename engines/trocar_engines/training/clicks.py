"""Simulated prompts: what a surgeon's finger would give.

As SAM 2 trains and the interactive literature evaluates (arXiv 2408.00714, appendix D): the first click lies
on the object, each further one in the largest region that is wrong.
"""

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d, pad

from trocar_engines.masklets import BoolArray

CENTRE_SHARE = 0.6
"""Share of first clicks in training about the point farthest from the edge; others lie anywhere inside."""
DEPTH_STEPS = 20
"""Erosions that tell how deep a point lies, at half resolution; beyond it all points are as good."""
AIM = 0.3
"""A hand takes a point of 1 / (1 + AIM) of the greatest depth for the deepest one."""


def farthest_point(region: BoolArray) -> tuple[int, int] | None:
    """(x, y) of the point farthest from the region's edge; None for an empty region."""
    if not region.any():
        return None
    padded = np.pad(region, 1).astype(np.uint8)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return int(x), int(y)


def next_click(mask: BoolArray, predicted: BoolArray | None) -> tuple[tuple[int, int], int]:
    """Where to click next, and the label: 1 on the object, 0 off it.

    Args:
        mask: bool [H, W] truth, not empty.
        predicted: bool [H, W] so far; None for the first click.
    """
    if predicted is None:
        point = farthest_point(mask)
        assert point is not None, "a click needs an object"
        return point, 1
    missed, extra = mask & ~predicted, predicted & ~mask
    largest = [_largest_region(missed), _largest_region(extra)]
    label = int(largest[0].sum() >= largest[1].sum())
    point = farthest_point(largest[1 - label])
    if point is None:  # nothing is wrong: confirm the object
        return next_click(mask, None)
    return point, label


def _largest_region(region: BoolArray) -> BoolArray:
    count, regions, stats, _ = cv2.connectedComponentsWithStats(region.astype(np.uint8), connectivity=8)
    if count == 1:
        return region
    return np.asarray(regions == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax()))


def training_clicks(masks: Tensor, predicted: Tensor | None) -> tuple[Tensor, Tensor]:
    """One click per object, with the error of a hand; drawn on the masks' device, without waiting for it.

    The deepest point of all that is wrong takes the place of the largest region's (`next_click`), which would
    need connected components.

    Args:
        masks: bool [B, S, S] truth; an empty one gets a negative click in the middle.
        predicted: bool [B, S, S] so far, or None.

    Returns:
        float32 [B, 1, 2] (x, y) in pixels and int64 [B, 1] labels.
    """
    side = masks.shape[-1]
    middle = (side // 2) * side + side // 2
    on_object = _aim(masks)
    anywhere = (torch.rand_like(masks, dtype=torch.float32) * masks).flatten(1).argmax(1)
    is_centre = torch.rand(len(masks), device=masks.device) < (CENTRE_SHARE if predicted is None else 1.0)
    point = torch.where(is_centre, on_object[0], anywhere)
    label = torch.ones_like(point)
    if predicted is not None:
        (missed, missed_depth), (extra, extra_depth) = _aim(masks & ~predicted), _aim(predicted & ~masks)
        is_missed = missed_depth >= extra_depth
        is_wrong = torch.maximum(missed_depth, extra_depth) > 0
        point = torch.where(is_wrong, torch.where(is_missed, missed, extra), point)
        label = torch.where(is_wrong & ~is_missed, 0, label)
    is_empty = ~masks.flatten(1).any(dim=1)
    point, label = torch.where(is_empty, middle, point), torch.where(is_empty, 0, label)
    points = torch.stack([point % side, point // side], dim=1).float()
    return points.unsqueeze(1), label.unsqueeze(1)


def _aim(regions: Tensor) -> tuple[Tensor, Tensor]:
    """About the deepest point of each region, as y·S + x, and how deep it is.

    Args:
        regions: bool [B, S, S].

    Returns:
        int64 [B] and float32 [B], 0 for an empty region.
    """
    whole = regions.float().unsqueeze(1)
    inside = (avg_pool2d(whole, 2) >= 0.5).float()
    depth = inside.clone()
    for step in range(DEPTH_STEPS):
        # Squares and crosses in turn: an octagon, close to a circle.
        hollow = pad(1 - inside, (1, 1, 1, 1), value=1.0)
        if step % 2:
            hollow = max_pool2d(hollow, 3, stride=1)
        else:
            across, down = (
                max_pool2d(hollow, size, stride=1)[..., cut[0], cut[1]]
                for size, cut in (
                    ((1, 3), (slice(1, -1), slice(None))),
                    ((3, 1), (slice(None), slice(1, -1))),
                )
            )
            hollow = torch.maximum(across, down)
        inside = 1 - hollow
        depth += inside
    # At full resolution only pixels of the region count, and thin ones that half resolution lacks.
    fine = depth.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    fine = (fine + 0.5) * whole
    tried = (fine * (1 + AIM * torch.rand_like(fine))).flatten(1)
    # Of regions as deep the larger one.
    return tried.argmax(1), fine.flatten(1).amax(1) + 0.5 * whole.flatten(1).mean(1)


def training_boxes(masks: Tensor) -> tuple[Tensor, Tensor]:
    """A box per object as two corner points, each side off by up to a tenth of the box.

    Args:
        masks: bool [B, S, S]; an empty one gets a box of one pixel in the middle.

    Returns:
        float32 [B, 2, 2] (x, y) in pixels and int64 [B, 2] labels 2 and 3, as SAM 2 encodes boxes.
    """
    side = masks.shape[-1]
    spans = []
    for axis in (1, 2):  # columns, then rows
        is_on = masks.any(dim=axis).to(torch.uint8)
        is_empty = ~masks.flatten(1).any(dim=1)
        first, last = is_on.argmax(1), side - is_on.flip(1).argmax(1)
        spans.append([torch.where(is_empty, side // 2 + end, at) for end, at in enumerate((first, last))])
    (left, right), (top, bottom) = spans
    box = torch.stack([left, top, right, bottom], dim=1).float()
    sides = (box[:, 2:] - box[:, :2]).repeat(1, 2)
    box = box + (0.05 * torch.randn_like(box)).clamp(-0.1, 0.1) * sides
    labels = torch.arange(2, 4, device=masks.device).expand(len(masks), 2)
    return box.clamp(0, side).view(-1, 2, 2), labels
