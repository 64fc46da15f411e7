"""Memory attention over a fixed number of slots, with real-valued rotary position encoding."""

import math

import torch
from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
from sam2.modeling.sam.transformer import Attention, RoPEAttention
from torch import Tensor, nn

ROPE_THETA = 10000.0


def rope_tables(dim: int, size: int, stride: int = 1, theta: float = ROPE_THETA) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 2-D axial rotary encoding (arXiv 2403.13298), row-major.

    Args:
        dim: channels.
        size: side of the map.
        stride: of its points, in those of the picture; a point lies in the middle of what it stands for.

    Returns:
        two float32 [size², dim / 2]: the first half of the pairs turns with x, the second with y.
    """
    frequencies = theta ** (-torch.arange(0, dim, 4)[: dim // 4].float() / dim)
    positions = torch.arange(size * size)
    x, y = (axis.float() * stride + (stride - 1) / 2 for axis in (positions % size, positions // size))
    angles = torch.cat([torch.outer(x, frequencies), torch.outer(y, frequencies)], dim=-1)
    return angles.cos(), angles.sin()


def rotate_pairs(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs (a, b) by their angle; [..., N, D] with tables [N, D / 2].

    Turned in the tables' float32, returned in the tokens' type.
    """
    pairs = tokens.unflatten(-1, (-1, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(tokens.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Single-head attention of [B, N, D] on [B, M, D] and values [B, M, E]; bias [B, 1, M] on the scores.

    Computed in the query's type.
    """
    # The exporter knows attention in four dimensions only.
    mask = None if bias is None else bias.unsqueeze(1).to(query.dtype)
    keys, values = (tokens.unsqueeze(1).to(query.dtype) for tokens in (key, value))
    return nn.functional.scaled_dot_product_attention(
        query.unsqueeze(1), keys, values, attn_mask=mask
    ).squeeze(1)


class RealRoPEAttention(RoPEAttention):  # type: ignore[misc]
    """sam2's `RoPEAttention` without complex numbers, which ONNX does not know; the same parameters."""

    cos: Tensor
    sin: Tensor
    memory_cos: Tensor
    memory_sin: Tensor

    def __init__(
        self, *, size: int, embedding_dim: int, kv_in_dim: int | None = None, memory_stride: int = 1
    ) -> None:
        # RoPEAttention's own constructor only adds the complex table and a dropout that inference drops.
        Attention.__init__(self, embedding_dim, num_heads=1, kv_in_dim=kv_in_dim)
        cos, sin = rope_tables(embedding_dim, size)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        cos, sin = rope_tables(embedding_dim, size // memory_stride, memory_stride)
        self.register_buffer("memory_cos", cos, persistent=False)
        self.register_buffer("memory_sin", sin, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention over one picture's tokens, [B, N, C]."""
        query = rotate_pairs(self.q_proj(q), self.cos, self.sin)
        key = rotate_pairs(self.k_proj(k), self.cos, self.sin)
        return self.out_proj(attend(query, key, self.v_proj(v)))  # type: ignore[no-any-return]

    def attend_slots(
        self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, pointers: int
    ) -> Tensor:
        """Cross-attention from one picture to the slots of its object.

        Args:
            queries: [B, N, C].
            keys: [B, K·n + pointers, C_mem], position already added; slots of n tokens first, pointer tokens
                last.
            values: [B, K·n + pointers, C_mem].
            bias: [B, 1, K·n + pointers] added to the scores; a large negative value hides a token. None hides
                nothing, and lets a GPU take its faster attention.
            pointers: number of pointer tokens, which carry no spatial rotation.
        """
        query = rotate_pairs(self.q_proj(queries), self.cos, self.sin)
        projected = self.k_proj(keys)
        spatial = projected.shape[1] - pointers
        slots = projected[:, :spatial].unflatten(1, (-1, self.memory_cos.shape[0]))
        slots = rotate_pairs(slots, self.memory_cos, self.memory_sin).flatten(1, 2)
        key = torch.cat([slots, projected[:, spatial:]], dim=1)
        # attn·(M·W) = (attn·M)·W: projecting the attended memory instead of every memory token is exact,
        # for the weights of a row sum to one and so carry the bias of v_proj unchanged.
        return self.out_proj(self.v_proj(attend(query, key, values, bias)))  # type: ignore[no-any-return]


class SlotMemoryAttention(MemoryAttention):  # type: ignore[misc]
    """sam2's `MemoryAttention` for batch-first tokens and slots of which some may be empty."""

    def __init__(
        self, *, d_model: int, d_memory: int, mlp: int, layers: int, size: int, memory_stride: int
    ) -> None:
        layer = MemoryAttentionLayer(
            activation="relu",
            cross_attention=RealRoPEAttention(
                size=size, embedding_dim=d_model, kv_in_dim=d_memory, memory_stride=memory_stride
            ),
            d_model=d_model,
            dim_feedforward=mlp,
            dropout=0.0,
            pos_enc_at_attn=False,
            pos_enc_at_cross_attn_keys=True,
            pos_enc_at_cross_attn_queries=False,
            self_attention=RealRoPEAttention(size=size, embedding_dim=d_model),
        )
        super().__init__(d_model=d_model, pos_enc_at_input=True, layer=layer, num_layers=layers)

    def forward(
        self, curr: Tensor, memory: Tensor, keys: Tensor, bias: Tensor | None, pointers: int
    ) -> Tensor:
        """Condition picture tokens on memory tokens.

        Args:
            curr: [B, N, C], position already added.
            memory: [B, M, C_mem] values; `keys` is the same with positions.
            bias: [B, 1, M], or None.
            pointers: how many of the M tokens, at the end, are pointer tokens.

        Returns:
            [B, N, C].
        """
        tokens = curr
        for layer in self.layers:
            tokens = layer._forward_sa(tokens, None)
            attention: RealRoPEAttention = layer.cross_attn_image
            tokens = tokens + attention.attend_slots(layer.norm2(tokens), keys, memory, bias, pointers)
            tokens = tokens + layer.linear2(torch.relu(layer.linear1(layer.norm3(tokens))))
        return self.norm(tokens)  # type: ignore[no-any-return]


def sine_position(steps: Tensor, dim: int) -> Tensor:
    """1-D sine position encoding (arXiv 1706.03762, 3.5) of `steps` [..., ] as [..., dim], in float32."""
    half = dim // 2
    periods = 10000.0 ** (2 * (torch.arange(half, device=steps.device) // 2).float() / half)
    angles = steps.float().unsqueeze(-1) / periods
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def local_attention_start(attention: Attention, score: float = 4.0) -> None:
    """Give query and key projections an equal constant bias, so that rotary attention starts out local.

    Both then hold the same vector at every position and only the rotation tells positions apart: a token
    scores `score` against its own position and less with distance. Without it a small network trained from
    scratch takes long to find that what it looks for lies about where it lay.
    """
    constant = math.sqrt(score / math.sqrt(attention.internal_dim))
    nn.init.constant_(attention.q_proj.bias, constant)
    nn.init.constant_(attention.k_proj.bias, constant)
