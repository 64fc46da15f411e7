"""What no honest client would send, made from what one would: damaged packets, messages with senseless
fields, bytes that are no message, prompts from nowhere, weights files that lie. Same seed, same again.
"""

import io
import math
import random
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import av
import cv2
import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from trocar.masklet_codec import encode_mask
from trocar.messages import write_mask
from trocar.v1 import tracking_pb2 as pb
from trocar_engines.masklets import UInt8Array

WIDTH_PX, HEIGHT_PX = 96, 64
PICTURES = 12
LONGEST_JUNK_BYTES = 512
MANY = 300
"""Entries of a list that is longer than anything allowed."""
DEEPEST = 3
"""Messages within messages: the contract has no more."""
EDGE_INTS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    127,
    128,
    255,
    65_535,
    65_536,
    2**31 - 1,
    -(2**31),
    2**32 - 1,
    2**63 - 1,
    -(2**63),
)
EDGE_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 31.5, 95.999, 96.0, 1e9, -1e9, 3e38, math.inf, -math.inf, math.nan)
EDGE_TEXTS = ("", "sam2s-nano", "../../etc/passwd", "\x00", "%s%n", "\u202e", "a" * 70_000)
INT_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64),
}


class Case(NamedTuple):
    """What goes over one call.

    Args:
        kind: how it was made.
        requests: serialised messages, or bytes that should be.
    """

    kind: str
    requests: tuple[bytes, ...]


