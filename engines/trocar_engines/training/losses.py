"""What a network is trained against: 20·L_arl + L_dice + L_iou + L_occlusion + 0.1·L_tsl.

SAM2S (arXiv 2511.16618), "Training objective"; focal, dice, IoU and occlusion terms as in SAM 2 (arXiv
2408.00714, appendix D). All in float32 and on logits: a probability clamped near 1 rounds to 1 in bfloat16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trocar_engines.network.sam2s import AllMasks
from trocar_engines.training.store import NO_CLASS

LABEL_SMOOTHING = 0.02
"""Of classes: some pictures show nothing that tells them."""
FOCAL_GAMMA = 2.0
ARL_KERNEL, ARL_SIGMA = 5, 1.0
"""Ambiguity-resilient learning softens labels with a 5x5 Gaussian of sigma 1 (SAM2S)."""
OUTLINE_WEIGHT = 1.0
"""How much more a pixel on the outline counts, where a soft label is one half. Thin parts are all outline."""
LARGEST_BALANCE = 6.0
"""An object's pixels weigh up to so much more than the background's; without it small networks trained from
scratch collapse to background."""


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the terms; `readout` is ours, for the affinity readout alone."""

    arl: float = 20.0
    dice: float = 1.0
    iou: float = 1.0
    occlusion: float = 2.0
    tsl: float = 0.1
    readout: float = 1.0


def soften(masks: Tensor) -> Tensor:
    """Masks [B, H, W] in 0..1 after the Gaussian of ambiguity-resilient learning."""
    offsets = torch.arange(ARL_KERNEL, device=masks.device) - ARL_KERNEL // 2
    weights = torch.exp(-offsets.float().square() / (2 * ARL_SIGMA**2))
    kernel = torch.outer(weights, weights)
    kernel = (kernel / kernel.sum()).view(1, 1, ARL_KERNEL, ARL_KERNEL)
    padded = nn.functional.pad(masks.unsqueeze(1), [ARL_KERNEL // 2] * 4, mode="replicate")
    return nn.functional.conv2d(padded, kernel).squeeze(1)


def focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Focal loss (arXiv 1708.02002) against soft labels, balanced by the object's area.

    Args:
        logits: [B, M, H, W].
        target: [B, 1, H, W] in 0..1.

    Returns:
        [B, M].
    """
    share = target.mean(dim=(-1, -2), keepdim=True)
    balance = ((1 - share) / share.clamp(min=1e-4)).sqrt().clamp(1.0, LARGEST_BALANCE)
    cross_entropy = nn.functional.binary_cross_entropy_with_logits(
        logits, target.expand_as(logits), reduction="none"
    )
    difficulty = (target - logits.sigmoid()).abs() ** FOCAL_GAMMA
    outline = 1 + OUTLINE_WEIGHT * 4 * target * (1 - target)
    return (cross_entropy * difficulty * outline * (1 + (balance - 1) * target)).mean(dim=(-1, -2))


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - Dice, smoothed by one pixel; shapes as in `focal_loss`."""
    probabilities = logits.sigmoid()
    overlap = (probabilities * target).sum(dim=(-1, -2))
    total = probabilities.sum(dim=(-1, -2)) + target.sum(dim=(-1, -2))
    return 1 - (2 * overlap + 1) / (total + 1)


def true_iou(logits: Tensor, target: Tensor) -> Tensor:
    """Overlap of the binarised masks with the truth, [B, M]."""
    mask, truth = logits > 0, target > 0.5
    union = (mask | truth).sum(dim=(-1, -2)).clamp(min=1)
    return (mask & truth).sum(dim=(-1, -2)) / union


def mask_loss(
    every: AllMasks, masks: Tensor, counts: Tensor, weights: LossWeights, *, is_single_used: bool
) -> Tensor:
    """ARL, dice, IoU and occlusion over all candidates of the decoder.

    The three masks of a multimask compete: only the best learns to draw, all learn to judge themselves. The
    single mask is drawn only where inference would use it, or as the anchor of the three.

    Args:
        every: of B objects.
        masks: float [B, S, S], 0 or 1; an empty one is an absent object.
        counts: float [B], 0 for objects from which nothing is learnt, else 1.
        weights: of the terms.
        is_single_used: whether the single mask is among those that learn to draw.

    Returns:
        a scalar.
    """
    logits = nn.functional.interpolate(
        every.mask_logits.float(), scale_factor=2, mode="bilinear", align_corners=False
    )
    truth = nn.functional.adaptive_avg_pool2d(masks.unsqueeze(1), logits.shape[-1])
    shaped = weights.arl * focal_loss(logits, soften(truth.squeeze(1)).unsqueeze(1))
    shaped = shaped + weights.dice * dice_loss(logits, truth)
    judged = weights.iou * (every.predicted_iou.float() - true_iou(logits, truth)).abs()
    best = shaped[:, 1:].argmin(dim=1, keepdim=True) + 1
    drawn = torch.take_along_dim(shaped, best, dim=1).squeeze(1) + judged[:, 1:].mean(dim=1)
    if is_single_used:
        drawn = drawn + shaped[:, 0] + judged[:, 0]
    is_present = (masks.flatten(1).sum(dim=1) > 0).float()
    occlusion = nn.functional.binary_cross_entropy_with_logits(
        every.presence_logit.float(), is_present, reduction="none"
    )
    return _mean(drawn, is_present * counts) + weights.occlusion * _mean(occlusion, counts)


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    return (values * counts).sum() / counts.sum().clamp(min=1)


def readout_loss(readout: Tensor, masks: Tensor, counts: Tensor) -> Tensor:
    """Focal and dice loss of the affinity readout [B, 1, 2h, 2w] alone, so that keys learn to match."""
    logits = readout.float()
    truth = nn.functional.adaptive_avg_pool2d(masks.unsqueeze(1), logits.shape[-1])
    is_present = (masks.flatten(1).sum(dim=1) > 0).float()
    loss = (5 * focal_loss(logits, truth) + dice_loss(logits, truth)).squeeze(1)
    return _mean(loss, is_present * counts)


def class_loss(class_logits: Tensor, classes: Tensor) -> Tensor:
    """InfoNCE of the class embedding against the vocabulary; nothing where a sample has no class."""
    known = (classes != NO_CLASS).float()
    losses = nn.functional.cross_entropy(
        class_logits.float(), classes.clamp(min=0), reduction="none", label_smoothing=LABEL_SMOOTHING
    )
    return _mean(losses, known)
