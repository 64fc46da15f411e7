"""Temporal semantic head: what kind of object is it, judged over its whole memory.

SAM2S (arXiv 2511.16618), "Temporal semantic learning": a learnable class token attends to the object's
memory tokens, then to the current picture; its projection is compared with one vector per class. Ours attends
to the picture where the object's mask lies, and sees the mask's outline and finer features beside it: what
tells instruments apart is the shape of a tip that may be two tokens wide.
"""

import torch
from torch import Tensor, nn

from trocar_engines.network.attention import attend

LOGIT_SCALE = 10.0
"""Fixed scale of the cosine similarities. CLIP (arXiv 2103.00020) and SAM2S take 100 for text embeddings,
which lie close together; against orthonormal vectors that is sure of everything, and nothing was learnt."""
OUTLINE_CHANNELS = 32
OUTSIDE_SHARE = 1e-3
"""Weight of a point outside the mask beside one inside."""


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


class SemanticHead(nn.Module):
    """Class token, two cross-attentions, projection, cosine.

    Args:
        d_model: channels of the current picture's tokens.
        d_memory: channels of memory tokens.
        d_fine: channels of the features at stride 8.
        classes: their names, in the order of the logits.
    """

    vectors: Tensor

    def __init__(self, *, d_model: int, d_memory: int, d_fine: int, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, d_model) * 0.02)
        self.query_memory = nn.Linear(d_model, d_memory)
        self.from_memory = nn.Linear(d_memory, d_model)
        self.norm = nn.LayerNorm(d_model)
        # Four channels more: the mask at stride 4, a 2x2 block of it at every stride-8 point.
        self.outline = nn.Sequential(
            nn.Conv2d(d_fine + 4, OUTLINE_CHANNELS, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(OUTLINE_CHANNELS, d_model, 3, padding=1),
        )
        self.query_picture = nn.Linear(d_model, d_model)
        self.from_picture = nn.Linear(d_model, d_model)
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

    def forward(self, token: Tensor, picture: Tensor, fine: Tensor, mask_logits: Tensor) -> Tensor:
        """Class logits of each object.

        Args:
            token: [B, d_model] from `remember` or `without_memory`.
            picture: [B, d_model, h, w] embedding of the current picture.
            fine: [B, d_fine, 2h, 2w] its features at stride 8.
            mask_logits: [B, 4h, 4w] of the object in it.

        Returns:
            [B, K], cosine times `LOGIT_SCALE`.
        """
        mask = mask_logits.sigmoid().unsqueeze(1)
        share = nn.functional.avg_pool2d(mask, 4).flatten(2)
        outline = self.outline(torch.cat([fine, nn.functional.pixel_unshuffle(mask, 2)], dim=1))
        token, points = token.unsqueeze(1), (picture + outline).flatten(2).transpose(1, 2)
        query = self.query_picture(self.norm(token))
        token = token + self.from_picture(attend(query, points, points, (share + OUTSIDE_SHARE).log()))
        embedding = nn.functional.normalize(self.projection(token.squeeze(1)), dim=-1)
        return LOGIT_SCALE * embedding @ self.vectors.T
