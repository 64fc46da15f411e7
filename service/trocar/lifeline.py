"""What it takes to begin a stream anew on another connection, without the surgeon tapping again.

A mask is worth something only on its own picture. So the packets since the last keyframe are kept, and for
each object the packets up to the frame on which it was last seen for certain. A new stream gets those first,
with the masks as prompts on their own frames, then the live picture. Only this file knows about that: when
the client itself resumes streams, it can go.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from trocar.client_core import Frame, PromptAccepted, Request, Result, TrackedObject
from trocar_engines.masklets import ObjectState, Prompt

LONGEST_RUN = 300
"""Packets from one keyframe on that are kept: 10 s at 30 frames/s. A longer run is not worth replaying."""
RECENT_BYTES = 256 << 20
"""Of frames whose results may still come: 20 of raw 4K, where the longest run would have 3.7 GB."""


@dataclass(eq=False)
class _Run:
    """Packets from a keyframe on, in order; shared by the anchors that need them."""

    frames: list[Frame] = field(default_factory=list)
    is_broken: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class _Anchor:
    """Where an object was last seen for certain."""

    run: _Run
    frame_id: int
    tracked: TrackedObject


class Lifeline:
    """Keeps what `replay` needs: bounded by the objects, one run of packets each at most.

    Besides what was sent last, for results to come. Not thread safe.
    """

    def __init__(self) -> None:
        self._run = _Run(is_broken=True)
        self._recent: deque[tuple[Frame, _Run]] = deque()
        self._recent_bytes = 0
        self._anchors: dict[int, _Anchor] = {}
        self._wanted: set[int] = set()
        self.next_frame_id = 0

    @property
    def object_ids(self) -> tuple[int, ...]:
        """Objects that a replay brings back."""
        return tuple(self._anchors)

    def want(self, object_id: int) -> None:
        """The object was prompted: bring it back if need be."""
        self._wanted.add(object_id)

    def forget(self, object_id: int) -> None:
        """The object was removed; results that are still on their way do not bring it back."""
        self._wanted.discard(object_id)
        self._anchors.pop(object_id, None)

    def note_frame(self, frame: Frame, *, is_keyframe: bool) -> None:
        """Keep a frame that goes to the server; its id must be set."""
        assert frame.frame_id is not None
        if is_keyframe:
            self._run = _Run()
        elif len(self._run.frames) >= LONGEST_RUN or frame.frame_id != self.next_frame_id:
            self._run.is_broken = True
        self.next_frame_id = frame.frame_id + 1
        if not self._run.is_broken:
            self._run.frames.append(frame)
            self._note_recent(frame)

    def _note_recent(self, frame: Frame) -> None:
        """Find the frame's run when its result comes, which may be after the next keyframe."""
        self._recent.append((frame, self._run))
        self._recent_bytes += len(frame.payload)
        while len(self._recent) > LONGEST_RUN or self._recent_bytes > RECENT_BYTES:
            oldest, _ = self._recent.popleft()
            self._recent_bytes -= len(oldest.payload)

    def note_result(self, result: Result) -> None:
        """Move the anchors of the objects that a trusted picture shows."""
        if result.is_trusted:
            for tracked in result.objects:
                self._anchor(result.frame_id, tracked)

    def note_accepted(self, accepted: PromptAccepted) -> None:
        """Anchor an object where it was just prompted; its server may fail before it shows it again."""
        self._anchor(accepted.frame_id, accepted.tracked)

    def _anchor(self, frame_id: int, tracked: TrackedObject) -> None:
        run = next((run for frame, run in reversed(self._recent) if frame.frame_id == frame_id), None)
        is_seen = tracked.state is ObjectState.VISIBLE and tracked.box is not None
        if run is not None and is_seen and tracked.object_id in self._wanted:
            self._anchors[tracked.object_id] = _Anchor(run=run, frame_id=frame_id, tracked=tracked)

    def replay(self) -> Iterator[Request]:
        """What to send first on a new stream: frames, each followed by the masks that belong to it."""
        anchors = sorted(self._anchors.values(), key=lambda anchor: anchor.frame_id)
        last_of_run = {id(anchor.run): anchor.frame_id for anchor in anchors}
        for anchor in {id(anchor.run): anchor for anchor in anchors}.values():
            for frame in list(anchor.run.frames):
                assert frame.frame_id is not None
                if frame.frame_id > last_of_run[id(anchor.run)]:
                    break
                yield frame
                yield from (
                    Prompt(object_id=one.tracked.object_id, frame_id=one.frame_id, mask=one.tracked.mask)
                    for one in anchors
                    if one.frame_id == frame.frame_id
                )
