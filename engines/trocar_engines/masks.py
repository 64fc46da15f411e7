"""What is done to mask logits beside the network: overlaps of a stream's objects, and stray parts."""

import cv2
import numpy as np
import torch
from torch import Tensor

from trocar_engines.masklets import Float32Array

WITHIN_SHARE = 0.8
"""Of a mask. So much of it on another one, it is a part of that object, or the same object prompted twice: it
yields nothing, and cannot vanish."""
STRAY_SHARE = 0.25
"""Parts of a mask smaller than this share of its largest one are stray. Half of an instrument that another
one crosses is larger; a tip that is cut off from it is not, and then not looked at."""
OFF_LOGIT = -10.0
ROWS_AT_A_TIME = 8
"""Every row is compared with all: 64 objects at once would take 270 MB at 512 pixels."""


def settle_overlaps(mask_logits: Tensor, are_rivals: Tensor) -> Tensor:
    """Masks that share no point: where several claim one, it goes to the largest logit.

    SAM 2 offers the same as `non_overlap_masks`, by a fixed negative logit. Here each logit is lowered by
    the best rival's, if that is positive: what remains is continuous, and the border between two objects
    lies where they are equally sure, between points too.

    Args:
        mask_logits: [B, h, w].
        are_rivals: bool [B, B]; whether row i yields to row j where j is surer.

    Returns:
        [B, h, w].
    """
    is_on = (mask_logits > 0).flatten(1).float()
    is_within = is_on @ is_on.T > WITHIN_SHARE * is_on.sum(1, keepdim=True)
    yields, claimed = are_rivals & ~is_within, mask_logits.clamp(min=0)
    rivals = [
        torch.where(of_some[:, :, None, None], claimed, 0.0).amax(dim=1)
        for of_some in yields.split(ROWS_AT_A_TIME)
    ]
    return mask_logits - torch.cat(rivals)


def main_parts(mask_logits: Float32Array) -> Float32Array:
    """Mask logits [h, w] without stray parts, float32 [h, w].

    An object's pose is found from its outermost points (`network.window`): a few points on a neighbour
    turn it round.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats((mask_logits > 0).astype(np.uint8))
    areas = stats[1:, cv2.CC_STAT_AREA]
    if count <= 2 or areas.min() >= STRAY_SHARE * areas.max():
        return mask_logits
    is_stray = np.concatenate([[False], areas < STRAY_SHARE * areas.max()])[labels]
    # With what surrounds it: between points of a mask there is more than points.
    around = cv2.dilate(is_stray.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    is_kept = (labels > 0) & ~is_stray
    return np.where(around & ~is_kept, np.float32(OFF_LOGIT), mask_logits)
