import pytest
import torch

from trocar_engines.network.attention import (
    AttentionKind,
    RealRoPEAttention,
    attend,
    attend_by_products,
    choose_attention,
    complex_type,
    rope_tables,
    rotate_pairs,
    widen,
)


def test_complex_numbers_turn_pairs_as_real_ones_do() -> None:
    cos, sin = rope_tables(32, 4)
    tokens = torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    turned = rotate_pairs(tokens, cos, sin, torch.complex(cos, sin))
    torch.testing.assert_close(turned, rotate_pairs(tokens, cos, sin), atol=1e-6, rtol=0)
    assert not turned.allclose(tokens, atol=0.1)
    half = rotate_pairs(tokens.half(), cos, sin, torch.complex(cos, sin))
    assert half.equal(rotate_pairs(tokens.half(), cos, sin))


@pytest.mark.parametrize("has_bias", [False, True])
def test_attention_by_products_equals_the_fused_one(has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, count, 32, generator=generator) for count in (10, 70))
    value = torch.randn(2, 70, 8, generator=generator)
    bias = torch.zeros(2, 1, 70).index_fill(2, torch.arange(50, 70), -1e4) if has_bias else None
    expected = attend(query, key, value, bias)
    torch.testing.assert_close(attend_by_products(query, key, value, bias), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.05


@pytest.mark.parametrize("kind", list(AttentionKind))
def test_every_kind_of_attention_gives_the_same(kind: AttentionKind) -> None:
    """Where a device lacks a kernel, the next one takes its place."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, count, 32, generator=generator) for count in (10, 70))
    value = torch.randn(2, 70, 8, generator=generator)
    expected = attend(query, key, value)
    given = widen(value, 32) if kind is AttentionKind.WIDE_FLASH else value
    found = attend(query, key, given, kind=kind)[..., :8]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_complex_numbers_of_float16_turn_pairs_within_a_rounding() -> None:
    cos, sin = rope_tables(32, 4)
    tokens = torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    turn = torch.complex(cos, sin).to(torch.complex32)
    turned = rotate_pairs(tokens.half(), cos, sin, turn)
    assert turned.dtype is torch.float16
    torch.testing.assert_close(turned.float(), rotate_pairs(tokens, cos, sin), atol=4e-3, rtol=0)


def test_complex_type_follows_the_tokens_type() -> None:
    assert complex_type(torch.float16, "cpu") is torch.complex32
    assert complex_type(torch.float32, "cpu") is complex_type(torch.bfloat16, "cpu") is torch.complex64


@pytest.mark.parametrize("is_complex", [False, True])
def test_all_keys_turned_at_once_attend_as_slot_by_slot(is_complex: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    attention = RealRoPEAttention(size=4, embedding_dim=32, kv_in_dim=8).requires_grad_(False)
    queries = torch.randn(2, 16, 32, generator=generator)
    keys, values = (torch.randn(2, 3 * 16 + 2, 8, generator=generator) for _ in range(2))
    expected = attention.attend_slots(queries, keys, values, None, 2)
    assert attention.turn_of_slots(3, 2) is None
    attention.use_complex(torch.complex64)
    turn = attention.turn_of_slots(3, 2) if is_complex else None
    # Values that are widened by zeros stand for themselves.
    found = attention.attend_slots(queries, keys, widen(values, 32), None, 2, turn)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.01


@pytest.mark.parametrize(
    ("rows", "has_bias", "is_half", "kind"),
    [
        (1, False, True, AttentionKind.WIDE_FLASH),
        (2, False, True, AttentionKind.WIDE_FLASH),
        (4, False, True, AttentionKind.CUDNN),
        (1, True, True, AttentionKind.PRODUCTS),
        (8, True, True, AttentionKind.EFFICIENT),
        (1, False, False, AttentionKind.PRODUCTS),
        (32, False, False, None),
    ],
)
def test_attention_goes_by_rows_bias_and_precision(
    rows: int, has_bias: bool, is_half: bool, kind: AttentionKind | None
) -> None:
    chosen = choose_attention(rows=rows, queries=1024, keys=7232, has_bias=has_bias, is_half=is_half)
    assert chosen is kind
