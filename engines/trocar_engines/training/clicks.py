"""Simulated prompts: what a surgeon's finger would give.

As SAM 2 trains and the interactive literature evaluates (arXiv 2408.00714, appendix D): the first click lies
on the object, each further one in the largest region that is wrong.
"""

import cv2
import numpy as np
import torch
from torch import Tensor

from trocar_engines.masklets import BoolArray

CENTRE_SHARE = 0.6
"""Share of first clicks in training at the point farthest from the edge; the others lie anywhere inside."""


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


def training_clicks(
    rng: np.random.Generator, masks: Tensor, predicted: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One click per object, with the error of a hand.

    Args:
        masks: bool [B, S, S] truth; an empty one gets a negative click in the middle.
        predicted: bool [B, S, S] so far, or None.

    Returns:
        float32 [B, 1, 2] (x, y) in pixels and int64 [B, 1] labels.
    """
    points, labels = [], []
    for index, mask in enumerate(masks.cpu().numpy()):
        if not mask.any():
            point, label = (mask.shape[1] // 2, mask.shape[0] // 2), 0
        elif predicted is None and rng.random() > CENTRE_SHARE:
            inside = np.argwhere(mask)
            y, x = inside[int(rng.integers(len(inside)))]
            point, label = (int(x), int(y)), 1
        else:
            point, label = next_click(mask, None if predicted is None else predicted[index].cpu().numpy())
        points.append([point])
        labels.append([label])
    return (
        torch.tensor(points, dtype=torch.float32, device=masks.device),
        torch.tensor(labels, device=masks.device),
    )


def training_boxes(rng: np.random.Generator, masks: Tensor) -> tuple[Tensor, Tensor]:
    """A box per object as two corner points, each side off by up to a tenth of the box.

    Args:
        masks: bool [B, S, S]; an empty one gets an empty box in the middle.

    Returns:
        float32 [B, 2, 2] (x, y) in pixels and int64 [B, 2] labels 2 and 3, as SAM 2 encodes boxes.
    """
    corners = []
    for mask in masks.cpu().numpy():
        y, x = np.nonzero(mask)
        box = np.array(
            [x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [128, 128, 129, 129], float
        )
        sides = np.tile([box[2] - box[0], box[3] - box[1]], 2)
        box += np.clip(rng.normal(0, 0.05, 4), -0.1, 0.1) * sides
        corners.append(np.clip(box, 0, mask.shape[0]).reshape(2, 2))
    coordinates = torch.tensor(np.stack(corners), dtype=torch.float32, device=masks.device)
    labels = torch.tensor([[2, 3]], device=masks.device).expand(len(corners), 2)
    return coordinates, labels
