"""The memory slots of one object: which frame lies where, and what the next frame reads.

SAM2S (arXiv 2511.16618), "Diverse memory": beside SAM 2's conditioning and recent frames, a few long-term
memories chosen for being unlike those already kept. Order of the slots in a row:

    0 conditioning · recent (a ring) · long-term (a ring) · corrections (a ring) · found · trial · staging
"""

import enum
from dataclasses import dataclass, field

import numpy as np

from trocar_engines.masklets import Float32Array
from trocar_engines.memory.diversity import Candidate, CandidateRun, redundant_member
from trocar_engines.memory.pool import (
    CONDITIONING_POINTERS,
    FOUND_POINTER,
    RECENT_POINTERS,
    TRIAL_POINTER,
    MemoryPool,
    Place,
    SlotReads,
)
from trocar_engines.network.config import NetworkConfig

EXPLODED = 8.0
VANISHED = 1 / 8
"""A mask that grows or shrinks by more than this against its recent area, with a low predicted IoU, is a
mistake rather than a movement and is not remembered."""
MOST_SKIPPED = 2
"""So many frames in a row are left out of recent memory at most, whatever the clock says."""
AREA_MEMORY = 0.9
"""Share of the past in the running mean of an object's area."""


class MemoryPolicy(enum.Enum):
    """Who is remembered."""

    VANILLA = "vanilla"
    """SAM 2's predictor to the letter: conditioning and recent frames, whatever they show."""
    FIFO = "fifo"
    """DiveMem as published: long-term memories leave in order of age; bad frames are not remembered."""
    SPREAD = "spread"
    """DiveMem for streams without end: the memory that says least leaves, so that four slots span hours."""


@dataclass(frozen=True, kw_only=True)
class BankConfig:
    """Sizes and thresholds of a bank.

    Args:
        policy: who is remembered.
        recent_slots: most recent frames.
        long_term_slots: long-term memories (SAM2S: 4).
        correction_slots: latest corrected frames.
        recent_interval_s: least time between two recent memories of an object in view. Shorter than between
            frames at 30 a second, longer than at 60, where recent memory so spans as much and costs half.
        candidate_iou: predicted IoU above which a frame may become a long-term memory (SAM2S: 0.95).
        candidate_run: so many candidates in a row elect one (SAM2S: 5).
        candidate_interval_s: least time between candidates. As published every frame is one, at 1 to 25
            frames a second; at 60 four long-term slots would span a third of a second.
        absence_interval_s: an absence that lasts is remembered anew so often, in its one slot: what comes
            meanwhile and is not taken for the object is then known to be none of it.
        low_iou: predicted IoU under which a jump in area counts as a mistake.
    """

    policy: MemoryPolicy = MemoryPolicy.FIFO
    recent_slots: int = 6
    recent_interval_s: float = 0.025
    long_term_slots: int = 4
    correction_slots: int = 2
    candidate_iou: float = 0.95
    candidate_run: int = 5
    candidate_interval_s: float = 0.2
    absence_interval_s: float = 0.25
    low_iou: float = 0.5

    @property
    def slots(self) -> int:
        """Slots of a row."""
        return self.most_read + 2

    @property
    def most_read(self) -> int:
        """Slots that one frame reads at most: of what was found and what is on trial one, and no staging."""
        return 1 + self.recent_slots + self.long_term_slots + self.correction_slots + 1

    @property
    def found_slot(self) -> int:
        """Where the object was found elsewhere last, see `MemoryBank.begin_trial`."""
        return self.slots - 3

    @property
    def trial_slot(self) -> int:
        """What may be the object."""
        return self.slots - 2

    @property
    def staging_slot(self) -> int:
        """Where the best candidate so far waits."""
        return self.slots - 1