class Mutator:
    """Makes cases and files without end.

    Args:
        seed: of all that is drawn.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def cases(self) -> Iterator[Case]:
        """One after the other, each kind in turn."""
        kinds: tuple[Callable[[], Case], ...] = (
            self._make_packets,
            self._make_prompts,
            self._make_wire,
            self._make_fields,
            self._make_junk,
        )
        while True:
            for make in kinds:
                yield make()

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Damaged weights: a suffix and what the file holds."""
        while True:
            for suffix, good in self._weights_files.items():
                yield suffix, self.damage(good)

    def good_packets(self, codec: pb.VideoCodec.ValueType) -> list[bytes]:
        """Packets as an honest client sends them, a keyframe twice a round."""
        return self._packets[codec]

    def damage(self, data: bytes) -> bytes:
        """Damage bytes in one way or several."""
        damaged = bytearray(data)
        for _ in range(self._random.choice((1, 1, 1, 2, 4))):
            self._damage_once(damaged)
        return bytes(damaged)

    # ways to damage

    def _damage_once(self, data: bytearray) -> None:
        at, end = sorted(self._random.randint(0, len(data)) for _ in range(2))
        match self._random.randrange(7):
            case 0 if data:
                for _ in range(self._random.randint(1, 8)):
                    data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = self._junk()
            case 4:
                data[at:end] = self._random.randbytes(end - at)
            case 5:
                data[at:at] = data[at:end]
            case _:
                data[at:end] = self._random.choice((b"\x00", b"\xff", b"\x80")) * (end - at)

    def _junk(self) -> bytes:
        return self._random.randbytes(self._random.randint(0, LONGEST_JUNK_BYTES))

    # kinds of cases

    def _make_packets(self) -> Case:
        """A stream in which every other packet is damaged, or is missing, or comes twice."""
        codec, packets = self._random.choice(list(self._packets.items()))
        frame_id, requests = 0, [self._write_open(codec)]
        for packet in packets * 2:
            payload = self.damage(packet) if self._random.random() < 0.5 else packet
            frame = pb.VideoFrame(frame_id=frame_id, payload=payload)
            if self._random.random() < 0.1:
                frame.width_px, frame.height_px = self._random.choices((0, 1, 96, 64, 97, 2**31), k=2)
            requests.append(pb.TrackRequest(video_frame=frame))
            frame_id += self._random.choice((1, 1, 1, 1, 1, 1, 1, 1, 2, 40))
        return self._serialise("packets", requests)

    def _make_prompts(self) -> Case:
        """Prompts, pins, removals and resets among good frames."""
        requests = [self._write_open(pb.VIDEO_CODEC_JPEG)]
        for frame_id, packet in enumerate(self._packets[pb.VIDEO_CODEC_JPEG]):
            frame = pb.VideoFrame(frame_id=frame_id, payload=packet)
            requests.append(pb.TrackRequest(video_frame=frame))
            requests += [self._make_request(frame_id) for _ in range(3)]
        return self._serialise("prompts", requests)

    def _make_request(self, frame_id: int) -> pb.TrackRequest:
        pick = self._random.random()
        if pick < 0.8:
            return pb.TrackRequest(prompt=self._make_prompt(frame_id))
        if pick < 0.9:
            return pb.TrackRequest(pin_frame=pb.PinFrame(frame_id=self._random.choice((frame_id, 2**63))))
        if pick < 0.98:
            return pb.TrackRequest(
                remove_object=pb.RemoveObject(object_id=self._random.choice((1, 2, 2**32 - 1)))
            )
        return pb.TrackRequest(reset_stream=pb.ResetStream())

    def _make_prompt(self, frame_id: int) -> pb.Prompt:
        prompt = pb.Prompt()
        if self._random.random() < 0.3:
            self._fill(prompt, depth=1)
        else:
            prompt.object_id = self._random.randint(0, 3)
            match self._random.randrange(3):
                case 0:
                    for _ in range(self._random.choice((1, 2, MANY))):
                        self._fill(prompt.points.add(), depth=1)
                case 1:
                    self._fill(prompt.box, depth=1)
                case _:
                    prompt.mask.CopyFrom(self._mask)
                    prompt.mask.data = self.damage(prompt.mask.data)
        if self._random.random() < 0.8:
            prompt.frame_id = frame_id
        return prompt

    def _make_wire(self) -> Case:
        """Serialised messages of a good stream, some of them damaged."""
        good = [self._write_open(pb.VIDEO_CODEC_H264_ANNEX_B)]
        for frame_id, packet in enumerate(self._packets[pb.VIDEO_CODEC_H264_ANNEX_B]):
            good.append(pb.TrackRequest(video_frame=pb.VideoFrame(frame_id=frame_id, payload=packet)))
            good.append(self._make_request(frame_id))
        requests = [one.SerializeToString() for one in good]
        for index in self._random.sample(range(len(requests)), k=self._random.randint(1, 4)):
            requests[index] = self.damage(requests[index])
        return Case("wire", tuple(requests))

    def _make_fields(self) -> Case:
        """Messages whose fields hold anything that their types allow."""
        requests: list[pb.TrackRequest] = []
        if self._random.random() < 0.8:
            requests.append(self._write_open(self._random.choice(list(self._packets))))
        for _ in range(self._random.randint(1, 8)):
            request = pb.TrackRequest()
            self._fill_field(request, self._random.choice(pb.TrackRequest.DESCRIPTOR.fields), depth=0)
            requests.append(request)
        return self._serialise("fields", requests)

    def _make_junk(self) -> Case:
        """Bytes that are no message, but now and then by chance."""
        requests = [self._write_open(pb.VIDEO_CODEC_JPEG).SerializeToString()][: self._random.randint(0, 1)]
        requests += [self._junk() for _ in range(self._random.randint(1, 3))]
        return Case("junk", tuple(requests))

    def _serialise(self, kind: str, requests: Sequence[pb.TrackRequest]) -> Case:
        return Case(kind, tuple(one.SerializeToString() for one in requests))

    def _write_open(self, codec: pb.VideoCodec.ValueType) -> pb.TrackRequest:
        video = pb.VideoFormat(codec=codec)
        if codec in (pb.VIDEO_CODEC_RGB24, pb.VIDEO_CODEC_NV12):
            video.width_px, video.height_px = WIDTH_PX, HEIGHT_PX
        # EVERY: each frame is then answered, and a frame that is not shows.
        return pb.TrackRequest(open_stream=pb.OpenStream(video=video, delivery=pb.DELIVERY_EVERY))

    # fields

    def _fill(self, message: Message, *, depth: int) -> None:
        for field in message.DESCRIPTOR.fields:
            assert isinstance(field, FieldDescriptor)
            if self._random.random() < 0.5:
                self._fill_field(message, field, depth=depth)

    def _fill_field(self, message: Message, field: FieldDescriptor, *, depth: int) -> None:
        if not field.is_repeated:
            if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
                getattr(message, field.name).SetInParent()
                if depth < DEEPEST:
                    self._fill(getattr(message, field.name), depth=depth + 1)
            else:
                setattr(message, field.name, self._draw(field))
            return
        values = getattr(message, field.name)
        for _ in range(self._random.choice((0, 1, 2, MANY))):
            if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
                self._fill(values.add(), depth=depth + 1)
            else:
                values.append(self._draw(field))

    def _draw(self, field: FieldDescriptor) -> Any:
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_BOOL:
                return self._random.random() < 0.5
            case FieldDescriptor.CPPTYPE_ENUM:
                return self._random.choice((0, 1, 2, 3, 9, -1, 2**31 - 1))
            case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
                return self._random.choice((*EDGE_FLOATS, self._random.uniform(-10, 200)))
            case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
                return self._random.choice((b"", self._junk(), self.damage(self._mask.data)))
            case FieldDescriptor.CPPTYPE_STRING:
                return self._random.choice(EDGE_TEXTS)
            case kind:
                lowest, end = INT_RANGES[kind]
                return self._random.choice([one for one in EDGE_INTS if lowest <= one < end])

    # good ones

    @cached_property
    def _packets(self) -> dict[pb.VideoCodec.ValueType, list[bytes]]:
        pictures = [_draw_picture(index) for index in range(PICTURES)]
        nv12 = [av.VideoFrame.from_ndarray(one, format="rgb24").to_ndarray(format="nv12") for one in pictures]
        return {
            pb.VIDEO_CODEC_H264_ANNEX_B: _encode(pictures, "libx264"),
            pb.VIDEO_CODEC_HEVC_ANNEX_B: _encode(pictures, "libx265"),
            pb.VIDEO_CODEC_JPEG: [cv2.imencode(".jpg", one)[1].tobytes() for one in pictures],
            pb.VIDEO_CODEC_RGB24: [one.tobytes() for one in pictures],
            pb.VIDEO_CODEC_NV12: [one.tobytes() for one in nv12],
        }

    @cached_property
    def _mask(self) -> pb.Mask:
        mask = np.zeros((HEIGHT_PX, WIDTH_PX), np.bool_)
        mask[20:40, 30:60] = True
        return write_mask(encode_mask(mask))

    @cached_property
    def _weights_files(self) -> dict[str, bytes]:
        """A small file of each format, by its suffix."""
        # Here, since it takes seconds and only files need it.
        import torch
        from safetensors.torch import save

        state = {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.ones(3)}
        saved = io.BytesIO()
        torch.save({"model": state}, saved)
        return {".safetensors": save(state, {"model": "sam2s-nano"}), ".pt": saved.getvalue()}


def _draw_picture(index: int) -> UInt8Array:
    """Something that moves: uint8 [H, W, 3]."""
    row, column = np.mgrid[:HEIGHT_PX, :WIDTH_PX]
    is_inside = np.hypot(row - 30, column - 20 - 4 * index) < 12
    picture = np.stack([row * 2, column * 2, (row + column) % 256], axis=2).astype(np.uint8)
    picture[is_inside] = (220, 30, 30)
    return picture.view(np.uint8)


def _encode(pictures: Sequence[UInt8Array], encoder: str) -> list[bytes]:
    context = av.CodecContext.create(encoder, "w")
    assert isinstance(context, av.VideoCodecContext)
    context.width, context.height, context.pix_fmt = WIDTH_PX, HEIGHT_PX, "yuv420p"
    context.framerate = Fraction(30)
    context.time_base = 1 / context.framerate
    context.gop_size = PICTURES // 2
    context.options = {"preset": "ultrafast", "tune": "zerolatency", "x265-params": "log-level=none"}
    packets = []
    for pts, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts = pts
        packets += context.encode(frame)
    packets += context.encode(None)
    return [bytes(packet) for packet in packets]
