"""Requests between the reader and the decoder: in order, bounded, and never slower than life.

When delivery is EVERY a full inbox makes the reader wait, and gRPC flow control makes the client wait. When
it is LATEST the reader must not wait for the decoder: a full inbox means that decoding has fallen behind.
"""

import asyncio
from collections import deque
from dataclasses import dataclass, field

from trocar.decode import Codec, Packet, is_entry_point
from trocar.v1 import tracking_pb2 as pb

WAITING_INTRA_PACKETS = 2
"""Each JPEG or raw frame stands alone, so in LATEST an older one is of no use."""
WAITING_EVERY_PACKETS = 4
WAITING_BYTES = 64 << 20
MOST_SKIPPED_IDS = 1_024
"""In one report; as the contract says."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ArrivedFrame:
    """A frame as received.

    Args:
        packet: what to decode.
        pts: in ticks, None when the client sends none.
        capture_time_ns: to echo.
        received_ns: monotonic clock.
    """

    packet: Packet
    pts: int | None
    capture_time_ns: int
    received_ns: int

    @property
    def size_bytes(self) -> int:
        """Memory that the request takes."""
        return len(self.packet.payload)


@dataclass(kw_only=True, slots=True)
class SkippedFrames:
    """Frames that were never decoded because decoding had fallen behind."""

    frame_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ArrivedRequest:
    """A prompt, pin, removal or reset as received."""

    message: pb.TrackRequest
    size_bytes: int


Arrival = ArrivedFrame | ArrivedRequest | SkippedFrames


class Inbox:
    """A bounded queue of one stream's requests. Belongs to one event loop."""

    def __init__(self, *, codec: Codec, is_live: bool, max_waiting_packets: int) -> None:
        self._codec = codec
        self._is_live = is_live
        self._capacity = WAITING_EVERY_PACKETS
        if is_live:
            self._capacity = max_waiting_packets if codec.is_inter_coded else WAITING_INTRA_PACKETS
        self._arrivals: deque[Arrival] = deque()
        self._frames = 0
        self._bytes = 0
        self._is_skipping = False
        self._is_closed = False
        self._changed = asyncio.Condition()

    @property
    def waiting_frames(self) -> int:
        """Frames that wait for the decoder."""
        return self._frames

    async def put(self, arrival: ArrivedFrame | ArrivedRequest) -> None:
        """Add a request; waits for room, except with a frame of a live stream, which never waits."""
        async with self._changed:
            if isinstance(arrival, ArrivedFrame) and self._is_live:
                self._put_live(arrival)
            else:
                await self._changed.wait_for(self._has_room)
                self._append(arrival)
            self._changed.notify_all()

    async def get(self) -> Arrival | None:
        """Take the oldest request; None when the client has closed its side and all are taken."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._arrivals or self._is_closed)
            if not self._arrivals:
                return None
            arrival = self._arrivals.popleft()
            self._count(arrival, -1)
            self._changed.notify_all()
            return arrival

    async def close(self) -> None:
        """Say that nothing more will be put."""
        async with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return len(self._arrivals) < self._capacity and self._bytes < WAITING_BYTES

    def _put_live(self, frame: ArrivedFrame) -> None:
        if self._frames >= self._capacity or (self._frames and self._bytes >= WAITING_BYTES):
            self._drop_waiting_frames()
        if self._is_skipping and not is_entry_point(self._codec, frame.packet.payload):
            self._skip(frame.packet.frame_id)
            return
        self._is_skipping = False
        self._append(frame)

    def _drop_waiting_frames(self) -> None:
        """Drop frames up to the last one that decoding can start from; prompts and removals stay in order."""
        waiting, self._arrivals = self._arrivals, deque()
        frames = [arrival for arrival in waiting if isinstance(arrival, ArrivedFrame)]
        last_entry = next(
            (one for one in frames[:0:-1] if is_entry_point(self._codec, one.packet.payload)), None
        )
        self._is_skipping = True
        for arrival in waiting:
            if not isinstance(arrival, ArrivedFrame):
                self._arrivals.append(arrival)
                continue
            self._is_skipping = self._is_skipping and arrival is not last_entry
            if self._is_skipping:
                self._count(arrival, -1)
                self._skip(arrival.packet.frame_id)
            else:
                self._arrivals.append(arrival)

    def _skip(self, frame_id: int) -> None:
        if not (self._arrivals and isinstance(self._arrivals[-1], SkippedFrames)):
            self._arrivals.append(SkippedFrames())
        last = self._arrivals[-1]
        assert isinstance(last, SkippedFrames)
        if len(last.frame_ids) < MOST_SKIPPED_IDS:
            last.frame_ids.append(frame_id)

    def _append(self, arrival: ArrivedFrame | ArrivedRequest) -> None:
        self._arrivals.append(arrival)
        self._count(arrival, 1)

    def _count(self, arrival: Arrival, sign: int) -> None:
        if isinstance(arrival, SkippedFrames):
            return
        self._frames += sign * isinstance(arrival, ArrivedFrame)
        self._bytes += sign * arrival.size_bytes
