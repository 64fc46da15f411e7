from collections.abc import Sequence

import numpy as np
import pytest

from trocar.decode import (
    Codec,
    ColorMatrix,
    Decoded,
    FaultKind,
    Packet,
    PacketDecoder,
    VideoFormat,
    describe_payload,
    is_entry_point,
)
from trocar.errors import ContractError
from wire.clips import HEIGHT_PX, WIDTH_PX, draw_frame, draw_frames, encode_clip, encode_jpeg

MAX_PIXELS = 1920 * 1080


def open_decoder(
    codec: Codec, *, width_px: int = 0, height_px: int = 0, max_pixels: int = MAX_PIXELS
) -> PacketDecoder:
    return PacketDecoder(
        VideoFormat(codec=codec, width_px=width_px, height_px=height_px, max_pixels=max_pixels)
    )


def decode_all(decoder: PacketDecoder, payloads: Sequence[bytes], first_id: int = 0) -> list[Decoded]:
    return [
        decoder.decode(Packet(frame_id=frame_id, payload=payload))
        for frame_id, payload in enumerate(payloads, first_id)
    ]


def trust_of(decoded: Sequence[Decoded]) -> str:
    """One letter per packet: trusted, untrusted, or no picture."""
    return "".join("-" if one.picture is None else "tu"[not one.picture.is_trusted] for one in decoded)


@pytest.mark.parametrize(("codec", "encoder"), [(Codec.H264, "libx264"), (Codec.HEVC, "libx265")])
def test_each_packet_gives_its_own_picture_at_once(codec: Codec, encoder: str) -> None:
    frames = draw_frames(12)
    decoded = decode_all(open_decoder(codec), encode_clip(frames, encoder=encoder))
    for frame, one in zip(frames, decoded, strict=True):
        assert one.picture is not None
        assert one.picture.rgb.shape == (HEIGHT_PX, WIDTH_PX, 3)
        assert np.abs(one.picture.rgb.astype(int) - frame).mean() < 6
        assert not one.faults


def test_jpeg_and_raw_pictures_are_exact() -> None:
    frame = draw_frame(0)
    (raw,) = decode_all(open_decoder(Codec.RGB24, width_px=WIDTH_PX, height_px=HEIGHT_PX), [frame.tobytes()])
    assert raw.picture is not None
    np.testing.assert_array_equal(raw.picture.rgb, frame)
    (jpeg,) = decode_all(open_decoder(Codec.JPEG), [encode_jpeg(frame)])
    assert jpeg.picture is not None
    assert np.abs(jpeg.picture.rgb.astype(int) - frame).mean() < 4


@pytest.mark.parametrize("matrix", list(ColorMatrix))
def test_nv12_colours_follow_the_matrix(matrix: ColorMatrix) -> None:
    luma, red_chroma = np.full((4, 4), 81, np.uint8), np.tile(np.array([90, 240], np.uint8), (2, 2))
    payload = luma.tobytes() + red_chroma.tobytes()
    video = VideoFormat(codec=Codec.NV12, width_px=4, height_px=4, color_matrix=matrix, max_pixels=16)
    picture = PacketDecoder(video).decode(Packet(frame_id=0, payload=payload)).picture
    assert picture is not None
    red, green, _ = picture.rgb[0, 0]
    assert red > 245
    assert (green < 10) == (matrix is ColorMatrix.BT601), "81, 90, 240 is pure red in BT.601 alone"


def test_raw_frame_may_bring_a_new_size() -> None:
    decoder = open_decoder(Codec.RGB24, width_px=4, height_px=2)
    decoder.decode(Packet(frame_id=0, payload=bytes(24)))
    larger = decoder.decode(Packet(frame_id=1, payload=bytes(96), width_px=8, height_px=4))
    assert larger.picture is not None
    assert [fault.kind for fault in larger.faults] == [FaultKind.RESOLUTION_CHANGED]
    assert "8x4 from frame 1 on, 4x2 before" in larger.faults[0].message


def test_gap_distrusts_until_the_next_keyframe() -> None:
    packets = encode_clip(draw_frames(20), keyframe_interval=10)
    decoder = open_decoder(Codec.H264)
    before = decode_all(decoder, packets[:4])
    after = decode_all(decoder, packets[6:], first_id=6)
    assert trust_of(before + after) == "tttt" + "uuuu" + "t" * 10
    assert [one.needs_keyframe for one in after].count(True) == 1
    assert after[0].faults[0].kind is FaultKind.GAP


def test_gap_before_a_keyframe_costs_no_trust_and_asks_for_nothing() -> None:
    packets = encode_clip(draw_frames(20), keyframe_interval=10)
    decoder = open_decoder(Codec.H264)
    decode_all(decoder, packets[:8])
    (keyframe,) = decode_all(decoder, packets[10:11], first_id=10)
    assert trust_of([keyframe]) == "t"
    assert keyframe.faults[0].kind is FaultKind.GAP
    assert not keyframe.needs_keyframe


