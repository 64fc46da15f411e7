"""Temporal semantic head: what kind of object is it, judged over its whole memory.

SAM2S (arXiv 2511.16618), "Temporal semantic learning": a learnable class token attends to the object's
memory tokens, then to the current picture; its projection is compared with one vector per class. What tells
instruments apart is the shape of a tip that is narrower than a token of the picture, so ours looks at the
current picture itself, through a window on the tip that is turned and scaled with the instrument.
"""

import itertools
import math

import torch
from torch import Tensor, nn

from trocar_engines.network.attention import attend

LOGIT_SCALE = 10.0
"""Fixed scale of the cosine similarities. CLIP (arXiv 2103.00020) and SAM2S take 100 for text embeddings,
which lie close together; against orthonormal vectors that is sure of everything, and nothing was learnt."""
WIDTHS = (32, 48, 64, 96)
"""Channels of the look through the window, whose sides each but the first halves."""
WINDOW = (40, 24)
"""Points of the window along the object and across it."""
BEHIND, BEYOND, ASIDE = 4.0, 1.75, 2.0
"""How far the window reaches back along the object from its tip, beyond it and to each side, in widths. A
tracked mask lacks thin jaws: they lie beyond."""
NARROWEST, WIDEST = 1.0, 16.0
"""Limits of an object's width, in points at stride 4."""
INSIDE = 2.5
"""An end of an object so many points from the picture's border lies in the picture."""
END_DEPTH = 2.0
"""So many points along an object count as its end."""
EPSILON = 1e-6


def class_vectors(classes: tuple[str, ...], dim: int) -> Tensor:
    """One unit vector per class, orthonormal and fixed by the number of classes.

    SAM2S takes the embeddings of a text encoder. None can be had offline; a cosine against K orthonormal
    vectors learns the same K-way decision, and a vocabulary of text embeddings can replace them in training.

    Returns:
        float32 [K, dim].
    """
    generator = torch.Generator().manual_seed(len(classes))
    basis: Tensor = torch.linalg.qr(torch.randn(dim, len(classes), generator=generator))[0]
    return basis.T.contiguous()


def view_of_object(mask_logits: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
    """What lies in a window on each object's tip, turned so that the object comes in from one end.

    Of the two ends of the mask's longest axis the tip is the one further from the picture's border or, where
    the object reaches from border to border, the slimmer one; the width is the area over the distance between
    them.

    Args:
        mask_logits: [B, 4h, 4w].
        picture: [B, 3, S, S] normalised, of any size.

    Returns:
        [B, 4, *WINDOW]: the mask, -1 to 1, and the picture; and [B, 2] width over `WIDEST`, length over the
        picture's side.
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
    ahead_x, ahead_y = (tip_x - from_x) / length, (tip_y - from_y) / length
    steps = [(torch.arange(count, device=x.device).float() + 0.5) / count for count in WINDOW]
    along, across = torch.meshgrid(
        steps[0] * (BEHIND + BEYOND) - BEHIND, (2 * steps[1] - 1) * ASIDE, indexing="ij"
    )
    tip_x, tip_y, ahead_x, ahead_y, wide = (
        of_each.view(-1, 1, 1) for of_each in (tip_x, tip_y, ahead_x, ahead_y, width)
    )
    points = torch.stack(
        [
            tip_x + wide * (along * ahead_x - across * ahead_y),
            tip_y + wide * (along * ahead_y + across * ahead_x),
        ],
        dim=3,
    )
    grid = 2 * points / side - 1
    mask = 2 * mask_logits.sigmoid().unsqueeze(1) - 1
    seen = [
        nn.functional.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        for maps in (mask, picture.float())
    ]
    return torch.cat(seen, dim=1), torch.stack([width / WIDEST, length / side], dim=1)


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


class SemanticHead(nn.Module):
    """Class token, a look at its memory and one at the object, projection, cosine.

    Args:
        d_model: channels of the token.
        d_memory: channels of memory tokens.
        classes: their names, in the order of the logits.
    """

    vectors: Tensor

    def __init__(self, *, d_model: int, d_memory: int, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, d_model) * 0.02)
        self.query_memory = nn.Linear(d_model, d_memory)
        self.from_memory = nn.Linear(d_memory, d_model)
        for parameter in self.from_memory.parameters():
            nn.init.zeros_(parameter)  # says nothing until it has learnt to
        layers = [_layer(4, WIDTHS[0], 1), *(_layer(*pair, 2) for pair in itertools.pairwise(WIDTHS))]
        places = math.prod(side // 2 ** (len(WIDTHS) - 1) for side in WINDOW)
        self.look = nn.Sequential(
            *itertools.chain.from_iterable(layers),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(WIDTHS[-1] * places, d_model),
        )
        self.from_shape = nn.Linear(2, d_model)
        self.projection = nn.Sequential(nn.LayerNorm(d_model), nn.Linear(d_model, d_model))
        self.register_buffer("vectors", class_vectors(classes, d_model))

    def remember(self, memory: Tensor, bias: Tensor | None) -> Tensor:
        """The class token of each object after a look at its memory, [B, d_model].

        Args:
            memory: [B, M, d_memory] memory tokens, pointers included.
            bias: [B, 1, M] hides empty slots; None where there are none.
        """
        token = self.token.expand(memory.shape[0], -1, -1)
        token = token + self.from_memory(attend(self.query_memory(token), memory, memory, bias))
        return token.squeeze(1)  # type: ignore[no-any-return]

    def without_memory(self, batch: int) -> Tensor:
        """The class token of objects that begin, [B, d_model]."""
        return self.token.squeeze(1).expand(batch, -1)

    def forward(self, token: Tensor, picture: Tensor, mask_logits: Tensor) -> Tensor:
        """Class logits of each object.

        Args:
            token: [B, d_model] from `remember` or `without_memory`.
            picture: [B, 3, S, S] the current one, normalised.
            mask_logits: [B, 4h, 4w] of the object in it.

        Returns:
            [B, K], cosine times `LOGIT_SCALE`.
        """
        return self.judge(token, *view_of_object(mask_logits, picture))

    def judge(self, token: Tensor, seen: Tensor, shape: Tensor) -> Tensor:
        """Class logits [B, K] of what `view_of_object` saw of each object."""
        token = token + self.look(seen) + self.from_shape(shape)
        embedding = nn.functional.normalize(self.projection(token), dim=-1)
        return LOGIT_SCALE * embedding @ self.vectors.T


def _layer(channels: int, width: int, stride: int) -> list[nn.Module]:
    # Norms of each picture alone: those of a batch stand still where only a part of the network learns.
    return [nn.Conv2d(channels, width, 3, stride=stride, padding=1), nn.GroupNorm(8, width), nn.ReLU()]
