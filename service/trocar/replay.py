"""What a client keeps of its stream so that another server can take it up: packets and last good masks.

Packets are kept from the last keyframe on, since decoding starts there; besides, for an object that was last
seen earlier and for a frame that is still unanswered, the packets from the keyframe before that frame up to
it. Both are bounded: a video whose
keyframes are too far apart cannot be replayed, and objects last seen too long ago are given up by name.
"""

from collections import deque
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import cv2
import numpy as np

from trocar.decode import Codec, is_entry_point
from trocar.v1 import tracking_pb2 as pb
from trocar_engines.masklets import BoolArray, ObjectState

if TYPE_CHECKING:
    from trocar.client_core import TrackedObject

REPLAY_BYTES = 64 << 20
REPLAY_FRAMES = 600
"""20 s at 30 frames/s: more would take longer to decode again than anybody waits for."""


@dataclass(frozen=True, slots=True, eq=False)
class KeptFrame:
    """A frame that can be sent again."""

    frame_id: int
    message: pb.TrackRequest

    @property
    def size_bytes(self) -> int:
        """Memory that it takes."""
        return len(self.message.video_frame.payload)


@dataclass(frozen=True, slots=True, eq=False)
class GoodMask:
    """An object when it was last seen.

    Args:
        frame_id: on which frame.
        tracked: the object there.
        width_px: of that picture.
        height_px: of that picture.
    """

    frame_id: int
    tracked: "TrackedObject"
    width_px: int
    height_px: int

    def read_mask(self) -> BoolArray:
        """The mask in source pixels: bool [H, W]."""
        mask = self.tracked.mask
        if mask.shape == (self.height_px, self.width_px):
            return mask
        size = (self.width_px, self.height_px)
        return cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST).astype(np.bool_)


@dataclass(kw_only=True, eq=False)
class PacketStore:
    """Frames in groups, each of which begins with one that decoding can start from.

    Args:
        codec: of the payloads.
    """

    codec: Codec
    _groups: deque[list[KeptFrame]] = field(default_factory=deque)
    _frames: int = 0
    _bytes: int = 0

    @property
    def first_of_last_group(self) -> int | None:
        """Frame from which on decoding goes on without a gap; None when nothing is kept."""
        return self._groups[-1][0].frame_id if self._groups else None

    def __iter__(self) -> Iterator[KeptFrame]:
        for group in self._groups:
            yield from group

    def add(
        self, frame_id: int, message: pb.TrackRequest, *, unanswered: Set[int], anchors: Set[int]
    ) -> None:
        """Keep a frame, and give up what is no longer needed.

        Args:
            frame_id: of the frame.
            message: to send again.
            unanswered: frames whose results are still to come.
            anchors: frames on which objects were last seen.
        """
        kept = KeptFrame(frame_id, message)
        if is_entry_point(self.codec, message.video_frame.payload):
            self._groups.append([])
            self.trim(unanswered=unanswered, anchors=anchors)
        elif not self._groups:
            # Of no use without the keyframe before it.
            return
        self._groups[-1].append(kept)
        self._count(kept, 1)
        while self._frames > REPLAY_FRAMES or self._bytes > REPLAY_BYTES:
            self._forget(self._groups.popleft())

    def trim(self, *, unanswered: Set[int], anchors: Set[int]) -> None:
        """Give up what is no longer needed; see `add`."""
        if not self._groups:
            return
        needed: deque[list[KeptFrame]] = deque()
        for group in list(self._groups)[:-1]:
            # An unanswered frame may yet be the one on which an object was last seen.
            needs = [kept.frame_id in anchors or kept.frame_id in unanswered for kept in group]
            end = len(group) - next((index for index, need in enumerate(reversed(needs)) if need), len(group))
            self._forget(group[end:])
            if end:
                needed.append(group[:end])
        needed.append(self._groups[-1])
        self._groups = needed

    def _forget(self, frames: list[KeptFrame]) -> None:
        for kept in frames:
            self._count(kept, -1)

    def _count(self, kept: KeptFrame, sign: int) -> None:
        self._frames += sign
        self._bytes += sign * kept.size_bytes


class ObjectStore:
    """Last good masks by object. An object is known from its first accepted prompt to its removal."""

    def __init__(self) -> None:
        self._known: dict[int, GoodMask | None] = {}
        self._forgotten_before: dict[int, int] = {}
        self._all_forgotten_before = 0

    @property
    def anchors(self) -> set[int]:
        """Frames on which objects were last seen."""
        return {good.frame_id for good in self._known.values() if good is not None}

    def items(self) -> list[tuple[int, GoodMask | None]]:
        """Known objects; None where nothing good was ever seen of one."""
        return list(self._known.items())

    def accept(self, frame_id: int, tracked: "TrackedObject", width_px: int, height_px: int) -> None:
        """Take up an object that was prompted."""
        good = GoodMask(frame_id, tracked, width_px, height_px) if tracked.box is not None else None
        self._known[tracked.object_id] = good or self._known.get(tracked.object_id)

    def see(self, frame_id: int, tracked: "TrackedObject", width_px: int, height_px: int) -> None:
        """Take over what a trusted result says, unless the object was removed before that frame was sent."""
        earliest = max(self._all_forgotten_before, self._forgotten_before.get(tracked.object_id, 0))
        is_seen = tracked.state is ObjectState.VISIBLE and tracked.box is not None
        if tracked.object_id in self._known and is_seen and frame_id >= earliest:
            self._known[tracked.object_id] = GoodMask(frame_id, tracked, width_px, height_px)

    def forget(self, object_id: int, *, next_frame_id: int) -> None:
        """Forget an object; results of frames before `next_frame_id` may still name it."""
        self._known.pop(object_id, None)
        self._forgotten_before[object_id] = next_frame_id

    def forget_all(self, *, next_frame_id: int) -> None:
        """Forget every object."""
        self._known.clear()
        self._forgotten_before.clear()
        self._all_forgotten_before = next_frame_id