def test_gap_between_jpegs_is_only_a_gap() -> None:
    decoder = open_decoder(Codec.JPEG)
    decode_all(decoder, [encode_jpeg(draw_frame(0))])
    (later,) = decode_all(decoder, [encode_jpeg(draw_frame(1))], first_id=9)
    assert trust_of([later]) == "t"
    assert not later.faults


def test_empty_packet_does_not_end_the_decoder() -> None:
    packets = encode_clip(draw_frames(12), keyframe_interval=10)
    packets[2] = b""
    assert trust_of(decode_all(open_decoder(Codec.H264), packets)) == "tt-uuuuuuutt"


def test_skipped_packets_are_not_a_gap_but_cost_trust() -> None:
    packets = encode_clip(draw_frames(12), keyframe_interval=6)
    decoder = open_decoder(Codec.H264)
    decode_all(decoder, packets[:2])
    assert decoder.skip(4)
    assert not decoder.skip(5), "it has just asked"
    resumed = decode_all(decoder, packets[6:], first_id=6)
    assert trust_of(resumed) == "tttttt"
    assert not resumed[0].faults


def test_keyframe_is_asked_for_again_while_it_does_not_come() -> None:
    packets = encode_clip(draw_frames(70), keyframe_interval=100)
    decoded = decode_all(open_decoder(Codec.H264), packets[1:], first_id=1)
    assert [frame_id for frame_id, one in enumerate(decoded, 1) if one.needs_keyframe] == [1, 31, 61]
    assert trust_of(decoded) == "-" * 69


def test_mismatch_is_told_on_the_thirtieth_frame_and_names_both() -> None:
    decoder = open_decoder(Codec.HEVC)
    jpeg = encode_jpeg(draw_frame(0))
    decode_all(decoder, [jpeg] * 29)
    with pytest.raises(ContractError, match=r"30 frames in a row are not HEVC Annex B: .*a JPEG"):
        decode_all(decoder, [jpeg], first_id=29)


def test_a_picture_between_bad_packets_starts_the_count_anew() -> None:
    decoder = open_decoder(Codec.JPEG)
    jpeg = encode_jpeg(draw_frame(0))
    decoded = decode_all(decoder, [*[b"x"] * 20, jpeg, *[b"x"] * 20])
    assert trust_of(decoded) == "-" * 20 + "t" + "-" * 20


@pytest.mark.parametrize("encoder", ["libx264", "libx265"])
def test_b_frames_are_refused_with_the_remedy(encoder: str) -> None:
    codec = Codec.H264 if encoder == "libx264" else Codec.HEVC
    with pytest.raises(ContractError, match="bframes=0"):
        decode_all(open_decoder(codec), encode_clip(draw_frames(8), encoder=encoder, has_b_frames=True))


@pytest.mark.parametrize("codec", [Codec.H264, Codec.JPEG])
@pytest.mark.parametrize("max_pixels", [1000, WIDTH_PX * HEIGHT_PX - 1])
def test_picture_beyond_the_limit_is_refused_with_its_size(codec: Codec, max_pixels: int) -> None:
    frame = draw_frame(0)
    payload = encode_jpeg(frame) if codec is Codec.JPEG else encode_clip([frame])[0]
    (decoded,) = decode_all(open_decoder(codec, max_pixels=max_pixels), [payload])
    assert decoded.picture is None
    assert "160x120" in decoded.faults[0].message


@pytest.mark.parametrize(("codec", "encoder"), [(Codec.H264, "libx264"), (Codec.HEVC, "libx265")])
def test_entry_points_are_the_keyframes(codec: Codec, encoder: str) -> None:
    packets = encode_clip(draw_frames(12), encoder=encoder, keyframe_interval=5)
    entries = [index for index, packet in enumerate(packets) if is_entry_point(codec, packet)]
    assert entries == [0, 5, 10]


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"", "empty payload"),
        (b"\xff\xd8\xff\xe0", "a JPEG"),
        (b"\x89PNG\r\n", "a PNG"),
        (b"\x00\x00\x00\x02ab", "length-prefixed"),
        (b"\x00\x00\x01\x65\x88", "H.264"),
        (b"\x00\x00\x00\x01\x26\x01\xaf", "HEVC"),
        (b"\x00\x00\x01\x09\x10", "without a picture"),
        (b"hello", "5 bytes beginning with 68 65 6c 6c"),
    ],
)
def test_payload_is_described_by_what_it_looks_like(payload: bytes, words: str) -> None:
    assert words in describe_payload(payload)
