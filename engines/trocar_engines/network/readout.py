"""Affinity readout: where does each point of this picture lie in the remembered ones?

Label propagation by feature similarity (STM, arXiv 1904.00607; STCN, arXiv 2106.05210) at stride 8, beside
memory attention at stride 16. In a network this small memory attention loses outlines; the readout keeps
them and hands the decoder a dense mask prompt.
"""

import torch
from torch import Tensor, nn

KEY_STRIDE = 8
HIDDEN_SCORE = -1e4
"""Score of a prototype without pixels; finite in half precision."""
EPSILON = 1e-9
"""Least evidence; a point that resembles nothing remembered reads 0, neither object nor background."""


class AffinityReadout(nn.Module):
    """Keys of a picture, prototypes of a remembered picture, and the readout between them.

    A remembered picture keeps two prototypes for each 2x2 block of stride-8 keys: the mean key of the
    object's pixels and that of the others. Half as many keys as pixels, and outlines stay sharp.

    Args:
        features: channels of the stride-8 features.
        dim: channels of a key.
        size: side of the stride-8 map.
    """

    place: Tensor

    def __init__(self, *, features: int, dim: int, size: int) -> None:
        super().__init__()
        self.key = nn.Conv2d(features, dim, 1)
        self.log_scale = nn.Parameter(torch.tensor(3.0))
        self.point_log_scale = nn.Parameter(torch.tensor(2.5))
        self.point_margin = nn.Parameter(torch.tensor(0.5))
        self.point_locality = nn.Parameter(torch.tensor(1.4))
        # 1 / σ of the Gaussian that ties a point to its place in a remembered picture, in picture sides:
        # long-term pictures hardly, the latest one closely.
        self.locality = nn.Parameter(torch.tensor([1.0, 4.0]))
        # Place in the picture, -1 to 1, of every stride-8 point and of every 2x2 block.
        ticks = (torch.arange(size).float() + 0.5) / size * 2 - 1
        place = torch.stack(torch.meshgrid(ticks, ticks, indexing="ij"), dim=0)
        self.register_buffer("place", place, persistent=False)

    def keys(self, features: Tensor) -> Tensor:
        """Float [B, C, H, W] features at stride 8 to unit keys [B, dim, H, W]."""
        return nn.functional.normalize(self.key(features), dim=1)

    def prototypes(self, keys: Tensor, mask_logits: Tensor) -> Tensor:
        """What a remembered picture keeps.

        Args:
            keys: [B, dim, H, W] from `keys`.
            mask_logits: [B, 2H, 2W] the object's mask at stride 4.

        Returns:
            [B, dim + 3, 2, H/2, W/2]: mean key, mean place (y, x) and log of the share of the block, for
            the object's pixels (index 0 of the third axis) and for the others.
        """
        object_share = nn.functional.avg_pool2d(torch.sigmoid(mask_logits).unsqueeze(1), 2)
        described = torch.cat([keys, self.place.expand(keys.shape[0], -1, -1, -1)], dim=1)
        both = []
        for share in (object_share, 1 - object_share):
            mass = nn.functional.avg_pool2d(share, 2)
            mean = nn.functional.avg_pool2d(described * share, 2) / mass.clamp(min=1e-4)
            both.append(torch.cat([mean, mass.clamp(min=1e-4).log()], dim=1))
        return torch.stack(both, dim=2)

    def from_points(self, keys: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        """What clicks say of a picture by likeness alone: a coarse mask that the decoder refines.

        Each click is a prototype of one point; a margin stands for everything that was not clicked on.

        Args:
            keys: [B, dim, H, W] of the clicked picture.
            points: [B, N, 2] (x, y) in input pixels, 8 to a key.
            labels: int64 [B, N]: 1 on the object, 0 off it, others (box corners, padding) say nothing here.

        Returns:
            [B, 1, H, W] logits, zeros where no point lies on the object.
        """
        height, width = keys.shape[2:]
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
        margin = torch.zeros_like(scores[:, :1])
        logits = on_object.logsumexp(1) - torch.cat([off_object, margin], dim=1).logsumexp(1)
        has_click = (labels == 1).any(dim=1).view(-1, 1, 1, 1)
        return torch.where(has_click, logits.view(-1, 1, height, width), 0.0)

    def forward(self, keys: Tensor, memory: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Probability, as logits, that each point belongs to the object.

        Args:
            keys: [B, dim, H, W] of the current picture.
            memory: [B, M, dim + 3, 2, H/2, W/2] prototypes; the last one is the latest picture's.
            bias: [B, M] added to the scores of a slot; `HIDDEN_SCORE` hides it.

        Returns:
            [B, 1, H, W], and [B, 2] how well the best point resembles the object: its evidence and its logit.
        """
        batch, slots = bias.shape
        key, place, mass = memory.split([keys.shape[1], 2, 1], dim=2)
        scale = self.log_scale.exp()
        latest = torch.ones(slots, device=keys.device).cumsum(0) == slots
        precision = (
            torch.where(latest, self.locality[1], self.locality[0]).square().view(1, slots, 1, 1, 1, 1)
        )
        # -|place - place'|²/σ² expands to a dot product, so nearness costs four channels and no second
        # matrix. Every score is at most 0: exp cannot overflow, and the usual pass for the maximum is saved.
        offset = (
            mass
            - precision * place.square().sum(2, keepdim=True)
            - scale
            + bias.view(batch, slots, 1, 1, 1, 1)
        )
        squared = (-precision).expand_as(offset)
        prototypes = torch.cat([scale * key, 2 * precision * place, offset, squared], dim=2)
        # [B, dim + 4, 2·M·h·w]: every object prototype, then every background prototype.
        prototypes = prototypes.permute(0, 2, 3, 1, 4, 5).flatten(2)
        place_here = self.place.expand(batch, -1, -1, -1)
        ones = torch.ones_like(keys[:, :1])
        points = torch.cat([keys, place_here, ones, place_here.square().sum(1, keepdim=True)], dim=1)
        likelihood = torch.matmul(points.flatten(2).transpose(1, 2), prototypes).exp()
        # Reading the halves as an axis costs a pass over them; splitting or a product with ones costs two.
        evidence = torch.log(likelihood.unflatten(2, (2, -1)).sum(-1) + EPSILON)
        logits = evidence[..., 0] - evidence[..., 1]
        support = torch.stack([evidence[..., 0].amax(1), logits.amax(1)], dim=1)
        return logits.view(batch, 1, *keys.shape[2:]), support
