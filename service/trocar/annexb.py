"""What an Annex B access unit holds, from its NAL unit headers alone."""

from collections.abc import Iterator

START_CODE = b"\x00\x00\x01"
H264_SLICE_TYPES = frozenset({1, 5})
"""Non-IDR and IDR slices; data partitioning (2 to 4) belongs to a profile that nobody sends."""
H264_KEY_TYPES = frozenset({5, 7})
"""An IDR slice, or a sequence parameter set, with which intra-refresh streams mark entry points."""
HEVC_SLICE_TYPES = frozenset(range(22))
HEVC_KEY_TYPES = frozenset(range(16, 22))
"""Random access pictures."""


def list_h264_types(payload: bytes) -> frozenset[int]:
    """List the nal_unit_type values in an H.264 access unit (ITU-T H.264, 7.3.1)."""
    return frozenset(header[0] & 0x1F for header in _iterate_headers(payload) if header[0] < 0x80)


def list_hevc_types(payload: bytes) -> frozenset[int]:
    """List the nal_unit_type values of the base layer in an HEVC access unit (ITU-T H.265, 7.3.1.2).

    H.264 slices never pass for HEVC: their first byte is odd, which here means a higher layer.
    """
    return frozenset(
        header[0] >> 1
        for header in _iterate_headers(payload)
        if header[0] < 0x80 and not header[0] & 1 and len(header) > 1 and header[1] < 8 and header[1] & 7
    )


def _iterate_headers(payload: bytes) -> Iterator[bytes]:
    position = payload.find(START_CODE)
    # A start code comes first, after zeros at most: the Huffman tables of a JPEG hold one too, further on.
    if payload[: max(0, position)].strip(b"\x00"):
        return
    while 0 <= position < len(payload) - len(START_CODE):
        start = position + len(START_CODE)
        yield payload[start : start + 2]
        position = payload.find(START_CODE, start)
