"""What page and gateway send each other, and what waits for a page.

An envelope is four bytes with the length of a JSON header (little endian), the header, then bytes whose
meaning the header's `type` tells: a coded frame, or masks one after another.
"""

import asyncio
import json
import struct
from collections import deque
from collections.abc import Mapping
from typing import Any

from trocar.errors import ContractError

WAITING_FRAMES = 30
"""A page that is further behind gets no frame until the next keyframe: its network is too slow."""
WAITING_RESULTS = 60


def pack(header: Mapping[str, Any], *blobs: bytes) -> bytes:
    """Write an envelope."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return b"".join((struct.pack("<I", len(text)), text, *blobs))


def unpack(envelope: bytes) -> tuple[dict[str, Any], bytes]:
    """Read an envelope.

    Raises:
        ContractError: it is none.
    """
    try:
        (size,) = struct.unpack_from("<I", envelope)
        header = json.loads(envelope[4 : 4 + size])
    except (struct.error, ValueError) as error:
        raise ContractError("the page sent what this gateway does not know: reload it") from error
    if not isinstance(header, dict) or 4 + size > len(envelope):
        raise ContractError("the page sent what this gateway does not know: reload it")
    return header, envelope[4 + size :]


class Outbox:
    """What waits for a page: bounded, the oldest pictures and results go first, words never."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._changed = asyncio.Event()
        self._awaits_keyframe = False
        self.dropped_frames = 0

    def put(self, envelope: bytes, kind: str, *, is_keyframe: bool = True) -> None:
        """Queue an envelope.

        Args:
            envelope: packed.
            kind: "frame", "result" or "word".
            is_keyframe: of a frame: whether decoding can start there.
        """
        if kind == "frame" and not self._admit_frame(is_keyframe=is_keyframe):
            return
        if kind == "result" and self._count("result") >= WAITING_RESULTS:
            self._drop("result")
        self._waiting.append((kind, envelope))
        self._changed.set()

    async def get(self) -> bytes:
        """Take the next envelope, waiting for one."""
        while not self._waiting:
            self._changed.clear()
            await self._changed.wait()
        return self._waiting.popleft()[1]

    def _admit_frame(self, *, is_keyframe: bool) -> bool:
        if self._count("frame") >= WAITING_FRAMES:
            self.dropped_frames += self._count("frame")
            self._drop("frame")
            self._awaits_keyframe = True
        if self._awaits_keyframe and not is_keyframe:
            self.dropped_frames += 1
            return False
        self._awaits_keyframe = False
        return True

    def _count(self, kind: str) -> int:
        return sum(one == kind for one, _ in self._waiting)

    def _drop(self, kind: str) -> None:
        self._waiting = deque(entry for entry in self._waiting if entry[0] != kind)