@dataclass(kw_only=True)
class Ring:
    """A range of slots that is filled in order of time and then overwrites its oldest.

    Args:
        first: its first slot.
        size: how many slots.
        times: when each filled slot was written, oldest first; slot to time in any unit.
    """

    first: int
    size: int
    times: dict[int, float] = field(default_factory=dict)

    def next_slot(self, time: float) -> int:
        """The slot to write now."""
        if len(self.times) == self.size:
            slot = next(iter(self.times))
            del self.times[slot]
        else:
            slot = next(slot for slot in range(self.first, self.first + self.size) if slot not in self.times)
        self.times[slot] = time
        return slot

    def filled(self) -> list[int]:
        """Filled slots, oldest first."""
        return list(self.times)

    def discard_latest(self) -> None:
        """Empty the slot that was written last."""
        self.times.popitem()

    def discard_from(self, time: float) -> None:
        """Empty what was written at `time` or later."""
        self.times = {slot: written for slot, written in self.times.items() if written < time}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sighting:
    """Of an object that was away, on a frame where its memory had not found it.

    Args:
        time_s: presentation time, and `frame`, the bank's count.
        area: pixels of the mask at its own resolution.
    """

    time_s: float
    frame: int
    area: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameFacts:
    """What decides whether a frame is remembered.

    Args:
        time_s: its presentation time.
        predicted_iou: 0 to 1.
        is_present: whether the object is in the picture.
        is_trusted: False after a gap in the video.
        area: pixels of the mask at its own resolution.
        summary: float32 [C] globally pooled image features.
    """

    time_s: float
    predicted_iou: float
    is_present: bool
    is_trusted: bool
    area: int
    summary: Float32Array


