"""Affinity readout: where does each point of this picture lie in the remembered ones?

Label propagation by feature similarity (STM, arXiv 1904.00607; STCN, arXiv 2106.05210) at stride 8, beside
memory attention at stride 16. In a network this small memory attention loses outlines; the readout keeps
them and hands the decoder a dense mask prompt.
"""

import math

import torch
from torch import Tensor, nn

KEY_STRIDE = 8
READOUT_SLOTS = 2
"""Remembered pictures it compares with: the one prompted last, and the latest (see `MemoryBank.reads`)."""
BOX_MARGIN_PX = 12.0
"""So far outside a box lies what stands for everything that is not in it."""
BOX_LOGIT = 3.0
"""Logit of a point in a box that resembles nothing around it."""
HIDDEN_SCORE = -1e4
"""Score of a prototype without pixels; finite in half precision."""
EPSILON = 1e-9
"""Least evidence; a point that resembles nothing remembered reads 0, neither object nor background."""


class AffinityReadout(nn.Module):
    """Keys of a picture, prototypes of a remembered picture, and the readout between them.

    A remembered picture keeps a prototype for each 2x2 block of stride-8 keys: the mean key of the object's
    pixels or of the others, whichever are more. The quarter of the blocks that is most mixed, the outlines,
    keeps one for both. A third of as many as keys, and outlines stay sharp.

    Args:
        features: channels of the stride-8 features.
        dim: channels of a key.
        size: side of the stride-8 map.
    """

    place: Tensor
    box_directions: Tensor

    def __init__(self, *, features: int, dim: int, size: int) -> None:
        super().__init__()
        self.key = nn.Conv2d(features, dim, 1)
        self.log_scale = nn.Parameter(torch.tensor(3.0))
        self.point_log_scale = nn.Parameter(torch.tensor(2.5))
        self.point_margin = nn.Parameter(torch.tensor(0.5))
        self.point_locality = nn.Parameter(torch.tensor(1.4))
        # Logits a key's distance outside a box costs.
        self.box_slope = nn.Parameter(torch.tensor(1.0))
        # 1 / σ of the Gaussian that ties a point to its place in a remembered picture, in picture sides:
        # the prompted one hardly, the latest one closely.
        self.locality = nn.Parameter(torch.tensor([1.0, 4.0]))
        # Log of how much each remembered picture counts. The prompted one is sure, the latest one a guess; as
        # equals they let a mask creep onto something else while its object is away.
        self.log_trust = nn.Parameter(torch.tensor([math.log(2.0), 0.0]))
        # Place in the picture, -1 to 1, of every stride-8 point and of every 2x2 block.
        ticks = (torch.arange(size).float() + 0.5) / size * 2 - 1
        place = torch.stack(torch.meshgrid(ticks, ticks, indexing="ij"), dim=0)
        self.register_buffer("place", place, persistent=False)
        steps = torch.tensor([-1.0, 0.0, 1.0])
        directions = torch.cartesian_prod(steps, steps)
        self.register_buffer("box_directions", directions[directions.any(dim=1)], persistent=False)

    def keys(self, features: Tensor) -> Tensor:
        """Float [B, C, H, W] features at stride 8 to unit keys [B, dim, H, W]."""
        return nn.functional.normalize(self.key(features), dim=1)

    def prototypes(self, keys: Tensor, mask_logits: Tensor) -> Tensor:
        """What a remembered picture keeps.

        Args:
            keys: [B, dim, H, W] from `keys`.
            mask_logits: [B, 2H, 2W] the object's mask at stride 4.

        Returns:
            [B, dim + 4, H·W / 4 · 5 / 4]: mean key, mean place (y, x), log of the share of the block, and 1
            for a prototype of the object, 0 for one of the others.
        """
        object_share = nn.functional.avg_pool2d(torch.sigmoid(mask_logits).unsqueeze(1), 2)
        described = torch.cat([keys, self.place.expand(keys.shape[0], -1, -1, -1)], dim=1)
        both = []
        for share in (object_share, 1 - object_share):
            mass = nn.functional.avg_pool2d(share, 2)
            mean = nn.functional.avg_pool2d(described * share, 2) / mass.clamp(min=1e-4)
            both.append(torch.cat([mean, mass.clamp(min=1e-4).log()], dim=1).flatten(2))
        of_object, of_others = both
        block_share = nn.functional.avg_pool2d(object_share, 2).flatten(2)
        is_object = block_share > 0.5
        most_mixed = torch.minimum(block_share, 1 - block_share).topk(block_share.shape[2] // 4).indices
        major = torch.where(is_object, of_object, of_others)
        minor = torch.where(is_object, of_others, of_object).gather(
            2, most_mixed.expand(-1, of_object.shape[1], -1)
        )
        side = torch.cat([is_object, ~is_object.gather(2, most_mixed)], dim=2).to(keys.dtype)
        return torch.cat([torch.cat([major, minor], dim=2), side], dim=1)

    def from_points(self, keys: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        """What clicks or a box say of a picture by likeness alone: a coarse mask that the decoder refines.

        Each click is a prototype of one point; a margin stands for everything that was not clicked on. A box
        is eight clicks around it, off the object: whatever in it resembles none of them is the object. (With
        a click in its middle as well, boxes of bent or forked things failed: J&F 52 against 60 on the real
        dev clips.)

        Args:
            keys: [B, dim, H, W] of the clicked picture.
            points: [B, N, 2] (x, y) in input pixels, 8 to a key.
            labels: int64 [B, N]: 1 on the object, 0 off it, 2 and 3 corners of a box; padding says nothing.

        Returns:
            [B, 1, H, W] logits, zeros where neither a point on the object nor a box is given.
        """
        height, width = keys.shape[2:]
        has_box = (labels == 2).any(dim=1)
        first, last = ((points * (labels == corner).unsqueeze(2)).sum(1) for corner in (2, 3))
        around, around_labels = self._points_around(first, last, has_box)
        points, labels = torch.cat([points, around], dim=1), torch.cat([labels, around_labels], dim=1)
        column = (points[..., 0] / KEY_STRIDE).long().clamp(0, width - 1)
        row = (points[..., 1] / KEY_STRIDE).long().clamp(0, height - 1)
        index = (row * width + column).unsqueeze(1)
        flat, place = keys.flatten(2), self.place.flatten(1).unsqueeze(0).expand(keys.shape[0], -1, -1)
        clicked = flat.gather(2, index.expand(-1, flat.shape[1], -1))  # [B, dim, N]
        clicked_place = place.gather(2, index.expand(-1, 2, -1))
        scale = self.point_log_scale.exp()
        likeness = scale * (torch.matmul(clicked.transpose(1, 2), flat) - self.point_margin)
        distance = (clicked_place.unsqueeze(3) - place.unsqueeze(2)).square().sum(1)
        scores = likeness - self.point_locality.square() * distance  # [B, N, H·W]
        on_object = scores + (labels != 1).unsqueeze(2) * HIDDEN_SCORE
        off_object = scores + (labels != 0).unsqueeze(2) * HIDDEN_SCORE
        by_box = torch.where(has_box.view(-1, 1, 1), 0.0, HIDDEN_SCORE).expand(-1, -1, height * width)
        margin = torch.where(has_box.view(-1, 1, 1), -BOX_LOGIT, 0.0).expand_as(by_box)
        on_object, off_object = torch.cat([on_object, by_box], dim=1), torch.cat([off_object, margin], dim=1)
        logits = on_object.logsumexp(1) - off_object.logsumexp(1)
        # In pixels, (x, y) of every key: how far outside the box.
        here = ((self.place.flip(0) + 1) * (KEY_STRIDE * width / 2)).flatten(1).T.unsqueeze(0)
        outside = torch.maximum(first.unsqueeze(1) - here, here - last.unsqueeze(1)).clamp(min=0).amax(2)
        logits = logits - torch.where(has_box.unsqueeze(1), self.box_slope * outside / KEY_STRIDE, 0.0)
        says_something = ((labels == 1).any(dim=1) | has_box).view(-1, 1, 1, 1)
        return torch.where(says_something, logits.view(-1, 1, height, width), 0.0)

    def _points_around(self, first: Tensor, last: Tensor, has_box: Tensor) -> tuple[Tensor, Tensor]:
        """Eight clicks around each box: [B, 8, 2] and labels [B, 8], -1 where they say nothing."""
        directions = self.box_directions
        share = (directions + 1) / 2
        points = first.unsqueeze(1) + share * (last - first).unsqueeze(1) + directions * BOX_MARGIN_PX
        side = float(KEY_STRIDE * self.place.shape[2])
        is_known = has_box.unsqueeze(1) & ((points >= 0) & (points < side)).all(dim=2)
        return points, torch.where(is_known, 0, -1)

    def forward(self, keys: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Probability, as logits, that each point belongs to the object.

        Args:
            keys: [B, dim, H, W] of the current picture.
            memory: [B, M, dim + 4, N] prototypes of M = `READOUT_SLOTS` pictures, in the order given there.

        Returns:
            [B, 1, H, W], and [B, 2] how well the best point resembles the object: its evidence and its logit.
        """
        batch = memory.shape[0]
        key, place, mass, side = memory.split([keys.shape[1], 2, 1, 1], dim=2)
        scale = self.log_scale.exp()
        precision = self.locality.square().view(1, -1, 1, 1)
        # -|place - place'|²/σ² expands to a dot product, so nearness costs four channels and no second
        # matrix. No score is much above 0: exp cannot overflow, and the usual pass for the maximum is saved.
        trust = self.log_trust.view(1, -1, 1, 1)
        offset = mass + trust - precision * place.square().sum(2, keepdim=True) - scale
        squared = (-precision).expand_as(offset)
        prototypes = torch.cat([scale * key, 2 * precision * place, offset, squared], dim=2)
        prototypes = prototypes.transpose(1, 2).flatten(2)  # [B, dim + 4, M·N]
        side = side.transpose(1, 2).flatten(2)  # [B, 1, M·N]
        place_here = self.place.expand(batch, -1, -1, -1)
        ones = torch.ones_like(keys[:, :1])
        points = torch.cat([keys, place_here, ones, place_here.square().sum(1, keepdim=True)], dim=1)
        likelihood = torch.matmul(prototypes.transpose(1, 2), points.flatten(2)).exp()  # [B, M·N, H·W]
        # Two products with one row each: a CPU reads a matrix as it lies only for a single row, and takes
        # 0.27 ms for both rows at once, 0.06 ms for each alone (960 prototypes, one thread).
        on_object, off_object = (
            torch.log(torch.matmul(share, likelihood).squeeze(1) + EPSILON) for share in (side, 1 - side)
        )
        logits = on_object - off_object
        support = torch.stack([on_object.amax(1), logits.amax(1)], dim=1)
        return logits.view(batch, 1, *keys.shape[2:]), support
