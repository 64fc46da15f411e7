"""Memory attention over a fixed number of slots, with real-valued rotary position encoding."""

import logging
import math
import warnings
from enum import Enum
from functools import cache

import torch
from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
from sam2.modeling.sam.transformer import Attention, RoPEAttention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

log = logging.getLogger(__name__)

ROPE_THETA = 10000.0
FEW_QUERIES = 2_048
"""Of all rows together, up to which attention is split by keys; see `choose_attention`."""
MOST_SCORES = 1 << 27
"""Scores of a batch that are written out at most; 256 MB in half precision."""


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


def rotate_pairs(tokens: Tensor, cos: Tensor, sin: Tensor, turn: Tensor | None = None) -> Tensor:
    """Rotate neighbouring channel pairs (a, b) by their angle; [..., N, D] with tables [N, D / 2].

    Turned in the tables' float32, returned in the tokens' type.

    Args:
        turn: cos + i·sin, complex64, or complex32 for float16 tokens. With it the pairs are turned as complex
            numbers, which ONNX does not know: one pass over float16 tokens, or three, rather than eight. Not
            read by a compiler, which makes one pass of the real ones and knows no complex ones either.
    """
    if turn is not None and not torch.compiler.is_compiling():
        wide = tokens if turn.dtype is torch.complex32 else tokens.float()
        numbers = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
        return torch.view_as_real(numbers * turn).flatten(-2).to(tokens.dtype)
    pairs = tokens.unflatten(-1, (-1, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(tokens.dtype)


@cache
def complex_type(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Type in which pairs of a type are turned as complex numbers on a kind of device."""
    if dtype is not torch.float16:
        return torch.complex64
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls the type experimental, once
            ones = torch.view_as_complex(torch.ones(2, 2, dtype=dtype, device=device_type))
            _ = torch.view_as_real(ones * ones).cpu()
    except RuntimeError as error:
        log.warning("complex numbers of float16 cannot be multiplied (%s); they are turned in float32", error)
        return torch.complex64
    return torch.complex32


class AttentionKind(Enum):
    """How a GPU computes attention whose values are narrower than its keys."""

    WIDE_FLASH = "values padded to the keys' width, once for all layers, by whoever asks"
    CUDNN = "values as they are"
    EFFICIENT = "values as they are, and a bias"
    PRODUCTS = "scores written out"


def choose_attention(
    *, rows: int, queries: int, keys: int, has_bias: bool, is_half: bool
) -> AttentionKind | None:
    """What is fastest; None for torch's own choice.

    One object's 1,024 queries on 7,232 keys of 256 channels, values of 64, H200, us: products 91, wide flash
    77, cuDNN 122. Of eight objects 354, 204 and 127, and with a bias (memory-efficient) 171. cuDNN gives all
    keys of 64 queries to one of 132 multiprocessors and takes as long for one object as for eight; flash
    attention splits the keys, but reads values as wide as keys; cuDNN takes 172 for values that wide.
    """
    is_small = rows * queries <= FEW_QUERIES
    if has_bias or not is_half:
        if is_half and not is_small:
            return AttentionKind.EFFICIENT
        return AttentionKind.PRODUCTS if rows * queries * keys <= MOST_SCORES else None
    return AttentionKind.WIDE_FLASH if is_small else AttentionKind.CUDNN


_BACKENDS = {
    AttentionKind.WIDE_FLASH: [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    AttentionKind.CUDNN: [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    AttentionKind.EFFICIENT: [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}
"""First choice first; the others for shapes that it does not take."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    kind: AttentionKind | None = None,
) -> Tensor:
    """Single-head attention of [B, N, D] on [B, M, D] and values [B, M, E]; bias [B, 1, M] on the scores.

    Computed in the query's type.

    Args:
        kind: from `choose_attention`; None leaves it to torch.
    """
    if kind is AttentionKind.PRODUCTS:
        return attend_by_products(query, key, value, bias)
    if kind is None:
        return _attend_fused(query, key, value, bias)
    with sdpa_kernel(_BACKENDS[kind], set_priority=True):
        return _attend_fused(query, key, value, bias)


def kind_of(query: Tensor, key: Tensor, bias: Tensor | None) -> AttentionKind | None:
    """`choose_attention` for these tensors."""
    return choose_attention(
        rows=query.shape[0],
        queries=query.shape[1],
        keys=key.shape[1],
        has_bias=bias is not None,
        is_half=query.dtype.itemsize == 2,
    )


def widen(value: Tensor, width: int) -> Tensor:
    """[B, M, E] values with zeros after them, [B, M, width]."""
    return nn.functional.pad(value, (0, width - value.shape[2]))


def _attend_fused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    # The exporter knows attention in four dimensions only.
    mask = None if bias is None else bias.unsqueeze(1).to(query.dtype)
    keys, values = (tokens.unsqueeze(1).to(query.dtype) for tokens in (key, value))
    return nn.functional.scaled_dot_product_attention(
        query.unsqueeze(1), keys, values, attn_mask=mask
    ).squeeze(1)


def attend_by_products(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """`attend` with its scores written out."""
    # Scaled before the product, whose own scores might exceed half precision.
    scores = torch.matmul(query * query.shape[2] ** -0.5, key.to(query.dtype).transpose(1, 2))
    if bias is not None:
        scores = scores + bias.to(query.dtype)
    return torch.matmul(scores.softmax(-1), value.to(query.dtype))


class RealRoPEAttention(RoPEAttention):  # type: ignore[misc]
    """sam2's `RoPEAttention` without complex numbers, which ONNX does not know; the same parameters."""

    cos: Tensor
    sin: Tensor
    memory_cos: Tensor
    memory_sin: Tensor
    turn: Tensor | None
    memory_turn: Tensor | None

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
        self.register_buffer("turn", None, persistent=False)
        self.register_buffer("memory_turn", None, persistent=False)

    def settle(self) -> None:
        """See `SAM2S.settle`; on a GPU, whose stages nobody exports, the tables become complex."""
        if self.cos.is_cuda:
            self.use_complex(complex_type(self.q_proj.weight.dtype, "cuda"))

    def use_complex(self, dtype: torch.dtype) -> None:
        """Turn pairs as complex numbers of a type from now on."""
        self.turn = torch.complex(self.cos, self.sin).to(dtype)
        self.memory_turn = torch.complex(self.memory_cos, self.memory_sin).to(dtype)

    def turn_of_slots(self, slots: int, pointers: int) -> Tensor | None:
        """Turns of so many slots' tokens and of pointer tokens, which do not turn: [K·n + pointers, D / 2].

        None where pairs are turned as real numbers.
        """
        if self.memory_turn is None:
            return None
        # In float32 first: of float16's complex numbers little more than the product is certain to work.
        turns = torch.complex(self.memory_cos, self.memory_sin).repeat(slots, 1)
        still = turns.new_ones(pointers, turns.shape[1])
        return torch.cat([turns, still]).to(self.memory_turn.dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention over one picture's tokens, [B, N, C]."""
        query = rotate_pairs(self.q_proj(q), self.cos, self.sin, self.turn)
        key = rotate_pairs(self.k_proj(k), self.cos, self.sin, self.turn)
        return self.out_proj(attend(query, key, self.v_proj(v)))  # type: ignore[no-any-return]

    def attend_slots(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor | None,
        pointers: int,
        turn: Tensor | None = None,
        kind: AttentionKind | None = None,
    ) -> Tensor:
        """Cross-attention from one picture to the slots of its object.

        Args:
            queries: [B, N, C].
            keys: [B, K·n + pointers, C_mem], position already added; slots of n tokens first, pointer tokens
                last.
            values: [B, K·n + pointers, C_mem], or wider by zeros.
            bias: [B, 1, K·n + pointers] added to the scores; a large negative value hides a token. None hides
                nothing, and lets a GPU take its faster attention.
            pointers: number of pointer tokens, which carry no spatial rotation.
            turn: from `turn_of_slots`, all keys at once.
            kind: how, see `attend`.
        """
        query = rotate_pairs(self.q_proj(queries), self.cos, self.sin, self.turn)
        key = self.k_proj(keys)
        if turn is not None:
            key = rotate_pairs(key, self.memory_cos, self.memory_sin, turn)
        else:
            spatial = key.shape[1] - pointers
            slots = key[:, :spatial].unflatten(1, (-1, self.memory_cos.shape[0]))
            slots = rotate_pairs(slots, self.memory_cos, self.memory_sin, self.memory_turn).flatten(1, 2)
            key = torch.cat([slots, key[:, spatial:]], dim=1)
        # attn·(M·W) = (attn·M)·W: projecting the attended memory instead of every memory token is exact,
        # for the weights of a row sum to one and so carry the bias of v_proj unchanged.
        attended = attend(query, key, values, bias, kind)
        if attended.shape[2] > self.v_proj.in_features:
            attended = attended[..., : self.v_proj.in_features]
        return self.out_proj(self.v_proj(attended))  # type: ignore[no-any-return]


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
        self._turns: dict[tuple[int, int], Tensor | None] | None = None

    def settle(self) -> None:
        """See `SAM2S.settle`; from now on turns of slots are kept, for each number of them that comes."""
        self._turns = {}

    def _turn_of_slots(self, tokens: int, pointers: int) -> Tensor | None:
        """`RealRoPEAttention.turn_of_slots` for so many tokens, which is the same in every layer."""
        attention: RealRoPEAttention = self.layers[0].cross_attn_image
        # Asked first: in an exported graph the number of tokens is none that could be looked up.
        if self._turns is None or attention.memory_turn is None or torch.compiler.is_compiling():
            return None
        if (tokens, pointers) not in self._turns:
            slots = (tokens - pointers) // attention.memory_cos.shape[0]
            self._turns[tokens, pointers] = attention.turn_of_slots(slots, pointers)
        return self._turns[tokens, pointers]

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
        dtype = self.layers[0].cross_attn_image.k_proj.weight.dtype
        # Cast once, not in every layer.
        keys, memory = keys.to(dtype), memory.to(dtype)
        turn = self._turn_of_slots(keys.shape[1], pointers)
        kind = kind_of(curr, keys, bias) if memory.is_cuda else None
        if kind is AttentionKind.WIDE_FLASH:
            memory = widen(memory, curr.shape[2])
        for layer in self.layers:
            tokens = layer._forward_sa(tokens, None)
            attention: RealRoPEAttention = layer.cross_attn_image
            tokens = tokens + attention.attend_slots(
                layer.norm2(tokens), keys, memory, bias, pointers, turn, kind
            )
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