class MemoryBank:
    """One object's row of the pool and the meaning of its slots.

    Args:
        pool: owns the tensors.
        config: sizes and thresholds.
        network: whose temporal embeddings the slots carry.
    """

    def __init__(self, pool: MemoryPool, config: BankConfig, network: NetworkConfig) -> None:
        assert config.slots <= pool.slots, "the pool was built for smaller banks"
        self.pool, self.config = pool, config
        self.row = pool.allocate()
        self.conditioning_time = network.num_maskmem - 1
        has_own = network.has_long_term_embedding
        self.long_term_time = network.num_maskmem if has_own else self.conditioning_time
        self.correction_time = network.num_maskmem + 1 if has_own else self.conditioning_time
        self.reset()

    def reset(self) -> None:
        """Forget everything; the row stays."""
        config = self.config
        self.recent = Ring(first=1, size=config.recent_slots)
        self.long_term = Ring(first=self.recent.first + config.recent_slots, size=config.long_term_slots)
        first = self.long_term.first + config.long_term_slots
        self.corrections = Ring(first=first, size=config.correction_slots)
        self.frame = 0
        self.is_conditioned = False
        self.latest_slot = 0
        self.absent_slot: int | None = None
        self.absent_s = 0.0
        self.area = 0.0
        self.found: Sighting | None = None
        self.trial: Sighting | None = None
        self._conditioning_frame = 0
        self._conditioning_summary: Float32Array | None = None
        self._recent_pointers = Ring(first=CONDITIONING_POINTERS, size=RECENT_POINTERS)
        self._pointer_frames: dict[int, int] = {}
        self._members: dict[int, Candidate] = {}
        self.run = CandidateRun(self.config.candidate_run, self.config.candidate_interval_s)

    def release(self) -> None:
        """Give the row back; the bank must not be used again."""
        self.pool.release(self.row)

    def advance(self, frames: int = 1) -> None:
        """Count frames; the ages of pointers grow."""
        self.frame += frames

    @property
    def told_slot(self) -> int:
        """Slot of the frame that tells last what the object is, by a person's word or by its looks.

        A frame that a person corrected tells better what the object is than the one it began on. With slot 0
        instead a drifted object drifts again at once: J&F 55 after a correction, 83 with this.
        """
        if self._sighting_slot is not None:
            return self._sighting_slot
        return next(reversed(self.corrections.times), 0)

    @property
    def _sighting_slot(self) -> int | None:
        if self.trial is not None:
            return self.config.trial_slot
        return None if self.found is None else self.config.found_slot

    @property
    def lasting_slots(self) -> list[int]:
        """Slots of pictures that tell for long what the object is, the one told last first."""
        return list(dict.fromkeys([self.told_slot, *self.long_term.filled(), *self.corrections.filled(), 0]))

    def reads(self) -> SlotReads:
        """What the current frame attends to.

        Temporal embeddings follow SAM 2: row `num_maskmem - 1` for conditioning frames, 0 for the latest of
        the recent frames, 1 for the one before.
        """
        assert self.is_conditioned, "an object is tracked only after its first prompt"
        recent = self.recent.filled()
        long_term, corrections = self.long_term.filled(), self.corrections.filled()
        sighting, seen = self.trial or self.found, self._sighting_slot
        if seen is not None:
            corrections = [*corrections, seen]
        times = [
            self.conditioning_time,
            *range(len(recent) - 1, -1, -1),
            *[self.long_term_time] * len(long_term),
            *[self.correction_time] * len(corrections),
        ]
        told = self.told_slot
        latest = self._recent_pointers.filled()
        pointers, written = [0], [self._conditioning_frame]
        if sighting is not None:
            # In the place of the oldest, so that no frame reads more of them than others.
            latest = latest[-(RECENT_POINTERS - 1) :]
            pointers.append(FOUND_POINTER if self.trial is None else TRIAL_POINTER)
            written.append(sighting.frame)
        pointers += latest
        written += [self._pointer_frames[slot] for slot in latest]
        ages = [self.frame - frame for frame in written]
        return SlotReads(
            slots=[0, *recent, *long_term, *corrections],
            times=times,
            pointers=pointers,
            # A conditioning frame's age grows without bound on a live stream; training saw at most 15. SAM 2
            # lets it grow.
            pointer_ages=ages if self._is_vanilla else [min(age, RECENT_POINTERS) for age in ages],
            # While the object is away the prompted picture counts alone. A picture of its absence holds
            # against it whatever comes back from another side (four sets of LongSim dev: J&F 70 instead of
            # 66 on frames that show the object).
            prototypes=(told, self.latest_slot if self.absent_slot is None and self.trial is None else told),
        )

    def condition(self, summary: Float32Array, area: int) -> int:
        """Slot for the object's first conditioning frame; everything else is forgotten."""
        frame = self.frame
        self.reset()
        self.frame = frame
        self.is_conditioned = True
        self.area = float(area)
        self.run.start_anew(summary)
        self._conditioning_frame, self._conditioning_summary = frame, summary
        return 0

    def correct(self, area: int, time_s: float) -> int:
        """Slot for a frame that was corrected by a prompt; what was found without a person counts no more."""
        self.found = self.trial = None
        self.area = float(area)
        self.absent_slot = None
        self.latest_slot = self.corrections.next_slot(time_s)
        return self.latest_slot

    def begin_trial(self, area: int, time_s: float) -> Place:
        """Place for a frame on which the object may be, see `Tracker._search`.

        It is read as a correction is, beside all others, until it is kept or dropped: seen from another side
        an object is unlike all that is remembered, and one recent memory among many did not hold it (four
        sets of LongSim dev: J&F 69 instead of 75 on frames that show the object).
        """
        self.trial = Sighting(time_s=time_s, frame=self.frame, area=area)
        return Place(self.row, self.config.trial_slot, TRIAL_POINTER, is_rounded=False)

    def keep_trial(self) -> None:
        """What was on trial is the object."""
        assert self.trial is not None, "nothing is on trial"
        self.found, self.trial = self.trial, None
        self.pool.copy_slot(self.row, self.config.trial_slot, self.config.found_slot)
        self.pool.copy_pointer(self.row, TRIAL_POINTER, FOUND_POINTER)
        self.area, self.latest_slot, self.absent_slot = float(self.found.area), self.config.found_slot, None

    def drop_trial(self) -> None:
        """What was on trial is not the object; all else is as it was before."""
        self.trial = None

    def roll_back(self, time_s: float, frame: int | None) -> None:
        """Forget what was remembered at `time_s` or later; the conditioning frame and what is on trial stay.

        Args:
            time_s: presentation time of the frame that turned out wrong.
            frame: the count of frames to go on from; None, for a frame that the object skipped while it
                caught up, takes the one after what is still remembered.
        """
        assert self._conditioning_summary is not None
        for ring in (self.recent, self.long_term, self.corrections, self._recent_pointers):
            ring.discard_from(time_s)
        if self.found is not None and self.found.time_s >= time_s:
            self.found = None
        kept_frames = [self._pointer_frames[slot] for slot in self._recent_pointers.filled()]
        self.frame = max([self._conditioning_frame, *kept_frames]) + 1 if frame is None else frame
        self._members = {slot: self._members[slot] for slot in self.long_term.filled()}
        kept = [member.summary for member in self._members.values()]
        self.run.start_anew(kept[-1] if kept else self._conditioning_summary)
        kept_slots = self.recent.times | self.corrections.times
        self.latest_slot = max(kept_slots, key=lambda slot: kept_slots[slot], default=0)
        self.absent_slot = None

    def is_due(self, facts: FrameFacts) -> bool:
        """Whether a tracked frame is to be remembered at all, or came too soon after the one before."""
        is_news = not (facts.is_trusted and facts.is_present) or self.absent_slot is not None
        if is_news or self._is_vanilla or not self.recent.times:
            return True
        latest_s = next(reversed(self.recent.times.values()))
        since = self.frame - self._pointer_frames[self._recent_pointers.filled()[-1]]
        # Earlier counts, too: a source that begins anew may begin its clock anew. Some clocks stand still.
        is_later = abs(facts.time_s - latest_s) >= self.config.recent_interval_s
        return is_later or since > MOST_SKIPPED

    def choose_slot(self, facts: FrameFacts) -> int | None:
        """Slot for a tracked frame, None if it is not worth remembering."""
        if not facts.is_trusted:
            return None
        if not facts.is_present:
            return (
                self.recent.next_slot(facts.time_s) if self._is_vanilla else self._absent_slot(facts.time_s)
            )
        if not self._is_vanilla and self._is_mistake(facts):
            return None
        self.absent_slot = None
        self.area = AREA_MEMORY * self.area + (1 - AREA_MEMORY) * facts.area
        self.latest_slot = self.recent.next_slot(facts.time_s)
        return self.latest_slot

    def _absent_slot(self, time_s: float) -> int | None:
        """Slot for a frame without the object: one at a time, as six would flush what is known of it."""
        if self.absent_slot is not None:
            if abs(time_s - self.absent_s) < self.config.absence_interval_s:
                return None
            for ring in (self.recent, self._recent_pointers):
                ring.discard_latest()
        self.absent_slot, self.absent_s = self.recent.next_slot(time_s), time_s
        return self.absent_slot

    def place(self, slot: int, time_s: float) -> Place:
        """Where a frame's memory goes, given its slot; takes a slot for its pointer."""
        pointer_slot = 0 if slot == 0 else self.pointer_slot(time_s)
        return Place(self.row, slot, pointer_slot, self._is_vanilla)

    @property
    def _is_vanilla(self) -> bool:
        return self.config.policy is MemoryPolicy.VANILLA

    def _is_mistake(self, facts: FrameFacts) -> bool:
        if facts.predicted_iou >= self.config.low_iou:
            return False
        ratio = facts.area / max(self.area, 1.0)
        return ratio > EXPLODED or ratio < VANISHED

    def pointer_slot(self, time_s: float) -> int:
        """Where the pointer of the frame just remembered goes."""
        slot = self._recent_pointers.next_slot(time_s)
        self._pointer_frames[slot] = self.frame
        return slot

    def consider(self, facts: FrameFacts, slot: int | None) -> None:
        """Offer the frame just written to `slot` as a long-term memory; may copy slots within the row."""
        if self.config.policy is MemoryPolicy.VANILLA or not self.config.long_term_slots:
            return
        is_candidate = (
            slot is not None and facts.is_present and facts.predicted_iou > self.config.candidate_iou
        )
        if not is_candidate:
            self.run.break_off(facts.time_s)
            return
        assert slot is not None
        verdict = self.run.offer(
            Candidate(summary=facts.summary, predicted_iou=facts.predicted_iou, time_s=facts.time_s)
        )
        if verdict.is_best_so_far:
            self.pool.copy_slot(self.row, slot, self.config.staging_slot)
        if verdict.elected is not None:
            self._admit(verdict.elected)

    def _admit(self, elected: Candidate) -> None:
        """Move the staged memory to a long-term slot, unless the policy finds it redundant."""
        members = list(self._members.values())
        if self.config.policy is MemoryPolicy.SPREAD and len(members) == self.config.long_term_slots:
            assert self._conditioning_summary is not None
            redundant = redundant_member([*members, elected], self._conditioning_summary)
            if redundant == len(members):
                return
            slot = list(self._members)[redundant]
            del self.long_term.times[slot]
        target = self.long_term.next_slot(elected.time_s)
        self._members.pop(target, None)
        self._members[target] = elected
        self.pool.copy_slot(self.row, self.config.staging_slot, target)
        self.run.keep(elected)


def mask_area(mask_logits: Float32Array) -> int:
    """Pixels above zero."""
    return int(np.count_nonzero(mask_logits > 0))
