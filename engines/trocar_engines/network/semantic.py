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
from trocar_engines.network.window import WIDEST, Window, find_pose, look_through

LOGIT_SCALE = 10.0
"""Fixed scale of the cosine similarities. CLIP (arXiv 2103.00020) and SAM2S take 100 for text embeddings,
which lie close together; against orthonormal vectors that is sure of everything, and nothing was learnt."""
WIDTHS = (32, 48, 64, 96)
"""Channels of the look through the window, whose sides each but the first halves."""
TIP = Window(along=56, across=24, behind=4.0, beyond=3.5, aside=2.0)
"""On the tip. A tracked mask lacks thin jaws, or ends at the wrist: they lie beyond."""


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
    """What lies in `TIP` on each object, turned so that the object comes in from one end.

    Args:
        mask_logits: [B, 4h, 4w].
        picture: [B, 3, S, S] normalised, of any size.

    Returns:
        [B, 4, along, across]: the mask, -1 to 1, and the picture; and [B, 2] width over `WIDEST`, length over
        the picture's side.
    """
    pose, side = find_pose(mask_logits), mask_logits.shape[-1]
    mask = 2 * mask_logits.float().sigmoid().unsqueeze(1) - 1
    seen = [look_through(TIP, pose, maps, side=side) for maps in (mask, picture.float())]
    return torch.cat(seen, dim=1), torch.stack([pose.width / WIDEST, pose.length / side], dim=1)


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
        places = math.prod(side // 2 ** (len(WIDTHS) - 1) for side in (TIP.along, TIP.across))
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
        seen, shape = view_of_object(mask_logits, picture)
        token = token + self.look(seen) + self.from_shape(shape)
        embedding = nn.functional.normalize(self.projection(token), dim=-1)
        return LOGIT_SCALE * embedding @ self.vectors.T


def _layer(channels: int, width: int, stride: int) -> list[nn.Module]:
    # Norms of each picture alone: those of a batch stand still where only a part of the network learns.
    return [nn.Conv2d(channels, width, 3, stride=stride, padding=1), nn.GroupNorm(8, width), nn.ReLU()]
