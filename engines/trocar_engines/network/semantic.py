"""Temporal semantic head: what kind of object is it, judged over its whole memory.

SAM2S (arXiv 2511.16618), "Temporal semantic learning": a learnable class token attends to the object's
memory tokens, then to the current picture; its projection is compared with one vector per class.
"""

import torch
from torch import Tensor, nn

from trocar_engines.network.attention import attend

LOGIT_SCALE = 100.0
"""Fixed scale of the cosine similarities, as in CLIP (arXiv 2103.00020) and SAM2S."""


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
        classes: their names, in the order of the logits.
    """

    vectors: Tensor

    def __init__(self, *, d_model: int, d_memory: int, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, d_model) * 0.02)
        self.query_memory = nn.Linear(d_model, d_memory)
        self.from_memory = nn.Linear(d_memory, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.query_picture = nn.Linear(d_model, d_model)
        self.from_picture = nn.Linear(d_model, d_model)
        self.projection = nn.Sequential(nn.LayerNorm(d_model), nn.Linear(d_model, d_model))
        self.register_buffer("vectors", class_vectors(classes, d_model))

    def forward(self, memory: Tensor, bias: Tensor, picture: Tensor) -> Tensor:
        """Class logits of each object.

        Args:
            memory: [B, M, d_memory] memory tokens, pointers included.
            bias: [B, 1, M] hides empty slots.
            picture: [B, N, d_model] tokens of the current picture, conditioned on the object's memory.

        Returns:
            [B, K], cosine times `LOGIT_SCALE`.
        """
        token = self.token.expand(memory.shape[0], -1, -1)
        token = token + self.from_memory(attend(self.query_memory(token), memory, memory, bias))
        query = self.query_picture(self.norm(token))
        token = token + self.from_picture(attend(query, picture, picture))
        embedding = nn.functional.normalize(self.projection(token[:, 0]), dim=-1)
        return LOGIT_SCALE * embedding @ self.vectors.T
