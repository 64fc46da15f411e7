"""Replies that the tracker still owes, in the order in which they will be sent. Bounded."""

import asyncio
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

from trocar.inbox import ArrivedFrame
from trocar.telemetry import StageClock
from trocar.v1 import tracking_pb2 as pb
from trocar_engines.masklets import FrameMasklets, PromptOutcome


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PendingFrame:
    """A picture on its way through the tracker."""

    arrival: ArrivedFrame
    width_px: int
    height_px: int
    clock: StageClock
    masklets: Future[FrameMasklets]
    offered_ns: int

    @property
    def frame_id(self) -> int:
        """The client's number of the frame."""
        return self.arrival.packet.frame_id

    @property
    def is_dropped(self) -> bool:
        """Whether the tracker has already passed over it."""
        future = self.masklets
        is_settled = future.done() and not future.cancelled() and future.exception() is None
        return is_settled and future.result().is_dropped


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PendingPrompt:
    """A prompt on its way through the tracker, drawn on a picture of that size."""

    message: pb.Prompt
    width_px: int
    height_px: int
    outcome: Future[PromptOutcome]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PendingPin:
    """A pin on its way through the tracker."""

    done: Future[int]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PendingRemoval:
    """A removal on its way through the tracker."""

    object_id: int
    done: Future[None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PendingReset:
    """A reset on its way through the tracker."""

    done: Future[None]


Reply = PendingFrame | PendingPrompt | PendingPin | PendingRemoval | PendingReset | pb.TrackResponse


class Replies:
    """A bounded queue of replies. Belongs to one event loop."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._replies: deque[Reply] = deque()
        self._is_closed = False
        self._changed = asyncio.Condition()

    @property
    def is_full(self) -> bool:
        """Whether `put` would wait."""
        return len(self._replies) >= self._capacity

    @property
    def waiting_frames(self) -> int:
        """Frames among the replies."""
        return sum(isinstance(reply, PendingFrame) for reply in self._replies)

    def take_dropped(self) -> list[int]:
        """Remove the frames that the tracker has passed over.

        Without this a slow tracker would fill the queue with frames that need no answer, and the newest
        picture would find no room.

        Returns:
            Their ids, oldest first.
        """
        dropped = [reply for reply in self._replies if isinstance(reply, PendingFrame) and reply.is_dropped]
        if dropped:
            self._replies = deque(reply for reply in self._replies if reply not in dropped)
        return [frame.frame_id for frame in dropped]

    async def put(self, reply: Reply) -> None:
        """Add a reply; waits for room."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self.is_full)
            self._replies.append(reply)
            self._changed.notify_all()

    async def get(self) -> Reply | None:
        """Take the oldest reply; None when the queue is closed and all are taken."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._replies or self._is_closed)
            if not self._replies:
                return None
            reply = self._replies.popleft()
            self._changed.notify_all()
            return reply

    async def close(self) -> None:
        """Say that nothing more will be put."""
        async with self._changed:
            self._is_closed = True
            self._changed.notify_all()
